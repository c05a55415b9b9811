from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.checking.run import check
from nh2st_pipe.core.errors import SlideError, StoreError, UsageError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import verify
from nh2st_pipe.tiles.grid import file_order, grid_spots
from nh2st_pipe.tiles.masks import mask_from_geojson
from nh2st_pipe.tiles.options import GridOptions
from tests.conftest import Study, blank

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


def test_tiles_may_overlap_and_need_as_much_tissue_as_is_asked_for(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path, (400, 300)))
    every = np.ones((30, 40), bool)
    half = grid_spots(every, 100.0, slide, GridOptions(overlap=0.5))
    assert sorted(set(half.xy[:, 0])) == [50, 100, 150, 200, 250, 300, 350]
    assert sorted(set(half.xy[:, 1])) == [50, 100, 150, 200, 250]
    assert half.barcodes[1] == "x1_y0"
    assert len(grid_spots(every, 130.0, slide, GridOptions(overlap=0.9))) == 14 * 21
    band = np.zeros((30, 40), bool)
    band[:, :13] = True  # 30 px of the second column of tiles
    columns = {
        share: set(grid_spots(band, 100.0, slide, GridOptions(min_tissue=share)).xy[:, 0].tolist())
        for share in (0.2, 0.3, 0.4, 1.0)
    }
    assert columns == {0.2: {50, 150}, 0.3: {50, 150}, 0.4: {50}, 1.0: {50}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "--overlap takes"),
        ({"overlap": -0.1}, "--overlap takes"),
        ({"overlap": float("nan")}, "--overlap takes"),
        ({"min_tissue": 0.0}, "--min-tissue takes"),
        ({"min_tissue": 1.2}, "--min-tissue takes"),
    ],
)
def test_shares_that_cannot_be_are_refused(study: Study, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        study.embed(**options)
    with pytest.raises(UsageError, match=message):
        check(study.manifest, **options)  # type: ignore[arg-type]


def test_a_store_has_one_grid_and_keeps_the_tissue_it_lies_on(make_study: Callable[..., Study]) -> None:
    study = make_study(n_slides=2, side=6, expression=False)
    assert study.embed(overlap=0.5, min_tissue=0.25).failed == {}
    store = open_store(study.folder / "store.zarr")
    assert store.contract.grid == GridOptions(0.5, 0.25)
    assert study.embed().kept == ["s0", "s1"]  # what is not said is the store's
    with pytest.raises(StoreError, match=r"a grid of 0\.5 overlap and 0\.25 least tissue, not 0 overlap"):
        study.embed(overlap=0.0)
    folder = study.folder / "store.zarr" / "slides" / "s0"
    tissue = np.asarray(Image.open(folder / "tissue.png"))
    drawn, _ = mask_from_geojson(folder / "tissue.geojson", open_slide(study.folder / "s0.png"))
    assert tissue.dtype == np.bool_
    assert (tissue & drawn).sum() > 0.97 * (tissue | drawn).sum() > 0
    record = store.record("s0")
    assert record is not None
    assert {"tissue.png", "tissue.geojson"} <= set(record.files or ())
    (folder / "tissue.geojson").write_text("{}")
    assert "tissue.geojson" in str(verify(study.folder / "store.zarr").damaged["s0"])


def test_spots_have_their_tissue_kept_too(study: Study) -> None:
    study.embed()
    assert (study.folder / "store.zarr" / "slides" / "s2" / "tissue.png").is_file()


def test_check_lays_the_grid_that_embed_would(make_study: Callable[..., Study]) -> None:
    study = make_study(n_slides=1, side=6, expression=False)
    found = check(study.manifest, tile_px=48, overlap=0.5, min_tissue=0.25)
    study.embed(overlap=0.5, min_tissue=0.25)
    assert found.slides[0].tiles == open_store(study.folder / "store.zarr").tiles("s0")
