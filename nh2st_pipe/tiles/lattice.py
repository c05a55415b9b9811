"""How spots are laid out: their pitch, the array they are of, and the resolution that follows from it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["SPOT_PITCH_UM", "array_pitch_px", "fitted_lattice", "is_hexagonal", "pitch_px"]

SPOT_PITCH_UM = {"hexagonal": 100.0, "square": 200.0}
"""From centre to centre on the arrays of Visium and of spatial transcriptomics (ST)."""

_ENOUGH_SPOTS = 5  # fewer can have array indices of one parity by chance
_FARTHEST = 1e9  # px or places on an array; farther apart nothing is
_STRAY = 0.35  # of a pitch, root mean square: how far spots may lie from their places on an array that is known
_STRICT_STRAY = 0.1  # the same, where the array is to be told from others by it
_UNEQUAL = 0.1  # by how much a step along may differ from one across


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


def array_pitch_px(xy: NDArray[np.float64], array: NDArray[np.float64]) -> float | None:
    """Return the distance between neighbours of a square array, px, from n spots (n × 2) and their places (n × 2).

    By least squares over all spots, whichever way round the array lies on the image. None where the spots are too few,
    in one line, or not on such an array.
    """
    fit = _fit(xy, array, hexagonal=False)
    return fit[0] if fit is not None and fit[1] <= _STRAY else None


def fitted_lattice(
    xy: NDArray[np.float64], grid: NDArray[np.int64]
) -> tuple[Literal["hexagonal", "square"], float] | None:
    """Return of which array spots are (n × 2 px, n × 2 array_row, array_col) and its pitch, px; None where of neither.

    Columns of a hexagonal array are counted in twos, as Space Ranger does, or one by one in rows that are shifted
    against each other. Strict where the array has to be told from others: steps along and across have to be those of
    the array, and spots at their places. Where the indices are Visium's own they tell, and the positions are its scale.
    """
    row, column = grid.astype(np.float64).T
    odd = np.mod(row, 2)
    ways: list[tuple[Literal["hexagonal", "square"], NDArray[np.float64]]] = []
    known = is_hexagonal(grid)
    if known:
        ways = [("hexagonal", np.column_stack((row, column)))]
    elif len(grid) >= _ENOUGH_SPOTS:
        ways = [("square", np.column_stack((row, column)))]
        ways += [("hexagonal", np.column_stack((row, 2 * column + shift))) for shift in (odd, 1 - odd)]
    best: tuple[float, Literal["hexagonal", "square"], float] | None = None
    for kind, places in ways:
        fit = _fit(xy, places, kind == "hexagonal")
        if fit is None or fit[1] > (_STRAY if known else _STRICT_STRAY) or fit[2] > (_STRAY if known else _UNEQUAL):
            continue
        if best is None or fit[1] < best[0]:
            best = fit[1], kind, fit[0]
    return None if best is None else (best[1], best[2])


def _fit(xy: NDArray[np.float64], array: NDArray[np.float64], hexagonal: bool) -> tuple[float, float, float] | None:
    """Return an array's pitch (px), how far spots stray from it (of a pitch), and how unequal its steps are (a share).

    None where the spots are too few, or in one line.
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
    if pitch <= 0:
        return None
    stray = float(np.sqrt(np.mean(np.sum((places @ steps - xy) ** 2, axis=1))))
    along, across = np.linalg.norm(steps[:2], axis=1) / ((np.sqrt(3) / 2, 0.5) if hexagonal else (1.0, 1.0))
    return pitch, stray / pitch, float(max(along, across) / min(along, across) - 1)
