"""The spots nearest to each spot, through a FAISS index over coordinates, per slide.

FAISS compares in float32 and expands squares, which loses the low digits of large coordinates. So it only
proposes candidates; their distances are taken anew in float64 and put in order, the spot itself first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["nearest_spots"]

_SPARE = 16  # candidates beyond k, so that rounding inside FAISS cannot push a true neighbour out


def nearest_spots(xy: NDArray[np.float64], k: int = 9) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return for n spots (n × 2, px) the indices and distances (px) of the `k` nearest, both n × k.

    The first is the spot itself. Equal distances are ordered by index. Where a slide has fewer than `k` spots
    the rest is -1 at distance infinity.
    """
    import faiss

    n = len(xy)
    indices = np.full((n, k), -1, np.int32)
    distances = np.full((n, k), np.inf, np.float32)
    if n == 0:
        return indices, distances
    points = (xy - xy.mean(axis=0)).astype(np.float32)
    index = faiss.IndexFlatL2(2)
    index.add(points)
    wanted = min(n, k + _SPARE)
    _, candidates = index.search(points, wanted)
    exact = np.linalg.norm(xy[candidates] - xy[:, None], axis=2)
    own = np.arange(n)[:, None]
    exact[candidates == own] = -1.0  # the spot itself comes first, before any twin at the same place
    order = np.lexsort((candidates, exact), axis=1)[:, : min(n, k)]
    found = np.take_along_axis(candidates, order, axis=1)
    far = np.take_along_axis(exact, order, axis=1)
    missing = ~(found == own).any(axis=1)
    if missing.any():  # more than `wanted` spots at one place: put the spot itself in front of its twins
        found[missing] = np.roll(found[missing], 1, axis=1)
        far[missing] = np.roll(far[missing], 1, axis=1)
        found[missing, 0], far[missing, 0] = own[missing, 0], 0.0
    indices[:, : found.shape[1]] = found
    distances[:, : found.shape[1]] = np.maximum(far, 0.0)
    return indices, distances
