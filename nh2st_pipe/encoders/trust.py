"""Whether code that an encoder's repository brings along may run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import UsageError

if TYPE_CHECKING:
    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["check_trust"]


def check_trust(recipe: EncoderRecipe, trust_remote_code: bool) -> None:
    """Raise UsageError where an encoder runs code of its repository, and nobody has said that it may."""
    if recipe.kind == "remote" and not trust_remote_code:
        raise UsageError(
            f"encoder {recipe.name} runs the code in its repository {recipe.repo}: read it there, and allow it with "
            "--trust-remote-code"
        )
