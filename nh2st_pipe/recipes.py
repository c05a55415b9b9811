"""What each stage does, as typed values read from YAML.

An encoder is an `EncoderRecipe` (stages/embed/*.yaml), a training recipe a `TrainRecipe`
(stages/train/*.yaml). Every field is checked when the value is made and saved with the result, so a store and
a run say completely how they came about. Defaults are written here and nowhere else.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from nh2st_pipe import resources
from nh2st_pipe.core.errors import RecipeError, UsageError, nearest

__all__ = [
    "EncoderRecipe",
    "MeanHead",
    "NH2STHead",
    "Precision",
    "RidgeHead",
    "TargetRecipe",
    "TrainRecipe",
    "load_encoder_recipe",
    "load_train_recipe",
    "validate",
]

Precision = Literal["float32", "bfloat16", "float16"]
Channels = tuple[float, float, float]
Recipe = TypeVar("Recipe", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderRecipe(_Strict):
    """One frozen encoder: where its weights are, how it is built, fed and read."""

    name: str
    """What a store calls it."""
    kind: Literal["timm", "fake"] = "timm"
    """`timm` builds `architecture`; `fake` is the weightless encoder used in tests and dry runs."""
    architecture: str = ""
    """timm's name of the architecture."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture. `mlp_layer` and `act_layer` may be names of timm and torch classes."""
    repo: str | None = None
    """Hugging Face repository of the weights; None where they must be given with --weights."""
    file: str = "model.safetensors"
    """File of the weights in `repo`."""
    revision: str | None = None
    """Commit or tag of `repo`; None takes its main branch. The weights' SHA-256 is recorded either way."""
    url: str | None = None
    """Page where a person gets weights that no hub serves."""
    strip_prefixes: tuple[str, ...] = ()
    """Prefixes taken off the names in the weight file, in this order, each where it is present."""
    drop: tuple[str, ...] = ()
    """Beginnings of names that belong to a head we do not use, dropped from the weight file."""
    pooling: Literal["model", "cls", "mean", "cls+mean", "flatten"] = "model"
    """`model` is the architecture's own pooled output; `cls` the class token; `mean` the mean of the patch
    tokens; `cls+mean` both; `flatten` the whole feature map."""
    dim: int = Field(gt=0)
    """Values per tile, checked against what the encoder returns."""
    input_px: int = Field(224, gt=0)
    """Side of the encoder's input, px."""
    mpp: float = Field(0.5, gt=0)
    """Resolution the encoder expects, µm per px; `input_px · mpp` is the default tile size."""
    mean: Channels = (0.485, 0.456, 0.406)
    """Per channel, RGB, of values in 0..1."""
    std: Channels = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Filter used when a tile is resampled to `input_px`; always antialiased."""
    precision: Precision = "float32"
    """Arithmetic on a GPU with `--precision auto`; a CPU always takes float32 then."""
    licence: str = "unknown"
    gated: bool = False
    """Whether the hub asks for an agreement first."""
    paper: str = ""
    note: str = ""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers: two stores may mix only where all of them agree."""
        about = {"repo", "file", "revision", "url", "licence", "gated", "paper", "note", "precision"}
        return self.model_dump(mode="json", exclude=about)


class TargetRecipe(_Strict):
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


class FeatureRecipe(_Strict):
    """How kept embeddings reach a head."""

    scale: Literal["robust", "none"] = "robust"
    """`robust`: (x − mean) / max(std, 0.1 · median std), fitted on the training slides."""
    clip: float = Field(8.0, gt=0)
    """Scaled values are clipped at ± this."""
    views: Literal["all", "first"] = "all"
    """`all`: the dihedral views are augmentation in training and averaged at prediction."""
    neighbours: int = Field(9, ge=1)
    """Spots in a neighbourhood, the spot itself among them; at most what the store keeps."""


class FitRecipe(_Strict):
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


class MeanHead(_Strict):
    """Predict each gene's mean over the training spots: the floor under every error."""

    kind: Literal["mean"]


class RidgeHead(_Strict):
    """Ridge regression in closed form."""

    kind: Literal["ridge"]
    context: bool = False
    """Whether the mean embedding of the spot's neighbourhood stands beside its own."""
    alpha: float = Field(3000.0, gt=0)
    """Penalty per view: the objective is Σ‖y − xW‖² + alpha · views · ‖W‖² over all spots and views."""


class NH2STHead(_Strict):
    """NH2ST (Qu et al., MICCAI 2025, arXiv 2506.23827) on frozen embeddings."""

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


class TrainRecipe(_Strict):
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


def _faults(error: pydantic.ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for fault in error.errors():
        # The second part under `head` is pydantic's own: which kind of head it tried.
        loc = fault["loc"][:1] + fault["loc"][2:] if fault["loc"][:1] == ("head",) else fault["loc"]
        where = ".".join(str(part) for part in loc)
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such key{nearest(str(fault['loc'][-1]), _keys(model))}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: is missing")
        else:
            lines.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]} (got {fault['input']!r})")
    return "; ".join(lines)


def _keys(annotation: Any) -> set[str]:
    """Every field name in a model and the models inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return set(fields) | {key for f in fields.values() for key in _keys(f.annotation)}
    return {key for part in typing.get_args(annotation) for key in _keys(part)}


def validate(model: type[Recipe], data: dict[str, Any], where: str | Path) -> Recipe:
    """Return `data` as a checked `model`. Raises RecipeError naming each key at fault, and `where` it stands."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {_faults(error, model)}") from error


def load_encoder_recipe(name: str | Path) -> EncoderRecipe:
    """Return the encoder recipe called `name`, or the one in the YAML file `name`."""
    path = resources.find("stages/embed", name)
    return validate(EncoderRecipe, resources.load_yaml(path), path.name)


def load_train_recipe(name: str | Path, settings: Iterable[str] = ()) -> TrainRecipe:
    """Return the training recipe called `name` (or in the file `name`) with `settings` applied.

    A setting is "key=value" with a dotted key ("head.dropout=0.3"); the value is read as YAML.
    """
    path = resources.find("stages/train", name)
    data = resources.load_yaml(path)
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
