from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.tiles.grid import file_order, grid_spots
from tests.conftest import blank

places = hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.floats(0, 200_000, width=32))


@given(xy=places)
def test_file_order_is_a_permutation_by_bands(xy: NDArray[np.float64]) -> None:
    order = file_order(xy)
    assert sorted(order) == list(range(len(xy)))
    bands, x = xy[order, 1] // 1024, xy[order, 0]
    assert (np.diff(bands) >= 0).all()
    assert all((np.diff(x[bands == band]) >= 0).all() for band in set(bands))


def test_a_grid_covers_the_tissue_and_only_it(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    mask = np.zeros((30, 40), bool)
    mask[10:20, 20:40] = True  # x from 200 to 400, y from 100 to 200
    spots = grid_spots(mask, 50.0, slide)
    assert {tuple(p) for p in spots.xy} == {(x, y) for x in (225, 275, 325, 375) for y in (125, 175)}
    assert spots.barcodes[0] == "x4_y2"
    with pytest.raises(SlideError, match="no tissue was found"):
        grid_spots(np.zeros((30, 40), bool), 50.0, slide)
    for marked, what in ((np.zeros((30, 40), bool), "marks nothing"), (np.eye(30, 40) > 0, "marks 2.50% of the slide")):
        with pytest.raises(SlideError, match=f"the tissue mask m.png {what}"):
            grid_spots(marked, 50.0, slide, mask=Path("m.png"))


@pytest.mark.parametrize("mask_px", [1, 3, 7, 50, 400])
@pytest.mark.parametrize("tile_px", [5.0, 13.7, 100.0])
def test_a_slide_that_is_all_tissue_is_covered_whatever_the_masks_size(
    tmp_path: Path, mask_px: int, tile_px: float
) -> None:
    slide = open_slide(blank(tmp_path, (400, 300)))
    spots = grid_spots(np.ones((mask_px, mask_px), bool), tile_px, slide)
    assert len(spots) == int(400 // tile_px) * int(300 // tile_px)


def test_tiles_smaller_than_a_mask_px_follow_the_mask(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path, (400, 400)))
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    spots = grid_spots(left, 20.0, slide)
    assert len(spots) == 10 * 20
    assert spots.xy[:, 0].max() < 200
