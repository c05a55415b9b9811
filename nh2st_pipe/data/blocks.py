"""Slides cut into blocks, for judging a head where there is one slide: trained on some of it, judged on the rest.

A block is treated as a slide of its own: its spots' neighbours, their means and the smoothing of its targets end at its
border, so that no count of a block that is judged reaches what is trained on. What remains is that blocks of one slide
border on each other and share its stain: figures are too good for another slide.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.store.read import SlideData

__all__ = ["BLOCKS", "FEWEST_SPOTS", "cut", "part_of"]

BLOCKS = 4
FEWEST_SPOTS = 4 * BLOCKS


def cut(slide: SlideData) -> list[NDArray[np.int64]]:
    """Return the rows of a slide's four blocks, with as many spots each: left and right of the median x, each half
    above and below its own median y.

    Raises TrainError where there are too few spots for that.
    """
    if len(slide) < FEWEST_SPOTS:
        raise TrainError(
            f"slide {slide.slide_id} has {len(slide)} spots, and folds by block need {FEWEST_SPOTS}; "
            "--folds none trains on everything without judging"
        )
    by_x = np.argsort(slide.xy[:, 0], kind="stable")
    halves = np.array_split(by_x, 2)
    blocks = [part for half in halves for part in np.array_split(half[np.argsort(slide.xy[half, 1], kind="stable")], 2)]
    return [np.sort(block) for block in blocks]


def part_of(slide: SlideData, rows: NDArray[np.int64], block: int) -> SlideData:
    """Return the spots `rows` of a slide as block number `block` (from 1); its embeddings stay where they are."""
    place = np.full(len(slide) + 1, -1, np.int32)  # the last is that of "no neighbour", -1
    place[rows] = np.arange(len(rows), dtype=np.int32)
    around = place[slide.neighbours[rows]]
    return replace(
        slide,
        block=block,
        barcodes=[slide.barcodes[i] for i in rows],
        xy=slide.xy[rows],
        array_row=None if slide.array_row is None else slide.array_row[rows],
        array_col=None if slide.array_col is None else slide.array_col[rows],
        views=slide.views[:0],
        neighbours=around,
        counts=None if slide.counts is None else slide.counts[rows],
        stored=None if slide.stored is None else slide.stored.take(rows),
    )
