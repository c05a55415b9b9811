"""Where an encoder's weight file is: given by the user, or in the Hugging Face cache or hub.

Kept apart from `encoders` so that a store can be checked against its weights without importing torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nh2st_pipe.core.errors import EncoderError, HubError, UsageError
from nh2st_pipe.core.hashes import remembered_sha256
from nh2st_pipe.encoders.own import code_sha256
from nh2st_pipe.encoders.trust import check_pinned, check_trust
from nh2st_pipe.recipes.encoder import EncoderRecipe
from nh2st_pipe.store.format import Contract

__all__ = ["Weights", "find_weights", "known_weights"]


@dataclass(frozen=True)
class Weights:
    """A weight file (None for an encoder without weights), its SHA-256, and where it came from.

    Of an encoder that brings its own code it is the SHA-256 of both: of the weights, and of the code beside them.
    """

    path: Path | None
    sha256: str
    source: str


def known_weights(recipe: EncoderRecipe, given: Path | None, store: Contract | None) -> Weights | None:
    """Return what a store says of its weights, without a file: enough until something is encoded.

    None where they have to be looked at: a file is given, or the store is another encoder's.
    """
    if given is not None or store is None or store.identity != recipe.identity():
        return None
    return Weights(None, store.weights.sha256, store.weights.source)


def find_weights(recipe: EncoderRecipe, given: Path | None, trust_remote_code: bool = False) -> Weights:
    """Return the weights of `recipe`: the file `given`, else the recipe's file on the hub (cached there).

    Raises EncoderError with the actual cause where they cannot be had, UsageError where code would have to be trusted.
    """
    check_trust(recipe, trust_remote_code)
    if recipe.kind == "fake":
        if given is not None:
            raise UsageError(f"encoder {recipe.name} has no weights; leave --weights out")
        return Weights(None, "none", "built in")
    if given is not None:
        if not given.is_file():
            raise UsageError(f"there is no weight file at {given}")
        return Weights(given, _sha256(given, recipe), given.name)
    if recipe.kind == "python" and recipe.repo is None and recipe.url is None:  # its builder needs no file, or knows it
        return Weights(None, code_sha256(recipe), f"built by {recipe.builder}")
    check_pinned(recipe)
    if recipe.repo is None:
        where = f"; get them from {recipe.url}" if recipe.url else ""
        raise EncoderError(f"the weights of {recipe.name} are on no hub{where} and give their file with --weights")
    from nh2st_pipe.core.hub import fetch, fetch_folder

    try:
        if recipe.kind == "remote":
            path = fetch_folder(recipe.repo, ["*.json", "*.py", recipe.file], recipe.revision) / recipe.file
        else:
            path = fetch(recipe.repo, recipe.file, recipe.revision)
    except HubError as error:
        raise EncoderError(f"{error}; or give the weight file of {recipe.name} with --weights") from error
    return Weights(path, _sha256(path, recipe), f"hf-hub:{recipe.repo}@{recipe.revision or 'main'}/{recipe.file}")


def _sha256(path: Path, recipe: EncoderRecipe) -> str:
    found = remembered_sha256(path, path.with_name(f".{path.name}.sha256.json"))
    if recipe.sha256 not in (None, found):
        raise EncoderError(
            f"{path} has the SHA-256 {found}, and the recipe of {recipe.name} expects {recipe.sha256}: it is another "
            "file, or was damaged on its way"
        )
    if recipe.kind == "python":
        return hashlib.sha256(f"{found} {code_sha256(recipe)}".encode()).hexdigest()
    if recipe.kind != "remote":
        return found
    both = hashlib.sha256(found.encode())
    for file in sorted(each for each in path.parent.iterdir() if each.suffix in (".py", ".json")):
        if not file.name.startswith("."):
            both.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return both.hexdigest()
