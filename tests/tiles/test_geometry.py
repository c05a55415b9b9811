from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import ExpressionError, SlideError, UsageError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.geometry import (
    WAYS,
    check_on_image,
    check_pitch,
    check_tile,
    mask_notices,
    on_tissue,
    spots_say,
    tissue_notices,
)
from nh2st_pipe.tiles.lattice import is_hexagonal
from nh2st_pipe.tiles.layout import resolution_of
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.tiles.spots import Spots, read_spots
from tests.conftest import Study, blank, grid_positions, write_spots

HERE = Path("a.h5ad")
Askew = tuple[NDArray[np.bool_], tuple[int, int], NDArray[np.float64]]


def square(pitch: float, **more: object) -> Spots:
    xy = grid_positions(5, pitch)[0]
    return Spots([f"b{i}" for i in range(len(xy))], xy, **more)  # type: ignore[arg-type]


def visium(pitch: float) -> Spots:
    row, column = (axis.ravel() for axis in np.mgrid[:6, :6])
    column = 2 * column + row % 2
    xy = np.column_stack((column * pitch / 2, row * pitch * np.sqrt(3) / 2)) + pitch
    return Spots([f"b{i}" for i in range(len(xy))], xy, row, column)


def test_spots_outside_the_image_are_named(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    check_on_image(Spots(["a", "b"], np.array([[0.0, 0.0], [400.0, 300.0]])), slide)
    for x, y in ((-1, 5), (401, 5), (5, -1), (5, 301)):
        with pytest.raises(SlideError, match="1 of 2 spots lie outside"):
            check_on_image(Spots(["a", "b"], np.array([[5.0, 5.0], [x, y]])), slide)
    with pytest.raises(SlideError, match=r"1 of 2 spots lie outside .*: b; b is at x=300, y=400"):
        check_on_image(Spots(["a", "b"], np.array([[0.0, 0.0], [300.0, 400.0]])), slide)


def test_a_tile_shows_something_and_is_no_larger_than_the_slide(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    for fine in (8, 224, 400):
        check_tile(fine, slide)
    for size, what in (
        (0.3, "would be 0.3 px wide"),
        (7.9, "7.9 px"),
        (401, "400 × 300 px, and one tile would be 401 px"),
    ):
        with pytest.raises(SlideError, match=what):
            check_tile(size, slide)


def test_tile_sizes_that_cannot_be_are_refused_before_or_at_their_slide(study: Study) -> None:
    with pytest.raises(UsageError, match="--tile-px takes 8 or more"):
        study.embed(tile_px=0.3)
    assert not (study.folder / "store.zarr").exists()
    failed = study.embed(tile_px=5000).failed
    assert set(failed) == {"s0", "s1", "s2"}
    assert "one tile would be 5,000 px wide" in failed["s0"]


@pytest.mark.parametrize(("image", "scale"), [("hires", 0.1), ("lowres", 0.03)])
def test_coordinates_of_a_smaller_image_are_refused_where_the_spots_would_overlap(image: str, scale: float) -> None:
    scales = {"hires": 0.1, "lowres": 0.03}
    assert check_pitch(square(100, diameter_px=55, scales=scales), 110, HERE) == []
    assert check_pitch(square(16, diameter_px=16), 224, HERE) == []  # Visium HD: bins touch
    with pytest.raises(ExpressionError, match=rf"a\.h5ad.*55 px wide.*divide it by tissue_{image}_scalef \({scale}\)"):
        check_pitch(square(100 * scale, diameter_px=55, scales=scales), 110, HERE)
    with pytest.raises(ExpressionError, match=r"not in full-resolution pixels$"):
        check_pitch(square(10, diameter_px=55), 110, HERE)


def test_a_files_own_scale_factors_are_read_and_used_by_embed(study: Study) -> None:
    def hires(data: anndata.AnnData) -> None:
        factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 22.0, "fiducial_diameter_fullres": 40.0}
        data.uns["spatial"] = {"library": {"scalefactors": factors, "images": {}}}

    xy, grid = grid_positions(5, 40.0)
    write_spots(study.folder / "s0.h5ad", xy, grid=grid, change=hires)
    write_spots(study.folder / "s1.h5ad", xy * 0.1, grid=grid, change=hires)
    spots = read_spots(study.folder / "s0.h5ad")
    assert (spots.diameter_px, spots.scales) == (22.0, {"hires": 0.1})
    summary = study.embed()
    assert summary.done == ["s0", "s2"]
    assert "divide it by tissue_hires_scalef (0.1)" in summary.failed["s1"]
    store = open_store(study.folder / "store.zarr")
    for slide_id, width in (("s0", 22.0), ("s2", 20.0)):  # by its file; half of the pitch where that does not say
        assert store.read(slide_id).uns["spatial"][slide_id]["scalefactors"]["spot_diameter_fullres"] == width


@pytest.mark.parametrize(
    "uns",
    [
        {"spatial": 3},
        {"spatial": {"a": {"scalefactors": {"spot_diameter_fullres": 5.0}}, "b": {}}},
        {"spatial": {"a": {"scalefactors": {"spot_diameter_fullres": "wide", "tissue_hires_scalef": -1.0}}}},
        {"spatial": {"a": {}}},
    ],
)
def test_scale_factors_that_are_none_are_no_fault(tmp_path: Path, uns: dict[str, object]) -> None:
    def change(data: anndata.AnnData) -> None:
        data.uns.update(uns)

    spots = read_spots(write_spots(tmp_path / "a.h5ad", grid_positions(2, 40.0)[0], change=change))
    assert (spots.diameter_px, spots.scales) == (None, {})


def test_unlikely_pitches_are_said() -> None:
    assert check_pitch(square(100), 224, HERE) == []
    assert "as for Visium HD" in check_pitch(square(10), 163, HERE)[0]
    assert "are small for spots 500 px apart" in check_pitch(square(500), 20, HERE)[0]
    with pytest.raises(ExpressionError, match="most spots lie at the place of another"):
        check_pitch(Spots(["a", "b"], np.zeros((2, 2))), 50, HERE)
    assert check_pitch(Spots(["a"], np.zeros((1, 2))), 50, HERE) == []


@pytest.mark.parametrize("turned", [False, True])
def test_the_arrays_pitch_gives_the_resolution(turned: bool) -> None:
    rng = np.random.default_rng(0)

    def laid(spots: Spots, pitch: float) -> Spots:
        xy = spots.xy + rng.normal(0, 0.05 * pitch, spots.xy.shape)
        return replace(spots, xy=xy[:, ::-1].copy() if turned else xy)

    said = spots_say(laid(visium(200), 200))
    assert said is not None
    assert said.sure
    assert said.mpp == pytest.approx(0.5, rel=0.02)
    assert "100 µm pitch of Visium's hexagonal array" in said.source
    row, column = grid_positions(8, 290)[1].T
    xy = grid_positions(8, 290)[0]
    square_array = Spots([f"b{i}" for i in range(len(xy))], xy, row, column)
    said = spots_say(laid(square_array, 290))
    assert said is not None
    assert not said.sure
    assert said.mpp == pytest.approx(200 / 290, rel=0.02)
    assert spots_say(replace(square_array, array_row=None)) is None
    assert spots_say(replace(square_array, array_row=row * 200)) is None  # bins, not spots
    assert spots_say(replace(square_array, xy=rng.uniform(0, 2000, xy.shape))) is None
    assert spots_say(square_array.take(np.arange(8))) is None  # in one line
    hd = spots_say(replace(square_array, mpp=0.27))
    assert hd is not None
    assert (hd.mpp, hd.sure) == (0.27, True)


def _hexagonal(n: int, pitch: float) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    row, column = (axis.ravel() for axis in np.mgrid[:n, :n])
    xy = np.column_stack(((column + row % 2 / 2) * pitch, row * pitch * np.sqrt(3) / 2)) + 50
    return xy, row, column


@pytest.mark.parametrize(("turned_over", "apart"), [(False, 0.2), (True, 0.2), (False, 0.6)])
def test_indices_that_are_visiums_own_tell_the_array_and_positions_only_its_scale(
    turned_over: bool, apart: float
) -> None:
    row, column = (axis.ravel() for axis in np.mgrid[:8, :8])
    xy = np.column_stack((column, row)) * 200.0  # rows are not shifted: 0.2 of a pitch from where they would be
    xy = xy + np.random.default_rng(0).normal(0, 200 * (apart - 0.2), xy.shape)
    xy = xy[:, ::-1] if turned_over else xy
    said = spots_say(Spots([f"b{i}" for i in range(len(xy))], xy, row, 2 * column + row % 2))
    if apart > 0.35:
        assert said is None
        return
    assert said is not None
    assert said.sure
    assert said.mpp == pytest.approx(0.5, rel=0.08)


@pytest.mark.parametrize("first_row", [0, 1])
def test_a_hexagonal_array_whose_columns_are_counted_one_by_one_is_no_square_one(first_row: int) -> None:
    """As some write Visium: taken for ST's square array it would have nearly twice the µm per px."""
    xy, row, column = _hexagonal(12, 200.0)
    spots = Spots([f"b{i}" for i in range(len(xy))], xy, row + first_row, column)
    said = spots_say(spots)
    assert said is not None
    assert said.sure
    assert said.mpp == pytest.approx(0.5, rel=1e-3)
    turned = spots_say(replace(spots, xy=xy @ np.array([[0.8, 0.6], [-0.6, 0.8]]) + 5000))
    assert turned is not None
    assert turned.mpp == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "changed",
    [
        lambda xy, row, column: (xy * (1.0, 1.3), row, column),  # steps of two lengths
        lambda xy, row, column: (xy + np.random.default_rng(0).normal(0, 40, xy.shape), row, column),
        lambda xy, row, column: (xy, row, np.random.default_rng(0).permutation(column)),
    ],
)
@pytest.mark.parametrize("hexagonal", [False, True])
def test_what_only_resembles_an_array_says_no_resolution(changed: Callable[..., Any], hexagonal: bool) -> None:
    xy, row, column = _hexagonal(10, 200.0)
    if not hexagonal:
        xy = np.asarray(np.column_stack((column, row)) * 200.0, np.float64)
    xy, row, column = changed(xy, row, column)
    assert spots_say(Spots([f"b{i}" for i in range(len(xy))], xy, row, column)) is None


