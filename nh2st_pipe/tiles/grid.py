"""Tiles in a grid over the tissue, for slides without spots; the order in which tiles are read.

Tiles are kept in the file's own order, so that neighbours in a store are neighbours on disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.base import Slide
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots

__all__ = ["file_order", "grid_spots"]

_BLOCK_PX = 1024  # height of the bands in which tiles are ordered


def file_order(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the order in which tiles are read: bands from top to bottom, each from left to right."""
    return np.lexsort((xy[:, 1], xy[:, 0], xy[:, 1] // _BLOCK_PX)).astype(np.int64)


def _edges(n: int, step: float, side: float, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each of n tiles begins and ends on a mask, all in mask px: at least the px it begins in."""
    at = np.arange(n) * step
    begin = np.clip(at.round().astype(np.int64), 0, length)
    end = np.clip((at + side).round().astype(np.int64), 0, length)
    small = end <= begin
    begin = np.where(small, np.clip(at.astype(np.int64), 0, length - 1), begin)
    return begin, np.where(small, begin + 1, end)


def grid_spots(
    tissue: NDArray[np.bool_],
    size_level0_px: float,
    slide: Slide,
    options: GridOptions | None = None,
    mask: Path | None = None,
) -> Spots:
    """Return tiles in a grid over the parts of a slide that `tissue` marks, for slides without spots.

    `tissue` is a mask of the whole slide at any resolution. Barcodes are "x<column>_y<row>" of the grid. Raises
    SlideError where no tile has enough tissue, naming `mask`, the file that `tissue` is from.
    """
    options = options or GridOptions()
    height, width = tissue.shape
    step = size_level0_px * (1 - options.overlap)
    n_cols, n_rows = (max(0, int((side - size_level0_px) / step + 1e-9)) + 1 for side in slide.size)
    # The share of tissue under each tile from a summed-area table: exact for tiles of any size.
    summed = np.zeros((height + 1, width + 1), np.int32 if tissue.size < 1 << 31 else np.int64)
    np.cumsum(tissue, axis=0, out=summed[1:, 1:])
    np.cumsum(summed[1:, 1:], axis=1, out=summed[1:, 1:])
    down, across = height / slide.size[1], width / slide.size[0]
    top, bottom = _edges(n_rows, step * down, size_level0_px * down, height)
    left, right = _edges(n_cols, step * across, size_level0_px * across, width)
    inside = (
        summed[np.ix_(bottom, right)]
        - summed[np.ix_(top, right)]
        - summed[np.ix_(bottom, left)]
        + summed[np.ix_(top, left)]
    )
    area = np.outer(bottom - top, right - left)
    rows, cols = np.nonzero(inside / area >= options.min_tissue)
    if len(rows) == 0:
        if mask is None:
            raise SlideError(f"no tissue was found on {slide.path}; give a mask in the manifest's column 'tissue'")
        marked = f"marks {tissue.mean():.2%} of the slide and no tile" if tissue.any() else "marks nothing"
        raise SlideError(
            f"the tissue mask {mask} {marked}: tissue should be white or outlined, and {options.min_tissue:.0%} of a "
            f"tile of {size_level0_px:.4g} px"
        )
    return Spots(
        barcodes=[f"x{c}_y{r}" for r, c in zip(rows, cols, strict=True)],
        xy=(np.column_stack((cols, rows)) * step + size_level0_px / 2).astype(np.float64),
        array_row=rows.astype(np.int64),
        array_col=cols.astype(np.int64),
    )
