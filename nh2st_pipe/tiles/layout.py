"""Where the tiles of one slide lie, from its row of the manifest: what `embed` does and `check` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.slides.base import Slide
from nh2st_pipe.slides.resolution import Resolution, TileSize, choose_mpp
from nh2st_pipe.tiles.geometry import (
    check_on_image,
    check_pitch,
    check_tile,
    darkness,
    enlarged,
    mask_notices,
    spots_say,
    tissue_notices,
)
from nh2st_pipe.tiles.grid import file_order, grid_spots
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["Layout", "doubts_on_tissue", "lay_out", "resolution_of", "tissue_on"]


@dataclass(frozen=True)
class Layout:
    """The tiles of one slide."""

    spots: Spots
    """In the order in which they are read."""
    size_level0_px: float
    resolution: Resolution
    notes: tuple[str, ...]
    """How the files are read, where a person would not expect it."""
    doubts: tuple[str, ...]
    """What is unlikely about them."""
    tissue: NDArray[np.bool_] | None = None
    """What the grid was laid over, h × w; None for spots."""
    picture: NDArray[np.uint8] | None = None
    """The thumbnail on which that was found, where one was made: h × w × 3, the whole slide."""
    doubted: NDArray[np.bool_] | None = None
    """Where something was taken off it that may be tissue, h × w."""


def lay_out(
    row: SlideRow, slide: Slide, tile: TileSize, grid: GridOptions | None = None, *, input_px: int | None = None
) -> Layout:
    """Return the tiles of `row`'s slide: its spots, or a grid over its tissue; `input_px` is the encoder's, if known.

    Raises SlideError or ExpressionError where they cannot be, naming what is wrong.
    """
    spots = None if row.expression is None else read_spots(row.expression)
    resolution = _resolution(row, slide, spots)
    size = tile.on_slide(resolution.mpp, slide)
    check_tile(size, slide)
    doubts, notes, mask, picture, doubted = [*resolution.doubts], list[str](), None, None, None
    if spots is not None:
        assert row.expression is not None
        check_on_image(spots, slide)
        doubts += [*spots.doubts, *check_pitch(spots, size, row.expression)]
    else:
        from nh2st_pipe.tiles.tissue import find_tissue

        found = find_tissue(slide, row.tissue)
        mask, notes, picture, doubted = found.mask, found.notes(), found.picture, found.doubted
        spots = grid_spots(mask, size, slide, grid, row.tissue)
        doubts += mask_notices(mask, slide) if row.tissue else []
        doubts += [*found.doubts, *(darkness(picture) if picture is not None else [])]
    notes = [*slide.notices, *resolution.notes, *spots.notices, *notes]
    (notes if input_px is None else doubts).extend(enlarged(size, input_px))
    return Layout(
        spots.take(file_order(spots.xy)), size, resolution, tuple(notes), tuple(doubts), mask, picture, doubted
    )


def resolution_of(row: SlideRow, slide: Slide) -> Resolution:
    """Return the resolution at which `row`'s slide is read; its spots are looked at where nothing else says it.

    Raises ExpressionError where those cannot be read.
    """
    known = _resolution(row, slide, None)
    if known.mpp is not None or row.expression is None:
        return known
    return _resolution(row, slide, read_spots(row.expression))


def _resolution(row: SlideRow, slide: Slide, spots: Spots | None) -> Resolution:
    return choose_mpp(row.mpp, slide.mpp, None if spots is None else spots_say(spots))


def tissue_on(slide: Slide, picture: NDArray[np.uint8], given: Path | None) -> NDArray[np.bool_]:
    """Return a slide's tissue (h × w, the whole slide): in the mask `given`, else on its thumbnail `picture`."""
    from nh2st_pipe.tiles.tissue import tissue_mask, tissue_of

    return tissue_of(picture) if given is None else tissue_mask(slide, given)


def doubts_on_tissue(
    spots: Spots, slide: Slide, picture: NDArray[np.uint8], given: Path | None
) -> tuple[NDArray[np.bool_], list[str]]:
    """Hold spots against a slide's tissue; return that (see `tissue_on`) and what is unlikely about the spots on it."""
    mask = tissue_on(slide, picture, given)
    doubts = [*darkness(picture), *tissue_notices(spots.xy, mask, slide.size)]
    return mask, doubts + (mask_notices(mask, slide) if given is not None else [])
