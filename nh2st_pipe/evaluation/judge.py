"""How good predictions in `.h5ad` files are, against the expression in a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from nh2st_pipe.core.errors import RunError, TrainError, listed
from nh2st_pipe.evaluation.metrics import summarise
from nh2st_pipe.store.read import open_store

__all__ = ["evaluate"]


def evaluate(predictions: str | Path, embeddings: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Return the figures of the predictions in the folder `predictions`, by slide and as their mean.

    Spots are joined by barcode with the store `embeddings`, which must hold expression; the truth is the
    layers["target"] that prediction made from it. With `out` the figures are written there as JSON.

    Raises RunError where there is nothing to judge or a file's spots are not the store's.
    """
    files = sorted(Path(predictions).glob("*.h5ad"))
    if not files:
        raise RunError(f"there are no predictions (*.h5ad) in {predictions}")
    store = open_store(embeddings)
    known = set(store.slides())
    slides: dict[str, dict[str, Any]] = {}
    for file in files:
        data = anndata.read_h5ad(file)
        slide_id = file.stem
        if slide_id not in known:
            raise RunError(f"{file} is of slide {slide_id}, which {store.location} does not hold")
        if "target" not in data.layers:
            continue
        place = {barcode: i for i, barcode in enumerate(store.read(slide_id, first_view_only=True).barcodes)}
        strangers = [name for name in data.obs_names if name not in place]
        if strangers:
            raise RunError(
                f"{file} names spots that slide {slide_id} of {store.location} does not have: {listed(strangers)}"
            )
        slides[slide_id] = summarise(np.asarray(data.X), np.asarray(data.layers["target"]))
    if not slides:
        raise TrainError(f"none of the slides in {predictions} has expression to be judged against")
    figures: dict[str, Any] = {"slides": slides, "summary": {}}
    for key in ("pcc", "pcc_top50", "mse", "mae"):
        values = [slide[key] for slide in slides.values() if slide[key] is not None]
        figures["summary"][key] = float(np.mean(values)) if values else None
    if out is not None:
        Path(out).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return figures
