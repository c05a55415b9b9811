"""Zeiss' CZI: scenes on one glass, levels, what is no brightfield picture, and what to do without the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pylibCZIrw.czi import create_czi

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile
from tests.slides.pictures import HEIGHT, WIDTH, czi, smooth


def _write(path: Path, *pieces: tuple[tuple[int, int], dict[str, Any]]) -> None:
    with create_czi(str(path)) as file:
        for location, more in pieces:
            file.write(np.ascontiguousarray(smooth()[..., ::-1]), location, **more)


def test_levels_and_resolution_are_those_of_the_file(tmp_path: Path) -> None:
    czi(tmp_path / "a.czi", smooth(), {})
    slide = open_slide(tmp_path / "a.czi")
    assert slide.steps == ((1, 1), (2, 2), (4, 4))
    assert slide.mpp == pytest.approx(0.5)
    assert slide.notices == ()
    tile = read_tile(slide, (60, 50), 32, 32, "bilinear")
    np.testing.assert_array_equal(tile, smooth()[34:66, 44:76])
    corner = slide.read_region(-3, -2, 6, 5, 0)
    assert (corner[:2] == 255).all()
    assert (corner[:, :3] == 255).all()
    np.testing.assert_array_equal(corner[2:, 3:], smooth()[:3, :3])
    slide.close()


def test_a_level_that_lacks_pieces_is_none(tmp_path: Path) -> None:
    czi(tmp_path / "a.czi", smooth(), {"cut": 2})
    slide = open_slide(tmp_path / "a.czi")
    assert slide.steps == ((1, 1), (4, 4))
    whole = read_tile(slide, (WIDTH / 2, HEIGHT / 2), HEIGHT, HEIGHT // 2, "bilinear")
    assert whole[-10:].std() > 1
    slide.close()


def test_px_that_are_not_square_are_refused(tmp_path: Path) -> None:
    czi(tmp_path / "a.czi", smooth(), {"czi": {"scale_y": 0.7e-6}})
    with pytest.raises(SlideError, match=r"a\.czi has px of 0\.5 × 0\.7 µm"):
        open_slide(tmp_path / "a.czi")


def test_scenes_lie_where_they_lie_on_the_glass_and_what_is_between_them_is_white(tmp_path: Path) -> None:
    _write(tmp_path / "a.czi", ((300, 20), {"scene": 0}), ((20, 400), {"scene": 1}))
    slide = open_slide(tmp_path / "a.czi")
    assert slide.size == (280 + WIDTH, 380 + HEIGHT)
    np.testing.assert_array_equal(slide.read_region(280, 0, WIDTH, HEIGHT, 0), smooth())
    np.testing.assert_array_equal(slide.read_region(0, 380, WIDTH, HEIGHT, 0), smooth())
    assert (slide.read_region(0, 0, 280, 380, 0) == 255).all()
    assert ["2 scenes" in words for words in slide.notices] == [True]
    slide.close()


@pytest.mark.parametrize(
    ("plane", "said"), [({"C": 1}, "2 channels"), ({"Z": 2}, "3 planes of focus"), ({"T": 1}, "2 times")]
)
def test_what_is_no_single_picture_is_refused_by_name(tmp_path: Path, plane: dict[str, int], said: str) -> None:
    axis, last = next(iter(plane.items()))
    _write(tmp_path / "a.czi", *(((0, 0), {"plane": {axis: number}}) for number in range(last + 1)))
    with pytest.raises(SlideError, match=rf"a\.czi has {said}"):
        open_slide(tmp_path / "a.czi")


def test_a_file_cut_short_is_said_to_be_that(tmp_path: Path) -> None:
    czi(tmp_path / "a.czi", smooth(), {})
    data = (tmp_path / "a.czi").read_bytes()
    for share in (0.01, 0.3, 0.999):
        (tmp_path / "cut.czi").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SlideError, match=r"cut\.czi cannot be opened \(is the file complete\?\)"):
            open_slide(tmp_path / "cut.czi")


def test_a_piece_said_to_be_larger_than_the_file_is_named(tmp_path: Path) -> None:
    """libCZI dies of it (SIGSEGV)."""
    czi(tmp_path / "a.czi", smooth(), {"levels": (1,)})
    data = bytearray((tmp_path / "a.czi").read_bytes())
    last = data.rfind(b"ZISRAWSUBBLOCK")
    data[last + 32 + 8 + 6] = 1
    (tmp_path / "a.czi").write_bytes(data)
    slide = open_slide(tmp_path / "a.czi")
    np.testing.assert_array_equal(slide.read_region(0, 0, 64, 64, 0), smooth()[:64, :64])
    with pytest.raises(SlideError, match=r"a\.czi is damaged near x=190, y=140.*piece 11 is said to have"):
        slide.read_region(190, 140, 10, 10, 0)
    slide.close()


def test_without_the_library_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    czi(tmp_path / "a.czi", smooth(), {})
    monkeypatch.setitem(sys.modules, "pylibCZIrw", None)
    with pytest.raises(SlideError, match=r"a\.czi is of the format that Zeiss writes.*install nh2st-pipe\[czi\]"):
        open_slide(tmp_path / "a.czi")
