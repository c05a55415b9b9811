"""From a recipe's head to a model: building, training, saving, loading. A new head is added here, once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.fitting import Fit, fit_by_steps
from nh2st_pipe.heads.linear import Mean, Ridge
from nh2st_pipe.heads.nh2st import NH2ST
from nh2st_pipe.recipes.train import MeanHead, NH2STHead, RidgeHead, TrainRecipe

__all__ = ["build", "fit", "is_solved", "load_model"]

_KINDS: dict[str, type[HeadModel]] = {"mean": Mean, "ridge": Ridge, "nh2st": NH2ST}


def is_solved(recipe: TrainRecipe) -> bool:
    """Whether the head has a closed form, so that there are no epochs to choose."""
    return not isinstance(recipe.head, NH2STHead)


def build(recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> HeadModel:
    """Return an untrained head for embeddings of `dim` values."""
    head = recipe.head
    scaling: dict[str, Any] = {
        "scale_features": recipe.features.scale == "robust",
        "clip": recipe.features.clip,
    }
    if isinstance(head, MeanHead):
        return Mean(genes, about=about)
    if isinstance(head, RidgeHead):
        return Ridge(dim, genes, context=head.context, alpha=head.alpha, about=about, **scaling)
    return NH2ST(dim, genes, **head.model_dump(), about=about, **scaling)


@dataclass(frozen=True)
class Trained:
    """A trained head and how its training went (no history where it was solved)."""

    model: HeadModel
    best_epoch: int
    history: list[dict[str, float]]


def fit(
    recipe: TrainRecipe,
    train: Samples,
    genes: list[str],
    about: dict[str, Any],
    *,
    watched: Samples | None = None,
    epochs: int | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> Trained:
    """Train a head on `train`.

    With `watched` the best epoch on those samples is kept, and training stops `patience` epochs after it.
    Without, exactly `epochs` epochs are run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build(recipe, train.views.shape[2], genes, about).to(train.views.device)
        if isinstance(model, (Mean, Ridge)):
            model.fit(train)
            return Trained(model, 0, [])
        assert isinstance(model, NH2ST)
        result: Fit = fit_by_steps(
            model, recipe.fit, train, watched, epochs or recipe.fit.epochs, recipe.seed, on_epoch
        )
    return Trained(model, result.best_epoch, result.history)


def load_model(path: str | Path) -> HeadModel:
    """Load a saved head: the folder of a run, its `model/`, or a Hugging Face repository.

    Raises RunError where there is no model, or one of a kind that this version does not know.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    config_file = folder / "config.json"
    if not config_file.is_file():
        if folder.exists():
            raise RunError(f"{path} holds no trained model (no model/config.json); was the training finished?")
        config_file = _hub_config(str(path))
    try:
        kind = json.loads(config_file.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError) as error:
        raise RunError(f"{config_file} is damaged: {error}") from error
    if kind not in _KINDS:
        raise RunError(f"{config_file} describes a head of kind {kind!r}; this version knows {', '.join(_KINDS)}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin announces itself on stdout
            model = _KINDS[kind].from_pretrained(str(folder) if folder.exists() else str(path))
    except Exception as error:  # a truncated weight file, tensors that do not fit
        raise RunError(f"the model at {path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return model.eval()


def _hub_config(repo: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    if repo.count("/") != 1:
        raise RunError(f"there is no run at {repo}")
    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise RunError(
            f"there is no run folder at {repo}, and as a Hugging Face repository it cannot be had: "
            f"{str(error).splitlines()[0]}"
        ) from error
