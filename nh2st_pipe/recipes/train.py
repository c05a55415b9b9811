"""One way of training as data (stages/train/*.yaml): targets, features, head, protocol, baselines.

Every field is checked when the value is made and saved with the run. Defaults are written here and nowhere else.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import Field

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.values import Strict, validate

__all__ = ["HEADS", "MeanHead", "NH2STHead", "RidgeHead", "TargetRecipe", "TrainRecipe", "load_train_recipe"]


class TargetRecipe(Strict):
    """What is predicted: which genes, and what is done to their counts (Qu et al. 2025)."""

    genes: Annotated[int, Field(gt=0)] | tuple[str, ...] = 250
    """Size of the panel chosen on the training slides, or the panel itself."""
    panel: Literal["mean"] = "mean"
    """Rule of the choice: the highest mean raw count over all training spots."""
    scale_to: float | None = Field(10_000.0, gt=0)
    """Each spot's counts are scaled to this sum over the panel; None leaves them."""
    log: Literal["log10", "log1p", "none"] = "log10"
    """`log10(x + 1)`, `ln(x + 1)`, or nothing."""
    smooth: Literal["grid8", "none"] = "grid8"
    """`grid8` takes the mean over a spot and its neighbours with |Δrow| ≤ 1 and |Δcol| ≤ 1."""


class FeatureRecipe(Strict):
    """How kept embeddings reach a head."""

    scale: Literal["robust", "none"] = "robust"
    """`robust`: (x − mean) / max(std, 0.1 · median std), fitted on the training slides."""
    clip: float = Field(8.0, gt=0)
    """Scaled values are clipped at ± this."""
    views: Literal["all", "first"] = "all"
    """`all`: the dihedral views are augmentation in training and averaged at prediction."""
    neighbours: int = Field(9, ge=1)
    """Spots in a neighbourhood, the spot itself among them; at most what the store keeps."""


class FitRecipe(Strict):
    """How a head that learns by steps is trained."""

    epochs: int = Field(200, gt=0)
    """Most epochs, one of which shows every training spot once, in one view drawn at random."""
    patience: int = Field(20, gt=0)
    """Epochs without a better `select_by` on the held-out slides before training stops."""
    select_by: Literal["pcc", "mse"] = "pcc"
    """What the best epoch is the best of: mean per-gene PCC, or mean squared error."""
    batch_size: int = Field(8, gt=1)
    lr: float = Field(5e-4, gt=0)
    lr_step: int = Field(50, gt=0)
    """The learning rate is multiplied by `lr_gamma` every so many epochs."""
    lr_gamma: float = Field(0.9, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0)


class HeadRecipe(Strict):
    """What every head's fields have in common."""

    model: ClassVar[str]
    """The head's class, "module:class"; imported when it is built or loaded."""


class MeanHead(HeadRecipe):
    """Predict each gene's mean over the training spots: the floor under every error."""

    model: ClassVar[str] = "nh2st_pipe.heads.linear:Mean"
    kind: Literal["mean"]


class RidgeHead(HeadRecipe):
    """Ridge regression in closed form."""

    model: ClassVar[str] = "nh2st_pipe.heads.linear:Ridge"
    kind: Literal["ridge"]
    context: bool = False
    """Whether the mean embedding of the spot's neighbourhood stands beside its own."""
    alpha: float = Field(3000.0, gt=0)
    """Penalty per view: the objective is Σ‖y − xW‖² + alpha · views · ‖W‖² over all spots and views."""


class NH2STHead(HeadRecipe):
    """NH2ST (Qu et al., MICCAI 2025, arXiv 2506.23827) on frozen embeddings."""

    model: ClassVar[str] = "nh2st_pipe.heads.nh2st:NH2ST"
    kind: Literal["nh2st"]
    width: int = Field(512, gt=0)
    """d: size of the embeddings that are compared."""
    hidden: int = Field(1024, gt=0)
    """Size between the two hypergraph convolutions."""
    decoder_hidden: int = Field(256, gt=0)
    heads: int = Field(8, gt=0)
    depth: int = Field(1, gt=0)
    """Cross-attention blocks, shared by the query and the neighbour pair."""
    mlp_ratio: float = Field(1.0, gt=0)
    dropout: float = Field(0.5, ge=0, lt=1)
    """In the attention and its MLP."""
    similar: int = Field(3, ge=1)
    """Most similar spots that join a spot's hyperedge."""
    temperature: float = Field(0.05, gt=0)
    off_diagonal: float = Field(0.1, ge=0)
    """Factor on the logits of pairs that do not belong together."""
    query_weight: float = Field(1.0, ge=0)
    neighbour_weight: float = Field(0.5, ge=0)


Head = Annotated[MeanHead | RidgeHead | NH2STHead, Field(discriminator="kind")]
HEADS: dict[str, type[HeadRecipe]] = {
    typing.get_args(head.model_fields["kind"].annotation)[0]: head for head in typing.get_args(typing.get_args(Head)[0])
}
"""Every head by its kind."""


class TrainRecipe(Strict):
    """One way of training: targets, features, head, protocol, and the baselines reported beside it."""

    name: str
    about: str = ""
    targets: TargetRecipe = Field(default_factory=TargetRecipe)
    features: FeatureRecipe = Field(default_factory=FeatureRecipe)
    head: Head
    fit: FitRecipe = Field(default_factory=FitRecipe)
    """Without effect for heads solved in closed form."""
    protocol: Literal["nested", "paper"] = "nested"
    """`nested`: panel, scaling and epochs come from the training slides alone. `paper`: the panel comes from
    all slides and the best epoch from the test fold, as in published tables."""
    baselines: tuple[str, ...] = ()
    """Names of recipes trained on the same folds and targets, for comparison."""
    folds: str = "patient"
    """`patient` or `slide` leaves one out in turn; a number makes that many folds of patients; `none` judges
    nothing."""
    seed: int = 2021


def load_train_recipe(name: str | Path, settings: Iterable[str] = ()) -> TrainRecipe:
    """Return the training recipe called `name` (or in the file `name`) with `settings` applied.

    A setting is "key=value" with a dotted key ("head.dropout=0.3"); the value is read as YAML.
    """
    path = files.find("stages/train", name)
    data = files.load_yaml(path)
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise UsageError(f"--set takes key=value (for example fit.epochs=50), not '{setting}'")
        *parents, leaf = key.strip().split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {setting}: '{parent}' is a value, not a group of keys")
        try:
            place[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: '{value}' is not a YAML value") from error
    return validate(TrainRecipe, data, path.name)
