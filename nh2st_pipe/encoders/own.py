"""Encoders of somebody's own: a function in a file or a module, named by whoever calls."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import EncoderError, RecipeError, reason_of
from nh2st_pipe.recipes import plugins

if TYPE_CHECKING:
    from torch import nn

    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["built", "code_sha256"]


def built(recipe: EncoderRecipe, weights: Path | None) -> nn.Module:
    """Return the module that a recipe's builder gives. Raises EncoderError where it gives none."""
    from torch import nn

    builder = _builder(recipe)
    try:
        module = builder.what(recipe, weights)
    except Exception as error:
        raise EncoderError(f"encoder {recipe.name}: {recipe.builder} failed: {reason_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise EncoderError(
            f"encoder {recipe.name}: {recipe.builder} returned {type(module).__name__}; a torch module is expected"
        )
    return module


def code_sha256(recipe: EncoderRecipe) -> str:
    """Return the SHA-256 of the file that a recipe's builder is in. Raises EncoderError where it cannot be loaded."""
    try:
        return hashlib.sha256(Path(inspect.getfile(_builder(recipe).what)).read_bytes()).hexdigest()
    except (OSError, TypeError) as error:
        raise EncoderError(f"encoder {recipe.name}: {recipe.builder} is no function of a file of Python") from error


def _builder(recipe: EncoderRecipe) -> plugins.Plugged:
    assert recipe.builder is not None
    module, _, name = recipe.builder.rpartition(":")
    reference = f"{(recipe.beside or Path()) / module}:{name}" if module.endswith(".py") else recipe.builder
    try:
        found = plugins.plugged(plugins.ENCODERS, reference)
    except RecipeError as error:
        raise EncoderError(f"encoder {recipe.name}: {error}") from error
    if found is None or not callable(found.what):
        raise EncoderError(f"encoder {recipe.name}: {recipe.builder} is no function")
    return found
