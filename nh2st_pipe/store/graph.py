"""The neighbours of a slide's spots as squidpy keeps them (two sparse matrices), and as heads use them (a table).

Letters: n spots, k neighbours in a table, the spot itself first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["CONNECTIVITIES", "DISTANCES", "graph_of", "squidpy_graph", "table_of"]

CONNECTIVITIES, DISTANCES = "spatial_connectivities", "spatial_distances"  # keys of obsp, by squidpy


def graph_of(indices: NDArray[np.int32], distances: NDArray[np.float64]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return n × n connectivities (1 for each neighbour) and distances from n × k tables; -1 is no neighbour."""
    n = len(indices)
    rows, places = np.nonzero(indices[:, 1:] >= 0)
    columns = indices[rows, places + 1].astype(np.int64)
    order = np.lexsort((columns, rows))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=n)))).astype(np.int32)
    columns = columns[order].astype(np.int32)
    far = distances[rows, places + 1][order].astype(np.float64)

    def matrix(values: NDArray[np.float64]) -> sp.csr_matrix:
        return sp.csr_matrix((values, columns, indptr), shape=(n, n))

    return matrix(np.ones(len(columns))), matrix(far)


def squidpy_graph(
    indices: NDArray[np.int32], distances: NDArray[np.float64]
) -> tuple[dict[str, sp.csr_matrix], dict[str, Any]]:
    """Return what squidpy keeps of n × k neighbours: obsp, and uns["spatial_neighbors"] on it."""
    connected, far = graph_of(indices, distances)
    note = {
        "connectivities_key": CONNECTIVITIES,
        "distances_key": DISTANCES,
        "params": {"n_neighbors": indices.shape[1] - 1, "coord_type": "generic"},
    }
    return {CONNECTIVITIES: connected, DISTANCES: far}, note


def table_of(distances: sp.csr_matrix) -> NDArray[np.int32]:
    """Return the n × k table of neighbours, nearest first, equal distances by index; the spot itself stands first.

    k is one more than the most neighbours of any spot; -1 where there are fewer.
    """
    n = distances.shape[0]
    counts = np.diff(distances.indptr)
    rows = np.repeat(np.arange(n), counts)
    order = np.lexsort((distances.indices, distances.data, rows))
    table = np.full((n, 1 + int(counts.max(initial=0))), -1, np.int32)
    table[:, 0] = np.arange(n)
    place = np.arange(len(rows)) - np.repeat(distances.indptr[:-1], counts)
    table[rows, 1 + place] = distances.indices[order]
    return table
