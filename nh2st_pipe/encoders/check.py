"""Whether an encoder can be had and is what its recipe says, before a job waits in a queue for it.

Nothing large is downloaded: an architecture is built without memory for its weights, and of a file on the hub its
description is asked for. A file that is here is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nh2st_pipe.core.errors import EncoderError, NH2STError
from nh2st_pipe.core.hub import cached, describe
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.encoders.load import build_backbone, load_encoder
from nh2st_pipe.encoders.own import code_sha256
from nh2st_pipe.encoders.packages import check_installed
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["Finding", "check_encoder"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool
    words: str


def check_encoder(recipe: EncoderRecipe, weights: Path | None = None, trust_remote_code: bool = False) -> list[Finding]:
    """Look at the architecture of `recipe`, and at its weights: the file `weights`, the cache's, or the hub's."""
    return [
        _looked_at("architecture", _architecture, recipe),
        _looked_at("weights", _weights, recipe, weights, trust_remote_code),
    ]


def _looked_at(what: str, look: Any, *arguments: Any) -> Finding:
    try:
        return Finding(what, True, look(*arguments))
    except NH2STError as error:
        return Finding(what, False, str(error))


def _architecture(recipe: EncoderRecipe) -> str:
    if recipe.kind == "fake":
        return "built in, without weights"
    by_recipe = f"{recipe.dim:,} values per tile, by its recipe"
    if recipe.kind == "remote":
        return f"the code of the repository {recipe.repo}, which runs with --trust-remote-code; {by_recipe}"
    if recipe.kind == "python":
        return f"the code {recipe.builder}, SHA-256 {code_sha256(recipe)}; {by_recipe}"
    if recipe.kind == "package":
        check_installed(recipe)
        return f"the code of the package {recipe.package}; {by_recipe}"
    with torch.device("meta"):
        backbone = build_backbone(recipe)
        encoder = Encoder(recipe, backbone, torch.device("meta"), "float32")
        values = encoder._pool(torch.empty(1, 3, recipe.input_px, recipe.input_px)).shape[1]
    if values != recipe.dim:
        raise EncoderError(
            f"{recipe.architecture} with pooling '{recipe.pooling}' gives {values} values per tile, and the recipe of "
            f"{recipe.name} says {recipe.dim}"
        )
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    return f"{recipe.architecture}, {millions:,.1f} million weights, {values} values per tile"


def _weights(recipe: EncoderRecipe, given: Path | None, trusted: bool) -> str:
    if recipe.kind == "fake":
        return "none are needed"
    here = given
    if here is None and recipe.repo is not None:
        here = cached(recipe.repo, recipe.file, recipe.revision)
        if here is None:
            size = describe(recipe.repo, recipe.file, recipe.revision)
            return f"{recipe.file} of {recipe.repo} can be fetched ({size / 1e9:.2f} GB)"
    found = find_weights(recipe, here, trusted)
    encoder = load_encoder(recipe, found.path, trust_remote_code=trusted)
    if recipe.kind in ("remote", "package", "python"):  # the others were held against their recipe without weights
        encoder.encode(np.zeros((1, recipe.input_px, recipe.input_px, 3), np.uint8))
    return f"{found.path} fits (SHA-256 {found.sha256})"
