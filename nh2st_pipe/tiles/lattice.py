"""How spots are laid out: their pitch, and whether their array is Visium's hexagonal one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["is_hexagonal", "pitch_px"]

_ENOUGH_SPOTS = 5  # fewer can have array indices of one parity by chance


def pitch_px(xy: NDArray[np.float64]) -> float:
    """Return the median distance of the n × 2 spots to their nearest other spot, px; 0 for a single spot."""
    if len(xy) < 2:
        return 0.0
    distances = np.asarray(cKDTree(xy).query(xy, k=2)[0])
    return float(np.median(distances[:, 1]))


def is_hexagonal(grid: NDArray[np.int64] | None) -> bool:
    """Whether array indices (n × 2: array_row, array_col) are those of Visium's hexagonal grid.

    Space Ranger counts columns so that every other row is shifted by one: array_row + array_col is even for all spots,
    both kinds of rows are there, and neighbours in a row are two columns apart.
    """
    if grid is None or len(grid) < _ENOUGH_SPOTS:
        return False
    return bool(len(np.unique(grid.sum(axis=1) % 2)) == 1 and len(np.unique(grid[:, 0] % 2)) == 2)
