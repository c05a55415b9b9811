"""Where an encoder's weight file is: given by the user, or in the Hugging Face cache or hub.

Kept apart from `encoders` so that a store can be checked against its weights without importing torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nh2st_pipe.core.errors import EncoderError, UsageError
from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["Weights", "find_weights"]


@dataclass(frozen=True)
class Weights:
    """A weight file (None for an encoder without weights), its SHA-256, and where it came from."""

    path: Path | None
    sha256: str
    source: str


def find_weights(recipe: EncoderRecipe, given: Path | None) -> Weights:
    """Return the weights of `recipe`: the file `given`, else the recipe's file on the hub (cached there).

    Raises EncoderError with the actual cause where they cannot be had.
    """
    if recipe.kind == "fake":
        if given is not None:
            raise UsageError(f"encoder {recipe.name} has no weights; leave --weights out")
        return Weights(None, "none", "built in")
    if given is not None:
        if not given.is_file():
            raise UsageError(f"there is no weight file at {given}")
        return Weights(given, _sha256(given), given.name)
    if recipe.repo is None:
        where = f"; get them from {recipe.url}" if recipe.url else ""
        raise EncoderError(f"the weights of {recipe.name} are on no hub{where} and give their file with --weights")
    path = _from_hub(recipe, recipe.repo)
    return Weights(path, _sha256(path), f"hf-hub:{recipe.repo}@{recipe.revision or 'main'}/{recipe.file}")


def _from_hub(recipe: EncoderRecipe, repo: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = f"{repo}@{recipe.revision}" if recipe.revision else repo
    try:
        return Path(hf_hub_download(repo, recipe.file, revision=recipe.revision))
    except errors.GatedRepoError as error:
        raise EncoderError(
            f"{repo} is gated: agree to its terms at huggingface.co/{repo}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise EncoderError(f"{repo} has no revision '{recipe.revision}'; check the recipe of {recipe.name}") from error
    except errors.RepositoryNotFoundError as error:
        raise EncoderError(
            f"the hub knows no {repo}, or it is private and no token was given (`hf auth login`, HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise EncoderError(
            f"{recipe.file} of {at} is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set); connect, or give the weight file with --weights"
        ) from error
    except errors.EntryNotFoundError as error:
        raise EncoderError(f"{at} holds no file {recipe.file}; check the recipe of {recipe.name}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise EncoderError(f"{recipe.file} of {at} could not be downloaded: {str(error).splitlines()[0]}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
