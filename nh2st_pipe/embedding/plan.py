"""What is to be done: which encoder, what the slides of the store have in common, which of them are still to embed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.encoders.weights import Weights
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision, load_encoder_recipe
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.store.format import Contract, fingerprint
from nh2st_pipe.store.read import Store
from nh2st_pipe.tiles.manifest import SlideRow

__all__ = ["DEFAULT_ENCODER", "choose_recipe", "make_contract", "pending"]

DEFAULT_ENCODER = "h-optimus-0"


def choose_recipe(encoder: str | Path | EncoderRecipe | None, existing: Store | None) -> EncoderRecipe:
    """Return the encoder asked for, else the store's, else the default."""
    if isinstance(encoder, EncoderRecipe):
        return encoder
    if encoder is not None or existing is None:
        return load_encoder_recipe(encoder or DEFAULT_ENCODER)
    return EncoderRecipe.model_validate(existing.contract.encoder)


def make_contract(
    recipe: EncoderRecipe,
    weights: Weights,
    existing: Store | None,
    views: int | None,
    tile_um: float | None,
    tile_px: float | None,
    precision: Precision | None,
    device: str,
) -> Contract:
    """Say what all slides of the store have in common, from what was asked for, the store, or the recipe."""
    old = existing.contract if existing else None
    for name, value in (("--tile-um", tile_um), ("--tile-px", tile_px)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UsageError(f"{name} takes a positive number, not {value}")
    if tile_um is not None or tile_px is not None:
        tile = TileSize(tile_um, tile_px).record()
    else:
        tile = old.tile if old else TileSize(um=recipe.input_px * recipe.mpp).record()
    if precision is None:
        precision = old.precision if old else _auto_precision(recipe, device)  # type: ignore[assignment]
    assert precision is not None
    return Contract(
        encoder=recipe.model_dump(mode="json"),
        identity=recipe.identity(),
        weights_sha256=weights.sha256,
        weights_source=weights.source,
        precision=precision,
        tile=tile,
        views=views or (old.views if old else 1),
    )


def _auto_precision(recipe: EncoderRecipe, device: str) -> Precision:
    from nh2st_pipe.core.devices import pick_device

    return recipe.precision if pick_device(device).type == "cuda" else "float32"


def _source(row: SlideRow) -> dict[str, Any]:
    """What decides a slide's embeddings besides the contract."""
    files = {"image": row.slide, "expression": row.expression, "tissue": row.tissue}
    return {**{name: fingerprint(file) if file else None for name, file in files.items()}, "mpp": row.mpp}


def pending(
    rows: list[SlideRow], existing: Store | None, redo_changed: bool, summary: EmbedSummary
) -> list[tuple[SlideRow, dict[str, Any]]]:
    """Return the slides still to embed, each with its source; the others go into the summary."""
    todo = []
    for row in rows:
        source = _source(row)
        state = existing.state(row.slide_id) if existing else None
        if state is None or not state.complete:
            todo.append((row, source))  # the writer goes on with it, or begins anew where its source changed
        elif state.source == source:
            summary.kept.append(row.slide_id)
        elif redo_changed:
            todo.append((row, source))
        else:
            changed = [name for name in source if state.source.get(name) != source[name]]
            summary.failed[row.slide_id] = (
                f"its {' and '.join(changed)} changed since it was embedded; "
                "embed it anew with --redo-changed, or give the changed slide another slide_id"
            )
    return todo
