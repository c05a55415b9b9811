"""Encoders whose authors publish them as a package of Python, and in no other way: one short adapter each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nh2st_pipe.core.errors import EncoderError
from nh2st_pipe.core.quiet import quiet_warnings

if TYPE_CHECKING:
    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["check_installed", "load_package"]

Forward = Callable[[Any, torch.Tensor], Any]


class _Adapted(nn.Module):
    """A package's model, and how it is asked for embeddings b × d."""

    def __init__(self, model: nn.Module, ask: Forward) -> None:
        super().__init__()
        self.model, self._ask = model, ask

    def forward(self, images: torch.Tensor) -> Any:
        return self._ask(self.model, images)


def _conch(weights: Path) -> _Adapted:
    package: Any = importlib.import_module("conch.open_clip_custom")
    model, _ = package.create_model_from_pretrained("conch_ViT-B-16", str(weights))
    return _Adapted(model, lambda of, images: of.encode_image(images, proj_contrast=False, normalize=False))


def _musk(weights: Path) -> _Adapted:
    import timm

    importlib.import_module("musk.modeling")  # tells timm of its architectures
    tools: Any = importlib.import_module("musk.utils")
    model: Any = timm.create_model("musk_large_patch16_384")
    tools.load_model_and_may_interpolate(str(weights), model, "model|module", "")
    options = {"with_head": False, "out_norm": False, "ms_aug": False, "return_global": True}
    return _Adapted(model, lambda of, images: of(image=images, **options)[0])


def _genbio_pathfm(weights: Path) -> _Adapted:
    package: Any = importlib.import_module("genbio_pathfm.model")
    return _Adapted(package.GenBio_PathFM_Inference(str(weights), device="cpu"), lambda of, images: of(images))


_ADAPTERS: Mapping[str, Callable[[Path], _Adapted]] = {
    "conch": _conch,
    "musk": _musk,
    "genbio_pathfm": _genbio_pathfm,
}


def check_installed(recipe: EncoderRecipe) -> None:
    """Raise EncoderError where the package that a recipe names is not there."""
    assert recipe.package is not None
    if importlib.util.find_spec(recipe.package) is None:
        raise EncoderError(
            f"encoder {recipe.name} needs its authors' package {recipe.package}: {recipe.url} says how to install it"
        )


def load_package(recipe: EncoderRecipe, weights: Path) -> nn.Module:
    """Load the weights in the file `weights` with the package that the recipe names.

    Raises EncoderError where the package is not installed, or fails.
    """
    assert recipe.package is not None
    if recipe.package not in sys.modules:
        check_installed(recipe)
    try:
        with quiet_warnings():
            return _ADAPTERS[recipe.package](weights)
    except ModuleNotFoundError as error:
        raise EncoderError(f"the package {recipe.package} needs another one: {error}") from error
    except Exception as error:  # it is somebody's code
        raise EncoderError(f"the package {recipe.package} failed: {type(error).__name__}: {error}") from error