def test_a_slide_that_does_not_say_its_resolution_has_that_of_its_array(study: Study) -> None:
    summary = study.embed(tile_px=None, tile_um=240)
    assert summary.done == ["s0", "s1", "s2"]
    assert any("5 µm per px is estimated from the 200 µm pitch of a square array" in each for each in summary.notices)
    data = open_store(study.folder / "store.zarr").read("s0")
    assert data.mpp == pytest.approx(5.0)
    assert data.uns["image"]["mpp_source"] == "spots"


def test_visiums_array_is_known_by_its_indices() -> None:
    assert is_hexagonal(visium(10).grid)
    assert not is_hexagonal(grid_positions(6, 10)[1])
    assert not is_hexagonal(2 * grid_positions(6, 10)[1])  # a square grid counted in twos
    assert not is_hexagonal(None)
    assert not is_hexagonal(np.array([[0, 0], [1, 1]]))


@pytest.fixture(scope="module")
def askew() -> Askew:
    """A mask like no turned one of itself, the size of its slide, and spots on it."""
    mask = np.zeros((60, 80), np.bool_)
    mask[5:20, 3:70] = mask[5:50, 3:15] = True
    row, column = np.nonzero(mask)
    return mask, (800, 600), np.column_stack((column, row))[::7].astype(np.float64) * 10 + 5


