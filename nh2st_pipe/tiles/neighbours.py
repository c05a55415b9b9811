"""The spots nearest to each spot of a slide, by a k-d tree over their coordinates, exact in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["nearest_spots"]

_SPARE = 16  # candidates beyond k, so that among equally distant ones the choice is by index, not by the tree


def nearest_spots(xy: NDArray[np.float64], k: int = 9) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return for n spots (n × 2, px) the indices and distances (px) of the `k` nearest, both n × k.

    The first is the spot itself. Equal distances are ordered by index. Where a slide has fewer than `k` spots
    the rest is -1 at distance infinity.
    """
    n = len(xy)
    indices = np.full((n, k), -1, np.int32)
    distances = np.full((n, k), np.inf)
    if n == 0:
        return indices, distances
    candidates = np.asarray(cKDTree(xy).query(xy, k=min(n, k + _SPARE), workers=-1)[1]).reshape(n, -1)
    own = np.arange(n)[:, None]
    # The spot itself comes first, before any twin at the same place, even where its twins crowd it out.
    missing = ~(candidates == own).any(axis=1)
    candidates[missing, -1] = own[missing, 0]
    exact = np.linalg.norm(xy[candidates] - xy[:, None], axis=2)
    exact[candidates == own] = -1.0
    order = np.lexsort((candidates, exact), axis=1)[:, : min(n, k)]
    found = np.take_along_axis(candidates, order, axis=1)
    indices[:, : found.shape[1]] = found
    distances[:, : found.shape[1]] = np.maximum(np.take_along_axis(exact, order, axis=1), 0.0)
    return indices, distances
