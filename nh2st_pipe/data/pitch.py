"""Tiles that lie closer than the spots a head was trained on.

A head that looks at a spot's surroundings has learnt what lies one spot away, and what lies two. On a grid of tiles
that is finer than those spots, every tile is shown surroundings at the trained pitch: the grid is parted into as many
interleaved ones as are needed for that, and each is predicted as a slide of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.store.read import SlideData
from nh2st_pipe.tiles.lattice import pitch_px
from nh2st_pipe.tiles.neighbours import nearest_spots

__all__ = ["overlap_for", "parted", "pitch_in_tiles", "sublattice"]

_NEIGHBOURS = 9


def pitch_in_tiles(slide: SlideData) -> float | None:
    """Return the pitch of a slide's spots in sides of its tiles; None where their size is not known."""
    side = slide.uns.get("image", {}).get("tile_level0_px")
    pitch = pitch_px(slide.xy)
    return pitch / float(side) if side and pitch else None


def overlap_for(trained: float | None) -> float | None:
    """Return how much of a tile the next one shows in the widest grid without gaps that a pitch of `trained` tiles is a
    multiple of; None where that pitch is not known.
    """
    if trained is None:
        return None
    step = trained / np.ceil(np.round(trained, 3))
    return round(max(0.0, 1.0 - float(step)), 4)


def parted(slide: SlideData, trained: float | None) -> tuple[int, list[NDArray[np.int64]]]:
    """Return how many tiles of `slide` make a step whose length is nearest to `trained` tiles, and the rows of the
    interleaved grids of that step; 1 and all rows where it has spots, no places on a grid, or a pitch that is no finer.
    """
    own = pitch_in_tiles(slide)
    step = 1 if trained is None or own is None else round(trained / own)
    if step <= 1 or slide.measured or slide.array_row is None or slide.array_col is None:
        return 1, [np.arange(len(slide))]
    which = slide.array_row % step * step + slide.array_col % step
    return step, [np.flatnonzero(which == each) for each in np.unique(which)]


def sublattice(slide: SlideData, rows: NDArray[np.int64], step: int) -> SlideData:
    """Return the tiles `rows`, a `step` apart, of a slide without spots as a slide: their neighbours are found among
    themselves, and their places are counted in steps.
    """
    if step == 1:
        return slide
    assert not slide.measured
    return replace(
        slide,
        barcodes=[slide.barcodes[i] for i in rows],
        xy=slide.xy[rows],
        array_row=None if slide.array_row is None else slide.array_row[rows] // step,
        array_col=None if slide.array_col is None else slide.array_col[rows] // step,
        views=slide.views[rows],
        neighbours=nearest_spots(slide.xy[rows], _NEIGHBOURS)[0],
    )
