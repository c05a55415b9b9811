"""Predictions whose every value is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.evaluation.reference import Familiarity
from nh2st_pipe.heads.base import Prediction
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.read import SlideData

ODD = ["ERBB2", "erbb2", 'with "quotes"', "a/slash", "tab\tand\nline", "L" * 200, "<&>", "percent % s"]
"""Names of genes that a format may trip over: two are equal but for case."""


def genes_of(n: int) -> list[str]:
    return [f"G{i}" for i in range(n)]


def prediction(
    path: Path,
    *,
    slide_id: str = "s1",
    side: int = 4,
    genes: list[str] | None = None,
    trusted: dict[str, bool] | None = None,
    unlike: tuple[int, ...] = (),
    nan: tuple[tuple[int, int], ...] = (),
    pitch: float = 50.0,
    tile: float = 40.0,
    mpp: float | None = 0.5,
    origin: tuple[int, int] | None = (0, 0),
    intervals: bool = True,
    measured: bool = True,
    image: str = "slide.svs",
    seed: int = 0,
) -> NDArray[np.float32]:
    """Write a prediction of side × side tiles, and return its values; the genes that are not in `trusted` were not
    judged, the tiles `unlike` are unlike the training tiles, `nan` are no numbers.
    """
    genes = genes_of(5) if genes is None else genes
    n, rng = side * side, np.random.default_rng(seed)
    values = rng.normal(1, 0.5, (n, len(genes))).astype(np.float32)
    for row, column in nan:
        values[row, column] = np.nan
    y, x = (axis.ravel() for axis in np.mgrid[:side, :side])
    xy = np.column_stack((x, y)) * pitch + 100.0
    width, height = (int(side * pitch + 150), int(side * pitch + 170))
    known: dict[str, Any] = {
        "path": image,
        "fingerprint": "12-ab",
        "width": width,
        "height": height,
        "tile_level0_px": tile,
    }
    known |= {} if mpp is None else {"mpp": mpp}
    known |= {} if origin is None else {"origin": origin}
    hires = np.full((height // 2, width // 2, 3), 200, np.uint8)
    factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": tile}
    slide = SlideData(
        slide_id=slide_id,
        patient="P",
        extra={},
        barcodes=[f"AA-{i}" for i in range(n)],
        xy=xy,
        array_row=y.astype(np.int64),
        array_col=x.astype(np.int64),
        views=np.zeros((n, 1, 2), np.float16),
        neighbours=np.arange(n, dtype=np.int32)[:, None],
        counts=None,
        genes=[],
        uns={"image": known, "spatial": {slide_id: {"images": {"hires": hires}, "scalefactors": factors}}},
    )
    percentile = np.linspace(0, 90, n).astype(np.float32)
    percentile[list(unlike)] = 99.9
    write_prediction(
        path,
        slide,
        genes,
        Prediction(values),
        values + 1 if measured else None,
        None,
        {"unit": "log1p(counts per 10,000), mean", "recipe": "nh2st-context", "encoder": "uni2-h"},
        {"trusted": dict.fromkeys(genes, True) if trusted is None else trusted, "half_pcc": _ranks(genes)},
        half_width=dict.fromkeys(genes, 0.25) if intervals else None,
        familiar=Familiarity(np.asarray(percentile / 10, np.float32), percentile),
    )
    return values


def _ranks(genes: list[str]) -> dict[str, float | None]:
    return {gene: 1 - i / (len(genes) + 1) for i, gene in enumerate(genes)}
