"""Whether code that an encoder's repository brings along may run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import EncoderError, UsageError

if TYPE_CHECKING:
    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["check_pinned", "check_trust"]


def check_trust(recipe: EncoderRecipe, trust_remote_code: bool) -> None:
    """Raise UsageError where an encoder runs code of its repository, and nobody has said that it may; EncoderError
    where nothing can be run, for its name alone is known.
    """
    if recipe.kind == "imported":
        raise EncoderError(
            f"encoder {recipe.name} is known by its name alone, from features that were imported: nothing can be "
            "encoded with it here; give a recipe of it with --encoder FILE.yaml"
        )
    if recipe.kind == "python" and recipe.beside is None:
        raise UsageError(
            f"encoder {recipe.name} is built by code of its own, {recipe.builder}: name it with embed --encoder (its "
            "recipe, or FILE.py:FUNCTION), for no code runs because a store or a model names it"
        )
    if recipe.kind == "remote" and not trust_remote_code:
        raise UsageError(
            f"encoder {recipe.name} runs the code in its repository {recipe.repo}: read it there, and allow it with "
            "--trust-remote-code"
        )


def check_pinned(recipe: EncoderRecipe) -> None:
    """Raise UsageError where code would be fetched of which nobody has said which version of it may run."""
    if recipe.kind == "remote" and not recipe.pinned:
        raise UsageError(
            f"encoder {recipe.name} runs the code in its repository {recipe.repo}, which may be another tomorrow: read "
            f"it at huggingface.co/{recipe.repo}/commits/main, and name the commit that you have read, its 40 "
            f"hexadecimal digits, as --encoder {recipe.name}@<commit>, or as revision in a recipe of your own"
        )
