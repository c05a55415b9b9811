from __future__ import annotations

from pathlib import Path

import pytest

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.openslide import _mpp
from nh2st_pipe.slides.resolution import TileSize, choose_mpp
from tests.conftest import blank


def test_mpp_of_manifest_goes_before_the_files() -> None:
    assert choose_mpp(None, 0.25) == (0.25, "file", None)
    assert choose_mpp(0.5, None) == (0.5, "manifest", None)
    assert choose_mpp(None, None)[:2] == (None, "unknown")
    assert choose_mpp(0.5, 0.51)[2] is None
    notice = choose_mpp(0.5, 0.25)[2]
    assert notice is not None
    assert "0.5 in the manifest and 0.25 in the file" in notice


def test_tile_size_in_um_needs_a_resolution(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    assert TileSize(um=112).on_slide(0.5, slide) == 224
    assert TileSize(level0_px=224).on_slide(None, slide) == 224
    with pytest.raises(SlideError, match="give mpp in the manifest"):
        TileSize(um=112).on_slide(None, slide)


def test_what_no_scanner_can_have_made_is_passed_over_and_said() -> None:
    mpp, source, notice = choose_mpp(None, 352.8)  # a TIFF's 72 dpi
    assert (mpp, source) == (None, "unknown")
    assert notice is not None
    assert "the file says 352.8 µm per px, which is passed over" in notice
    assert choose_mpp(0.5, 352.8)[:2] == (0.5, "manifest")
    assert choose_mpp(None, 0.05)[0] == 0.05


def test_px_that_are_not_square_are_refused() -> None:
    def of(x: str, y: str) -> float | None:
        return _mpp({"openslide.mpp-x": x, "openslide.mpp-y": y}, Path("a.svs"))

    assert of("0.5", "0.51") == pytest.approx(0.505)
    assert of("0.5", "none") == 0.5
    with pytest.raises(SlideError, match=r"a\.svs has px of 0\.5 × 1 µm"):
        of("0.5", "1.0")
