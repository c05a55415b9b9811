"""Whole slide files of real scanners, where they are on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.openslide import OpenSlideSlide
from tests.conftest import SHARED

WSI = SHARED / "wsi"
SLIDES = {
    "CMU-1-Small-Region.svs": ((2220, 2967), (1.0,), 0.499),
    "tcga-cr-7395-no-mpp.svs": ((4443, 3567), (1.0, 2.0), None),
    "fluorescence-dapi.ndpi": ((3968, 4864), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), 0.2282),
    "camelyon-jpeg.dcm": ((1152, 700), (1.0,), 28.97),
    "camelyon-jpeg2000.dcm": ((1696, 812), (1.0,), 28.97),
    "sm-tiny.dcm": ((50, 50), (1.0,), 0.499),
    "boxes.tiff": ((300, 250), (1.0, 2.0, 4.0, 8.0), 352.8),
}


def real(name: str) -> Path:
    if not (WSI / name).is_file():
        pytest.skip(f"{name} is not on this machine")
    return WSI / name


@pytest.mark.parametrize("name", SLIDES)
def test_a_scanners_file_is_read(name: str) -> None:
    slide = open_slide(real(name))
    size, downsamples, mpp = SLIDES[name]
    assert slide.size == size
    assert np.allclose([step for step, _ in slide.steps], downsamples, rtol=0.02)
    assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
    picture, scale = thumbnail(slide, 200)
    assert max(picture.shape) == min(200, max(size))
    tile = read_tile(slide, (size[0] * 0.5, size[1] * 0.5), 40 / scale, 40, "bicubic").astype(int)
    at = [round(side * scale / 2) - 20 for side in size[::-1]]
    there = picture[at[0] : at[0] + 40, at[1] : at[1] + 40]
    assert np.abs(tile - there).mean() < 12
    slide.close()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-no-mpp.svs", "boxes.tiff"])
def test_tiles_that_are_decoded_here_are_openslides(name: str) -> None:
    slide, theirs = open_slide(real(name)), openslide.OpenSlide(str(real(name)))
    assert isinstance(slide, OpenSlideSlide)
    assert sorted(slide._direct) == list(range(theirs.level_count))
    for level, (width, height) in enumerate(theirs.level_dimensions):
        side = min(width, height, 500)
        middle = (width - side) // 2 & ~1, (height - side) // 3 & ~1
        for x, y in ((0, 0), middle, (width - side, height - side)):
            down = theirs.level_downsamples[level]
            at = (round(x * down), round(y * down)) if level else (x, y)
            if any(round(place / down) * down - place for place in at):
                continue  # OpenSlide takes level-0 px, and would begin between two px of this level
            expected = np.asarray(theirs.read_region(at, level, (side, side)).convert("RGB")).astype(int)
            assert np.abs(slide.read_region(x, y, side, side, level) - expected).max() <= 3


def test_a_picture_that_is_not_the_scan_itself_is_said_to_be_none() -> None:
    assert "marked as resampled" in open_slide(real("camelyon-jpeg.dcm")).notices[0]
    assert open_slide(real("sm-tiny.dcm")).notices == ()
    assert open_slide(real("CMU-1-Small-Region.svs")).notices == ()


def test_what_openslide_refuses_is_said_with_its_reason() -> None:
    with pytest.raises(SlideError, match=r"sm-tiny-jpegls\.dcm cannot be opened: .*transfer syntax"):
        open_slide(real("sm-tiny-jpegls.dcm"))
