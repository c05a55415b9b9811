"""From a recipe and a weight file to an encoder on a device.

timm is imported when an encoder is built. Weight files are read without unpickling code (safetensors, or
`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nh2st_pipe.core.errors import EncoderError, listed, nearest, reason_of
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.encoders.fake import FakeBackbone
from nh2st_pipe.encoders.own import built
from nh2st_pipe.encoders.trust import check_trust

if TYPE_CHECKING:
    from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision

__all__ = ["build_backbone", "load_encoder"]

# Classes that recipes may name in `arguments`; nothing else is looked up.
_CLASSES = {
    "SwiGLUPacked": ("timm.layers", "SwiGLUPacked"),
    "SiLU": ("torch.nn", "SiLU"),
    "GELU": ("torch.nn", "GELU"),
    "ConvStem": ("nh2st_pipe.encoders.stems", "ConvStem"),
}


def load_encoder(
    recipe: EncoderRecipe,
    weights: Path | None,
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
    trust_remote_code: bool = False,
    compiled: bool = False,
) -> Encoder:
    """Build the recipe's encoder with the weights in the file `weights` (None for an encoder without weights).

    `compiled` has torch compile it.

    Code that a repository brings along is run where `trust_remote_code` says so. Raises EncoderError where the
    architecture is not known or the weights do not fit it.
    """
    device = device or torch.device("cpu")
    if recipe.kind == "fake":
        return Encoder(recipe, FakeBackbone(), device, precision, compiled=compiled)
    check_trust(recipe, trust_remote_code)
    if recipe.kind == "python":
        return Encoder(recipe, built(recipe, weights), device, precision, compiled=compiled)
    if weights is None:
        build_backbone(recipe)  # what is wrong with the recipe comes first
        raise EncoderError(f"encoder {recipe.name} has no weights; give their file with --weights")
    return Encoder(recipe, _with_weights(recipe, weights), device, precision, compiled=compiled)


def _with_weights(recipe: EncoderRecipe, weights: Path) -> nn.Module:
    if recipe.kind == "remote":
        from nh2st_pipe.encoders.transformers import load_remote

        return load_remote(recipe, weights)
    if recipe.kind == "package":
        from nh2st_pipe.encoders.packages import load_package

        return load_package(recipe, weights)
    if recipe.kind == "transformers":
        from nh2st_pipe.encoders.transformers import load_known

        model, faults = load_known(recipe, _named(recipe, weights))
        if faults or model is None:
            raise _unfit(recipe, weights, faults)
        return model
    backbone = build_backbone(recipe)
    _load_weights(backbone, recipe, weights)
    return backbone


def build_backbone(recipe: EncoderRecipe) -> nn.Module:
    """Return the recipe's architecture with random weights, on torch's present default device.

    Raises EncoderError where it cannot be built, or is not known before its authors' code is asked.
    """
    if recipe.kind == "transformers":
        from nh2st_pipe.encoders.transformers import build_known

        return build_known(recipe)
    if recipe.kind in ("remote", "package"):
        raise EncoderError(f"what encoder {recipe.name} is made of is in its authors' code alone")
    import timm

    if not timm.is_model(recipe.architecture):
        near = nearest(recipe.architecture, timm.list_models())
        raise EncoderError(f"timm knows no architecture '{recipe.architecture}' (encoder {recipe.name}){near}")
    arguments = {key: _argument(value) for key, value in recipe.arguments.items()}
    try:
        backbone: nn.Module = timm.create_model(recipe.architecture, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(f"timm cannot build {recipe.architecture} for encoder {recipe.name}: {error}") from error
    return backbone


def _argument(value: Any) -> Any:
    if isinstance(value, str) and value in _CLASSES:
        module, name = _CLASSES[value]
        return getattr(importlib.import_module(module), name)
    return value


def _load_weights(backbone: nn.Module, recipe: EncoderRecipe, path: Path) -> None:
    """Load `path` into `backbone`; every tensor must be there with its shape, and no other."""
    state = _named(recipe, path)
    if recipe.layout == "original":
        convert = sys.modules[type(backbone).__module__].checkpoint_filter_fn
        with quiet_warnings():
            state = {name: tensor for name, tensor in convert(state, backbone).items() if name != "mask_token"}
    own = backbone.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [f"missing: {listed(missing, 3)}"] if missing else []
    faults += [f"unknown: {listed(unknown, 3)}"] if unknown else []
    faults += [f"of another shape: {listed(shapes, 3)}"] if shapes else []
    if faults:
        raise _unfit(recipe, path, faults)
    backbone.load_state_dict(state, strict=False)


def _unfit(recipe: EncoderRecipe, path: Path, faults: list[str]) -> EncoderError:
    return EncoderError(
        f"{path} does not fit encoder {recipe.name} ({recipe.architecture}); tensors {'; '.join(faults)}. "
        "Is it the file of another encoder?"
    )


def _named(recipe: EncoderRecipe, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in `path` that the recipe wants, with their prefixes taken off."""
    state = {}
    for name, tensor in _read_tensors(path).items():
        for prefix in recipe.strip_prefixes:
            name = name.removeprefix(prefix)
        if not name.startswith(recipe.drop):
            state[name] = tensor
    return state


def _no_weights(path: Path) -> str | None:
    """Return in words what a file is that was taken for weights: a page or a pointer saved in their place."""
    with path.open("rb") as file:
        begins = file.read(512).lstrip().lower()
    if begins.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it points to; fetch them with `git lfs pull`, or from the hub"
    if begins.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not weights: was it saved from a page that asks to log in?"
    return None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    wrong = _no_weights(path)
    if wrong:
        raise EncoderError(f"{path} {wrong}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            begins = file.read(2)
        if not begins.startswith((b"PK", b"\x80")):  # neither a zip nor a pickle
            raise EncoderError(f"{path} cannot be read as weights: it is no file of torch's") from error
        raise EncoderError(
            f"{path} holds more than tensors, and code in a pickle is never run here; convert it to .safetensors"
        ) from error
    except Exception as error:  # safetensors and torch raise many kinds for a broken file
        raise EncoderError(f"{path} cannot be read as weights: {reason_of(error)}") from error
    while isinstance(loaded, dict):
        nested = next((loaded[key] for key in ("state_dict", "model", "teacher") if key in loaded), None)
        if not isinstance(nested, dict):
            break
        loaded = nested
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise EncoderError(f"{path} does not hold a state dict (names and tensors)")
    return loaded
