"""How spots are laid out: their pitch, the array they are of, and the resolution that follows from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["SPOT_PITCH_UM", "array_pitch_px", "is_hexagonal", "pitch_px"]

SPOT_PITCH_UM = {"hexagonal": 100.0, "square": 200.0}
"""From centre to centre on the arrays of Visium and of spatial transcriptomics (ST)."""

_ENOUGH_SPOTS = 5  # fewer can have array indices of one parity by chance
_FARTHEST = 1e9  # px or places on an array; farther apart nothing is
_STRAY = 0.35  # of a pitch, root mean square: how far spots may lie from their places on the array


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


def array_pitch_px(xy: NDArray[np.float64], array: NDArray[np.float64], *, hexagonal: bool = False) -> float | None:
    """Return the distance between neighbours of an array, px, from n spots (n × 2) and their places on it (n × 2).

    By least squares over all spots, whichever way round the array lies on the image. None where the spots are too few,
    in one line, or not on such an array.
    """
    if len(xy) < 3:
        return None
    places = np.column_stack((array, np.ones(len(array)))).astype(np.float64)
    if max(np.abs(places).max(), np.abs(xy).max()) > _FARTHEST:
        return None
    steps, _, rank, _ = np.linalg.lstsq(places, xy, rcond=None)
    if rank < 3:
        return None
    area = abs(float(np.linalg.det(steps[:2])))  # px² to a step along and a step across
    pitch = float(np.sqrt(area * (4 / np.sqrt(3) if hexagonal else 1.0)))
    stray = float(np.sqrt(np.mean(np.sum((places @ steps - xy) ** 2, axis=1))))
    return pitch if pitch > 0 and stray <= _STRAY * pitch else None
