"""Means over neighbouring spots: on the array's grid, or by distance."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.tiles.lattice import is_hexagonal, pitch_px

__all__ = ["grid_mean", "near_mean"]

_HEXAGON = 2.1  # columns are counted twice as densely: all six neighbours are 2 away, the next ones 3.5
_NEAR_PITCHES = 1.5  # reaches the diagonal neighbour of a square grid (1.41), not the next but one (2)


def grid_mean(grid: NDArray[np.int64]) -> sp.csr_matrix:
    """Return the n × n matrix that takes the mean over each spot and its neighbours on the grid.

    `grid` is n × 2 (array_row, array_col). On a square grid the up to eight neighbours have |Δrow| ≤ 1 and |Δcol| ≤ 1
    (Qu et al. 2025). On Visium's, where that square holds four of six, they are those that touch the spot: two columns
    apart in its row, one column apart in the rows beside it.
    """
    if is_hexagonal(grid):
        upright = grid * np.array([np.sqrt(3), 1.0])
        return _mean_over(cKDTree(upright).query_pairs(_HEXAGON, output_type="ndarray"), len(grid))
    return _mean_over(cKDTree(grid.astype(np.float64)).query_pairs(1.0, p=np.inf, output_type="ndarray"), len(grid))


def near_mean(xy: NDArray[np.float64]) -> sp.csr_matrix:
    """Return the n × n matrix that takes the mean over each spot and those within 1.5 pitches of it."""
    reach = _NEAR_PITCHES * pitch_px(xy)
    return _mean_over(cKDTree(xy).query_pairs(reach, output_type="ndarray"), len(xy))


def _mean_over(pairs: NDArray[np.int64], n: int) -> sp.csr_matrix:
    own = np.arange(n)
    i, j = np.concatenate((pairs[:, 0], pairs[:, 1], own)), np.concatenate((pairs[:, 1], pairs[:, 0], own))
    near = sp.csr_matrix((np.ones(len(i)), (i, j)), shape=(n, n))
    return sp.csr_matrix(sp.diags(1 / np.asarray(near.sum(axis=1)).ravel()) @ near)
