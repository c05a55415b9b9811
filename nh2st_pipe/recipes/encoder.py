"""An encoder as data (stages/embed/*.yaml): where its weights are, how it is built, fed and read.

Defaults are written here and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import to_jsonable_python

from nh2st_pipe.core.errors import RecipeError, nearest, reason_of
from nh2st_pipe.recipes import files, plugins
from nh2st_pipe.recipes.plugins import by_reference
from nh2st_pipe.recipes.values import Strict, validate

__all__ = ["EncoderRecipe", "Precision", "encoder_names", "load_encoder_recipe"]

Precision = Literal["float32", "bfloat16", "float16"]

Channels = tuple[float, float, float]


_IDENTITY = (
    "name",
    "kind",
    "architecture",
    "arguments",
    "strip_prefixes",
    "drop",
    "pooling",
    "dim",
    "input_px",
    "mpp",
    "mean",
    "std",
    "interpolation",
    "layout",
    "method",
    "package",
    "autocast",
)
"""The fields that decide the numbers. A field that is added here later has its default in older stores."""


_OF_TIMM = frozenset(
    [
        "act_layer",
        "class_token",
        "depth",
        "depths",
        "dynamic_img_pad",
        "dynamic_img_size",
        "embed_layer",
        "embed_dim",
        "fc_norm",
        "final_norm",
        "global_pool",
        "img_size",
        "init_values",
        "mlp_layer",
        "mlp_ratio",
        "no_embed_class",
        "norm_layer",
        "num_heads",
        "patch_size",
        "pos_embed",
        "pre_norm",
        "qk_norm",
        "qkv_bias",
        "reg_tokens",
        "scale_attn_norm",
        "scale_mlp_norm",
        "strict_img_size",
        "window_size",
    ]
)
"""What a recipe may give an architecture: sizes and parts. Nothing that names a file, a place or code."""

_OF_TRANSFORMERS = frozenset(
    [
        "attention_bias",
        "hidden_act",
        "hidden_size",
        "image_size",
        "intermediate_size",
        "layer_norm_eps",
        "layerscale_value",
        "mlp_ratio",
        "num_attention_heads",
        "num_hidden_layers",
        "num_register_tokens",
        "patch_size",
        "qkv_bias",
        "use_swiglu_ffn",
    ]
)
"""The same for architectures of transformers: fields of their configuration."""

_KNOWN_TO_TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers")

_ARCHITECTURE = r"^([a-z0-9_]+(\.[a-z0-9_]+)*)?$"  # timm's names; those with : or / would be fetched from the network


class EncoderRecipe(Strict):
    """One frozen encoder: where its weights are, how it is built, fed and read."""

    name: str
    """What a store calls it."""
    kind: Literal["timm", "transformers", "remote", "package", "python", "fake", "imported"] = "timm"
    """`timm` builds `architecture`, and so does `transformers`; `remote` runs the code in `repo`, where that is
    allowed; `package` calls the authors' own; `python` calls `builder`; `fake` is the weightless encoder used in tests
    and dry runs; `imported` is known by its name alone, from a tool whose features were imported: nothing can be
    encoded with it."""
    architecture: str = Field("", pattern=_ARCHITECTURE)
    """timm's name of the architecture (small letters, digits and _; never a place to fetch it from); of transformers,
    `vit`, `dinov2` or `dinov2_with_registers`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture, of a list of its sizes and parts. `mlp_layer` and `act_layer` may be names of timm
    and torch classes."""
    layout: Literal["timm", "original"] = "timm"
    """How the tensors in the weight file are named: as timm does, or as the authors of the architecture (DINOv2, Swin)
    do, which timm knows to convert."""
    method: Literal["forward", "encode_image", "return_conch"] = "forward"
    """Of `remote`: what is asked for the embedding; `forward` gives the pooled output."""
    package: Literal["conch", "musk", "genbio_pathfm"] | None = None
    """Of `package`: which."""
    builder: str | None = None
    """Of `python`: a function that gives the encoder, "package.module:function" or "file.py:function", the file beside
    the recipe. It is called with the recipe and the weights' file (None without one), and returns a torch module:
    images b × 3 × h × w to embeddings b × dim."""
    beside: Path | None = Field(None, exclude=True)
    """Of `python`: the folder in which the builder's file is. It is no part of what is kept: code runs where whoever
    calls has named it, and not because a store does."""
    repo: str | None = None
    """Hugging Face repository of the weights; None where they must be given with --weights."""
    file: str = "model.safetensors"
    """File of the weights in `repo`."""
    revision: str | None = None
    """Commit or tag of `repo`; None takes its main branch. The weights' SHA-256 is recorded either way. Of `remote` it
    has to be a commit (40 hexadecimal digits), and is a part of the identity."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weights' file, where another one is to be refused."""
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
    autocast: bool = False
    """Whether half precision is by autocast (weights stay in float32, and torch chooses what is computed in half
    precision) and not by weights in half precision, which is faster."""
    parameters: float | None = Field(None, gt=0)
    """Millions of weights, without a head."""
    licence: str = "unknown"
    """Of the weights, as published."""
    commercial: bool | None = None
    """Whether that allows commercial use; None where its terms have to be read."""
    gated: bool = False
    """Whether the hub asks for an agreement first."""
    paper: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _of_its_kind(self) -> EncoderRecipe:
        allowed = _OF_TRANSFORMERS if self.kind == "transformers" else _OF_TIMM
        for key in self.arguments:
            if key not in allowed:
                hint = nearest(key, allowed)
                raise ValueError(
                    f"arguments: '{key}' is no argument that a recipe may give{hint} (it may: "
                    f"{', '.join(sorted(allowed))})"
                )
        if self.kind == "transformers" and self.architecture not in _KNOWN_TO_TRANSFORMERS:
            raise ValueError(f"architecture: of transformers it is one of {', '.join(_KNOWN_TO_TRANSFORMERS)}")
        if self.kind == "remote" and self.repo is None:
            raise ValueError("repo: a recipe of the kind remote names the repository whose code it runs")
        if self.kind == "package" and self.package is None:
            raise ValueError("package: a recipe of the kind package names it")
        if (self.kind == "python") != (self.builder is not None):
            raise ValueError("builder: a recipe of the kind python names it, and no other does")
        if self.builder is not None and not by_reference(self.builder):
            raise ValueError('builder: "package.module:function" or "file.py:function" is expected')
        return self

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers: two stores may mix only where all of them agree."""
        own_code = {"remote": {"revision"}, "python": {"builder"}}.get(self.kind, set())
        return self.model_dump(mode="json", include=set(_IDENTITY) | own_code)

    @property
    def pinned(self) -> bool:
        """Whether `revision` is a commit, which means the same for ever."""
        return self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision) is not None

    @classmethod
    def default_of(cls, key: str) -> Any:
        """Return what a field is where it is not given, as JSON; None for one that has no default or is unknown.

        A store made before a field existed has its default.
        """
        field = cls.model_fields.get(key)
        if field is None or field.is_required():
            return None
        return to_jsonable_python(field.get_default(call_default_factory=True))


def load_encoder_recipe(name: str | Path) -> EncoderRecipe:
    """Return the encoder recipe called `name`, or in the YAML file `name`; "name@<commit>" pins its `revision`."""
    if (ours := str(name)) not in files.names("stages/embed") and not ours.endswith((".yaml", ".yml")):
        if by_reference(ours) and ours.rpartition(":")[0].endswith(".py"):
            return _built_by(ours)
        if (plugged := plugins.plugged(plugins.ENCODERS, ours, files.names("stages/embed"))) is not None:
            return _of_package(ours, plugged)
    found = re.fullmatch("(.+)@([0-9a-f]{40})", str(name))
    path = files.find("stages/embed", found.group(1) if found else name)
    pinned = {"revision": found.group(2)} if found else {}
    return _named(validate(EncoderRecipe, files.load_yaml(path) | pinned, path.name), path.parent)


def encoder_names() -> list[str]:
    """Return the names that `load_encoder_recipe` knows: our recipes, and encoders that packages register."""
    ours = files.names("stages/embed")
    return [*ours, *plugins.registered(plugins.ENCODERS, ours)]


def _built_by(reference: str) -> EncoderRecipe:
    """Return the recipe of "my_encoder.py:build": my_encoder.yaml beside it, or the one there that is called so."""
    module, _, function = reference.rpartition(":")
    file = Path(module).expanduser()
    recipe = file.with_suffix(".yaml")
    for each in (file, recipe):
        if not each.is_file():
            raise RecipeError(
                f"there is no file {each}: an encoder of your own is {file.name} and its recipe {recipe.name}"
            )
    values = {"kind": "python", **files.load_yaml(recipe), "builder": f"{file.name}:{function}"}
    return _named(validate(EncoderRecipe, values, recipe.name), file.parent)


def _of_package(name: str, plugged: plugins.Plugged) -> EncoderRecipe:
    """Return the recipe that a package registers: a function that gives its fields, or the path of a YAML file."""
    try:
        made = plugged.what() if callable(plugged.what) else plugged.what
        values = files.load_yaml(Path(made)) if isinstance(made, str | Path) else dict(made)
    except Exception as error:
        raise RecipeError(f"encoder '{name}' of {plugged.source} cannot be had: {reason_of(error)}") from error
    recipe = validate(EncoderRecipe, {"kind": "python", **values}, f"encoder '{name}' of {plugged.source}")
    if recipe.name != name:
        raise RecipeError(f"{plugged.source} registers encoder '{name}', and its recipe is called '{recipe.name}'")
    return _named(recipe, Path())


def _named(recipe: EncoderRecipe, folder: Path) -> EncoderRecipe:
    return recipe.model_copy(update={"beside": folder.absolute()}) if recipe.kind == "python" else recipe