@pytest.mark.parametrize("way", WAYS)
def test_spots_that_would_fit_the_tissue_otherwise_are_said_to(askew: Askew, way: str) -> None:
    mask, size, xy = askew
    assert on_tissue(xy, mask, size) == 1
    assert tissue_notices(xy, mask, size) == []
    turns = {"turned by 90° clockwise": "turned by 90° anticlockwise"}
    turns |= {back: way for way, back in turns.items()}
    wrong = WAYS[turns[way]](xy, size[::-1]) if way in turns else WAYS[way](xy, size)
    found = tissue_notices(wrong, mask, size)
    assert f"100% would if they were {way}" in found[0]


def test_few_spots_on_tissue_are_said(askew: Askew) -> None:
    mask, size, _ = askew
    away = np.array([[790.0, 590.0]] * 10)
    assert "only 0% of the spots" in tissue_notices(away, mask, size)[0]
    assert tissue_notices(away, np.zeros_like(mask), size) == []  # nothing found: nothing to say


def test_swapped_coordinates_are_said_by_embed(study: Study) -> None:
    pixels = np.full((480, 480, 3), 245, np.uint8)
    pixels[20:120, 20:460] = pixels[20:460, 20:60] = (190, 110, 160)
    Image.fromarray(pixels).save(study.folder / "s1.png")
    xy = np.array([[x, 70.0] for x in range(40, 460, 40)])
    write_spots(study.folder / "s1.h5ad", xy[:, ::-1])
    said = [notice for notice in study.embed().notices if "swapped" in notice]
    assert said == [
        "s1: 18% of the spots lie on tissue, and 100% would if they were with x and y swapped: "
        "does obsm['spatial'] hold x, y of this image?"
    ]


def test_a_mask_of_another_shape_is_said(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    assert mask_notices(np.zeros((30, 40), bool), slide) == []
    assert mask_notices(np.zeros((31, 40), bool), slide) == []
    assert mask_notices(np.zeros((2, 3), bool), slide) == []  # rounded, not stretched
    assert (
        "300 × 300 px and the slide 400 × 300: it is stretched by 33%"
        in mask_notices(np.zeros((300, 300), bool), slide)[0]
    )


def test_what_is_said_of_a_mask_is_said_by_embed(study: Study) -> None:
    Image.new("L", (100, 60), 255).save(study.folder / "m.png")
    lines = study.manifest.read_text().splitlines()
    lines = [f"{lines[0]},tissue", f"{lines[1]},m.png", f"{lines[2].rpartition(',')[0]},,m.png", f"{lines[3]},"]
    study.manifest.write_text("\n".join(lines) + "\n")
    said = [notice for notice in study.embed().notices if "stretched" in notice]
    assert [notice[:3] for notice in said] == ["s0:", "s1:"]


def test_spots_are_read_for_a_resolution_where_nothing_else_says_it(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of counts may have gigabytes."""
    row = read_manifest(study.manifest)[0]
    slide = open_slide(row.slide)
    assert resolution_of(row, slide).source == "spots"

    def read(path: Path) -> Spots:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("nh2st_pipe.tiles.layout.read_spots", read)
    assert resolution_of(replace(row, mpp=0.5), slide).mpp == 0.5
    with pytest.raises(AssertionError, match="was read"):
        resolution_of(row, slide)
