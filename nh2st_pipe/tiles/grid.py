"""Tiles in a grid over the tissue, for slides without spots; the order in which tiles are read.

Tiles are kept in the file's own order, so that neighbours in a store are neighbours on disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.base import Slide
from nh2st_pipe.tiles.spots import Spots

__all__ = ["file_order", "grid_spots"]

_BLOCK_PX = 1024  # height of the bands in which tiles are ordered


def file_order(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the order in which tiles are read: bands from top to bottom, each from left to right."""
    return np.lexsort((xy[:, 1], xy[:, 0], xy[:, 1] // _BLOCK_PX)).astype(np.int64)


def _edges(n: int, step: float, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each of n tiles begins and ends on a mask, `step` mask px long: at least the px it begins in."""
    at = np.arange(n + 1) * step
    begin = np.clip(at[:-1].round().astype(np.int64), 0, length)
    end = np.clip(at[1:].round().astype(np.int64), 0, length)
    small = end <= begin
    begin = np.where(small, np.clip(at[:-1].astype(np.int64), 0, length - 1), begin)
    return begin, np.where(small, begin + 1, end)


def grid_spots(
    tissue: NDArray[np.bool_], size_level0_px: float, slide: Slide, min_share: float = 0.5, mask: Path | None = None
) -> Spots:
    """Return adjoining tiles over the parts of a slide that `tissue` marks, for slides without spots.

    `tissue` is a mask of the whole slide at any resolution; a tile is kept where at least `min_share` of it is
    tissue. Barcodes are "x<column>_y<row>" of the grid. Raises SlideError where there is none, naming `mask`, the file
    that `tissue` is from.
    """
    width, height = slide.size
    n_cols, n_rows = (max(1, int(side // size_level0_px)) for side in (width, height))
    # The share of tissue under each tile from a summed-area table: exact for tiles of any size.
    summed = np.pad(tissue.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    top, bottom = _edges(n_rows, size_level0_px * tissue.shape[0] / height, tissue.shape[0])
    left, right = _edges(n_cols, size_level0_px * tissue.shape[1] / width, tissue.shape[1])
    inside = (
        summed[np.ix_(bottom, right)]
        - summed[np.ix_(top, right)]
        - summed[np.ix_(bottom, left)]
        + summed[np.ix_(top, left)]
    )
    area = np.outer(bottom - top, right - left)
    rows, cols = np.nonzero(inside / area >= min_share)
    if len(rows) == 0:
        if mask is None:
            raise SlideError(f"no tissue was found on {slide.path}; give a mask in the manifest's column 'tissue'")
        marked = f"marks {tissue.mean():.2%} of the slide and no tile" if tissue.any() else "marks nothing"
        raise SlideError(
            f"the tissue mask {mask} {marked}: tissue should be white or outlined, and half of a tile of "
            f"{size_level0_px:.4g} px"
        )
    return Spots(
        barcodes=[f"x{c}_y{r}" for r, c in zip(rows, cols, strict=True)],
        xy=((np.column_stack((cols, rows)) + 0.5) * size_level0_px).astype(np.float64),
        array_row=rows.astype(np.int64),
        array_col=cols.astype(np.int64),
    )
