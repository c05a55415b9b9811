"""Tiles made smaller by torch are those that Pillow makes, px for px, and Pillow makes them wherever torch cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch  # noqa: F401  (what is tested is taken where it is loaded)
from numpy.typing import NDArray

from nh2st_pipe.slides import open_slide, resample
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.slides.resample import Interpolation, times_smaller


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "noise.tif"
    pixels = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    return path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "out", "by_torch"),
    [(64, 32, True), (96, 32, True), (48, 32, False), (65, 32, False), (16, 32, False), (128, 32, True)],
)
@pytest.mark.parametrize("centre", [(200, 150), (3, 290), (200.5, 150), (1000, 1000)])
def test_the_px_are_those_of_pillow(
    noise: Path,
    size: int,
    out: int,
    by_torch: bool,
    centre: tuple[float, float],
    interpolation: Interpolation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_torch = list[int]()
    shrunk = resample.shrunk

    def counted(pixels: NDArray[np.uint8], times: int, interpolation: Interpolation) -> NDArray[np.uint8]:
        with_torch.append(times)
        return shrunk(pixels, times, interpolation)

    monkeypatch.setattr("nh2st_pipe.slides.base.shrunk", counted)
    slide = open_slide(noise)
    tile = read_tile(slide, centre, size, out, interpolation)
    monkeypatch.setattr("nh2st_pipe.slides.base.times_smaller", lambda *_: None)
    np.testing.assert_array_equal(tile, read_tile(slide, centre, size, out, interpolation))
    assert with_torch == ([size // out] if by_torch and centre[0] == round(centre[0]) else [])
    slide.close()


def test_torch_is_not_loaded_for_it_nor_taken_where_it_gives_other_px(monkeypatch: pytest.MonkeyPatch) -> None:
    assert times_smaller(2.0, (0.0, 0.0), "bicubic") == 2
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "torch")
        assert times_smaller(2.0, (0.0, 0.0), "bicubic") is None
    resample._same.cache_clear()
    shrunk = resample.shrunk
    monkeypatch.setattr(resample, "shrunk", lambda *a: shrunk(*a) ^ 1)
    assert times_smaller(2.0, (0.0, 0.0), "bicubic") is None
    resample._same.cache_clear()
