"""Judged slides whose truth is known: maps that follow each other as much as is said, on a grid, smooth in space."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nh2st_pipe.evaluation.judged import Judged, judge


def grid(side: int) -> NDArray[np.float64]:
    rows, cols = np.mgrid[:side, :side]
    return np.column_stack((cols.ravel(), rows.ravel())) * 100.0


def smooth_maps(rng: np.random.Generator, side: int, genes: int, reach: float = 1.5) -> NDArray[np.float32]:
    """Maps without any tie to each other, n × G: each of mean 0 and spread 1."""
    maps = rng.standard_normal((genes, side, side))
    maps = np.stack([gaussian_filter(each, reach, mode="nearest") for each in maps]).reshape(genes, -1).T
    scaled: NDArray[np.float32] = ((maps - maps.mean(0)) / maps.std(0)).astype(np.float32)
    return scaled


def study(
    seed: int,
    slides: int,
    tie: NDArray[Any] | float = 0.0,
    *,
    genes: int = 40,
    side: int = 14,
    reach: float = 1.5,
    **more: Any,
) -> list[Judged]:
    """Slides whose predictions have the PCC `tie` with the truth (one value, or one a gene), but for chance: the more
    of that the farther the maps `reach`, in spots.
    """
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(genes)]
    found = []
    for i in range(slides):
        truth, other = (smooth_maps(rng, side, genes, reach) for _ in range(2))
        guess = (tie * truth + np.sqrt(1 - np.square(tie)) * other).astype(np.float32)
        found.append(judge(guess, truth, grid(side), slide_id=f"s{i}", patient=f"s{i}", genes=names, **more))
    return found
