"""A picture of somebody's own as a query: its middle, as large as a tile of the store, through the store's encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import StoreError, UsageError
from nh2st_pipe.embedding.plan import recipe_of
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.store.read import Store

__all__ = ["embedding_of"]

_TOO_SMALL = 0.98  # of a tile's side, that a picture has to show


def embedding_of(
    picture: Path,
    mpp: float | None,
    store: Store,
    *,
    weights: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> NDArray[np.float16]:
    """Return the embedding 1 × d of the middle of a picture, of which a px is `mpp` µm wide; None: as it says itself.

    Raises UsageError where the picture's scale is not known, or it shows less than a tile; StoreError where the store's
    embeddings are another tool's, or the weights are not those that it was made with.
    """
    from nh2st_pipe.core.devices import pick_device
    from nh2st_pipe.encoders.load import load_encoder
    from nh2st_pipe.encoders.weights import find_weights

    contract = store.contract
    if contract.imported is not None:
        raise StoreError(
            f"{store.location} holds {contract.made_by()}, so a picture cannot be embedded alike; ask with --slide"
        )
    recipe = recipe_of(contract)
    slide = open_slide(picture)
    try:
        side = _side(picture, mpp if mpp is not None else slide.mpp, contract.tile)
        shown = min(slide.size)
        if shown < _TOO_SMALL * side:
            raise UsageError(
                f"{picture} shows {slide.size[0]:,} × {slide.size[1]:,} px, and a tile of the store is {side:,.0f} px "
                "wide at that scale: give a larger picture, or its own --mpp"
            )
        middle = slide.size[0] / 2, slide.size[1] / 2
        tile = read_tile(slide, middle, min(side, float(shown)), recipe.input_px, recipe.interpolation)
    finally:
        slide.close()
    found = find_weights(recipe, weights, trust_remote_code)
    if found.sha256 != contract.weights.sha256:
        raise StoreError(
            f"{store.location} was made with {contract.weights.source} (SHA-256 {contract.weights.sha256[:12]}…), and "
            f"{found.source} is another file ({found.sha256[:12]}…); give that one with --weights"
        )
    encoder = load_encoder(
        recipe,
        found.path,
        device=pick_device(device),
        precision=contract.precision,
        trust_remote_code=trust_remote_code,
    )
    return encoder.encode(tile[None])[:, 0]


def _side(picture: Path, mpp: float | None, tile: Mapping[Any, float | None]) -> float:
    um, px = tile["size_um"], tile["size_level0_px"]
    if um is None:
        return float(px or 0)
    if mpp is None:
        raise UsageError(f"{picture} does not say its scale, and tiles of the store are of {um:g} µm: --mpp says it")
    if not 0 < mpp < np.inf:
        raise UsageError(f"--mpp is {mpp:g}; a number above 0 is expected")
    return um / mpp
