"""Tiles, neighbours, tissue: where things are on a slide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.resolution import TileSize, choose_mpp
from nh2st_pipe.tiles.grid import check_on_image, file_order, grid_spots
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots
from nh2st_pipe.tiles.tissue import tissue_mask

places = hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.floats(0, 200_000, width=32))


@given(xy=places, k=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_neighbours_are_those_of_a_full_search(xy: NDArray[np.float64], k: int) -> None:
    indices, distances = nearest_spots(xy, k)
    n = len(xy)
    assert indices.shape == distances.shape == (n, k)
    every = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    assert np.array_equal(indices[:, 0], np.arange(n))  # the spot itself first, twins or not
    found = min(n, k)
    assert np.allclose(distances[:, :found], np.sort(every, axis=1)[:, :found], rtol=1e-6)
    assert np.allclose(np.take_along_axis(every, indices[:, :found].astype(int), 1), distances[:, :found], rtol=1e-6)
    assert all(len(set(row[:found])) == found for row in indices.tolist())
    assert (indices[:, found:] == -1).all()
    assert np.isinf(distances[:, found:]).all()


def test_neighbours_on_a_fine_grid_far_from_the_origin() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:70, :70])
    xy = np.column_stack((cols, rows)) * 4.0 + 150_000
    indices, distances = nearest_spots(xy, 9)
    inner = 35 * 70 + 35
    assert distances[inner].tolist() == pytest.approx([0, 4, 4, 4, 4] + [4 * 2**0.5] * 4)
    assert set(indices[inner]) == {inner + dr * 70 + dc for dr in (-1, 0, 1) for dc in (-1, 0, 1)}


def test_many_spots_at_one_place_still_begin_with_themselves() -> None:
    indices, _ = nearest_spots(np.zeros((60, 2)), 5)
    assert np.array_equal(indices[:, 0], np.arange(60))


@given(xy=places)
def test_file_order_is_a_permutation_by_bands(xy: NDArray[np.float64]) -> None:
    order = file_order(xy)
    assert sorted(order) == list(range(len(xy)))
    bands, x = xy[order, 1] // 1024, xy[order, 0]
    assert (np.diff(bands) >= 0).all()
    assert all((np.diff(x[bands == band]) >= 0).all() for band in set(bands))


def test_mpp_of_manifest_goes_before_the_files() -> None:
    assert choose_mpp(None, 0.25) == (0.25, "file", None)
    assert choose_mpp(0.5, None) == (0.5, "manifest", None)
    assert choose_mpp(None, None)[:2] == (None, "unknown")
    assert choose_mpp(0.5, 0.51)[2] is None
    notice = choose_mpp(0.5, 0.25)[2]
    assert notice is not None
    assert "0.5 in the manifest and 0.25 in the file" in notice


def blank(folder: Path, size: tuple[int, int] = (400, 300)) -> Path:
    path = folder / "slide.png"
    Image.new("RGB", size, "white").save(path)
    return path


def test_tile_size_in_um_needs_a_resolution(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    assert TileSize(um=112).on_slide(0.5, slide) == 224
    assert TileSize(level0_px=224).on_slide(None, slide) == 224
    with pytest.raises(SlideError, match="give mpp in the manifest"):
        TileSize(um=112).on_slide(None, slide)


def test_spots_outside_the_image_are_named(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    check_on_image(Spots(["a", "b"], np.array([[0.0, 0.0], [400.0, 300.0]])), slide)
    with pytest.raises(SlideError, match=r"1 of 2 spots lie outside .*: b; b is at x=300, y=400"):
        check_on_image(Spots(["a", "b"], np.array([[0.0, 0.0], [300.0, 400.0]])), slide)


def test_a_grid_covers_the_tissue_and_only_it(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    mask = np.zeros((30, 40), bool)
    mask[10:20, 20:40] = True  # x from 200 to 400, y from 100 to 200
    spots = grid_spots(mask, 50.0, slide)
    assert {tuple(p) for p in spots.xy} == {(x, y) for x in (225, 275, 325, 375) for y in (125, 175)}
    assert spots.barcodes[0] == "x4_y2"
    with pytest.raises(SlideError, match="no tissue was found"):
        grid_spots(np.zeros((30, 40), bool), 50.0, slide)


def test_tissue_is_found_by_its_colour(tmp_path: Path) -> None:
    pixels = np.full((300, 400, 3), 245, np.uint8)
    pixels[80:220, 100:300] = (200, 120, 170)
    pixels[:, :10] = 0  # the black border of a scan
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    mask = tissue_mask(open_slide(tmp_path / "slide.png"))
    truth = np.zeros((300, 400), bool)
    truth[80:220, 100:300] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


def test_tissue_given_as_mask_or_geojson(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 20:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert np.array_equal(tissue_mask(slide, tmp_path / "mask.png"), mask > 0)
    ring = [[100, 50], [300, 50], [300, 250], [100, 250], [100, 50]]
    hole = [[150, 100], [200, 100], [200, 150], [150, 150], [150, 100]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring, hole]}}
    (tmp_path / "t.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    drawn = tissue_mask(slide, tmp_path / "t.geojson")
    assert drawn.sum() == pytest.approx(200 * 200 - 50 * 50, rel=0.03)
    assert drawn[200, 250]
    assert not drawn[125, 175]
    for text in ("no json", "[]", '{"type": "Point", "coordinates": [1, 2]}', '{"type": "FeatureCollection"}'):
        (tmp_path / "bad.geojson").write_text(text)
        with pytest.raises(SlideError, match=r"bad\.geojson"):
            tissue_mask(slide, tmp_path / "bad.geojson")
