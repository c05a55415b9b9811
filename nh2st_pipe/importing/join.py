"""Spots of an experiment beside tiles of another tool: which tile each spot is seen by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.tiles.spots import Spots

__all__ = ["Joined", "join"]

_SAME = 0.02  # of a tile's side: the same place, but for rounding
_FEW = 0.9


@dataclass(frozen=True)
class Joined:
    """Spots that have a tile, in the order of the tiles."""

    spots: Spots
    rows: NDArray[np.int64]
    """Of each spot's tile among the features, growing."""
    notices: tuple[str, ...]


def join(spots: Spots, xy: NDArray[np.float64], side: float, barcodes: list[str] | None, at: str) -> Joined:
    """Join spots to tiles (n × 2 centres, level-0 px): by barcodes where the tiles have them, else each to the nearest
    tile that covers its centre.

    Raises SlideError naming `at` where none can be joined.
    """
    n = len(spots)
    if barcodes is not None:
        place = {name: row for row, name in enumerate(barcodes)}
        rows = np.array([place.get(name, -1) for name in spots.barcodes], np.int64)
        how = "by barcode"
    else:
        tree = cKDTree(xy)
        _, found_at = tree.query(spots.xy, p=np.inf, distance_upper_bound=side / 2 * (1 + 1e-9))
        rows = np.where(found_at < len(xy), found_at, -1).astype(np.int64)
        how = "to tiles around them"
    kept = np.flatnonzero(rows >= 0)
    if not len(kept):
        told = f"barcodes as {spots.barcodes[0]}, and the features as {barcodes[0]}" if barcodes else "other places"
        raise SlideError(f"{at}: none of {n:,} spots has a tile: the spots have {told}")
    kept = kept[np.argsort(rows[kept], kind="stable")]
    off = np.linalg.norm(spots.xy[kept] - xy[rows[kept]], axis=1)
    found = []
    if len(kept) < n:
        few = ", and the others are left out" if len(kept) >= _FEW * n else "; the others are left out: is that meant?"
        found.append(f"{len(kept):,} of {n:,} spots joined {how}{few}")
    exact = bool((off <= max(1.0, _SAME * side)).all())
    if barcodes is None and not exact:
        found.append(
            f"tiles are not around spots: their centres are {np.median(off) / side:.0%} of a tile's side away (median) "
            f"and {len(np.unique(rows[kept])):,} tiles are those of {len(kept):,} spots. Tiles laid on the spots would "
            "show what was measured"
        )
    if barcodes is not None and float(np.median(off)) > side / 2:
        raise SlideError(
            f"{at}: spots and features of the same barcode lie {np.median(off):,.0f} level-0 px apart (median), more "
            f"than half a tile of {side:,.0f}: are they of the same section and image?"
        )
    return Joined(spots.take(kept), rows[kept], tuple(found))
