"""Moran's I: how much of a map is structure. Compared between a measured and a predicted map, it tells how smooth the
prediction is: one that is smoother than what was measured has a higher one.

Moran, Notes on continuous stochastic phenomena, Biometrika 37, 1950.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["morans_i"]

_NEIGHBOURS = 6
_REACH = 1.6  # of the median distance to the nearest spot, beyond which a spot is no neighbour


def morans_i(values: NDArray[np.floating], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return I of each gene's map: values n × G at xy n × 2.

    A spot's neighbours are the up to six nearest within 1.6 times the median distance to the nearest; the weights of a
    spot add up to one. Spots without a value, and without a neighbour that has one, are left out. NaN where fewer than
    three are left or they do not vary.
    """
    genes = values.shape[1]
    if len(xy) < 3:
        return np.full(genes, np.nan)
    found: Any = cKDTree(xy).query(xy, k=range(2, min(_NEIGHBOURS + 1, len(xy)) + 1))
    far, near = found
    close = far <= _REACH * np.median(far[:, 0])
    seen = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(seen, values, 0).sum(axis=0, dtype=np.float64) / seen.sum(axis=0)
        apart = np.where(seen, values - mean, 0)
        total, weight = np.zeros(values.shape), np.zeros(values.shape)
        for k in range(near.shape[1]):
            used = close[:, k, None] & seen[near[:, k]]
            total += np.where(used, apart[near[:, k]], 0)
            weight += used
        beside = seen & (weight > 0)
        around = np.where(beside, total / weight, 0)
        n = beside.sum(axis=0)
        of_genes = (apart * around).sum(axis=0) / n / ((apart**2).sum(axis=0) / seen.sum(axis=0))
    return np.where((n >= 3) & np.isfinite(of_genes), of_genes, np.nan)
