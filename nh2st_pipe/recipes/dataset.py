"""One published dataset: how its files become a manifest, how it is split, and which figures are published for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.values import Strict, validate

__all__ = ["DatasetRecipe", "Published", "load_dataset_recipe"]


class Published(Strict):
    """A figure that somebody has published for this dataset."""

    method: str
    figure: Literal["mse", "mae", "pcc", "pcc_top50"]
    value: float
    source: str


class DatasetRecipe(Strict):
    """What is known of a dataset."""

    name: str
    title: str
    get: str
    """Page where its files are."""
    paper: str
    licence: str = "see where it is from"
    importer: str
    """Layout of its files, as `nh2st-pipe manifest` calls it."""
    where: dict[str, str] = Field(default_factory=dict)
    """Which sections of that layout belong to it; see --where."""
    folds: str
    """What was left out in turn where its figures were published, as --folds takes it; groups in the order of their
    names, shuffled as scikit-learn's KFold does with `seed`."""
    honest_folds: str | None = None
    """The same so that no patient is on both sides, where `folds` does not see to that."""
    seed: int = 2021
    genes: int = Field(250, gt=0)
    """Size of the panel: the most expressed genes."""
    tile_px: float | None = Field(None, gt=0)
    """Side of a tile, level-0 px; None is 112 µm."""
    published: tuple[Published, ...] = ()
    note: str = ""


def load_dataset_recipe(name: str | Path) -> DatasetRecipe:
    """Return the dataset called `name`, or that of a YAML file. Raises RecipeError naming what is wrong with it."""
    path = files.find("manifests", name)
    return validate(DatasetRecipe, files.load_yaml(path), path)
