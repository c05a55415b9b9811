from __future__ import annotations

from pathlib import Path

import pytest

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.openslide import _mpp
from nh2st_pipe.slides.resolution import Resolution, SpotsSay, TileSize, choose_mpp
from tests.conftest import blank


def test_mpp_of_manifest_goes_before_the_files() -> None:
    assert choose_mpp(None, 0.25) == Resolution(0.25, "file")
    assert choose_mpp(0.5, None) == Resolution(0.5, "manifest")
    assert choose_mpp(None, None) == Resolution(None, "unknown")
    assert choose_mpp(0.5, 0.51).doubts == ()
    both = choose_mpp(0.5, 0.25)
    assert (both.mpp, both.source) == (0.5, "manifest")
    assert "0.5 in the manifest and 0.25 in the file" in both.doubts[0]


def test_spots_say_the_resolution_where_nothing_else_does_and_contradict_where_they_are_sure() -> None:
    sure, unsure = SpotsSay(0.5, "Visium's array", sure=True), SpotsSay(0.5, "a square array", sure=False)
    for spots in (sure, unsure):
        found = choose_mpp(None, 352.8, spots)
        assert (found.mpp, found.source) == (0.5, "spots")
        words = f"0.5 µm per px is estimated from {spots.source}"
        assert words in (found.notes[1] if spots.sure else found.doubts[0])  # what may be another array is doubted
        assert len(found.notes) == 1 + spots.sure
        assert choose_mpp(0.52, None, spots) == Resolution(0.52, "manifest")
    assert "mpp is 0.25 by the file, and 0.5 by Visium's array" in choose_mpp(None, 0.25, sure).doubts[0]
    assert choose_mpp(None, 0.25, unsure).doubts == ()
    assert choose_mpp(None, None, SpotsSay(70.0, "coordinates of another image", sure=True)).mpp is None


def test_tile_size_in_um_needs_a_resolution(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    assert TileSize(um=112).on_slide(0.5, slide) == 224
    assert TileSize(level0_px=224).on_slide(None, slide) == 224
    with pytest.raises(SlideError, match="give mpp in the manifest"):
        TileSize(um=112).on_slide(None, slide)


def test_what_no_scanner_can_have_made_is_passed_over_and_said() -> None:
    found = choose_mpp(None, 352.8)  # a TIFF's 72 dpi
    assert (found.mpp, found.source) == (None, "unknown")
    assert "the file says 352.8 µm per px, which is passed over" in found.notes[0]
    assert (choose_mpp(0.5, 352.8).mpp, choose_mpp(0.5, 352.8).source) == (0.5, "manifest")
    assert choose_mpp(None, 0.05).mpp == 0.05


def test_px_that_are_not_square_are_refused() -> None:
    def of(x: str, y: str) -> float | None:
        return _mpp({"openslide.mpp-x": x, "openslide.mpp-y": y}, Path("a.svs"))

    assert of("0.5", "0.51") == pytest.approx(0.505)
    assert of("0.5", "none") == 0.5
    with pytest.raises(SlideError, match=r"a\.svs has px of 0\.5 × 1 µm"):
        of("0.5", "1.0")


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"aperio.MPP": "0.2527"}, 0.2527),
        ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5", "aperio.MPP": "0.2527"}, 0.5),
        (
            {f"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_{axis}": "0.2325" for axis in "XY"},
            0.2325,
        ),
        ({"ventana.ScanRes": "0.465"}, 0.465),
        ({"philips.DICOM_PIXEL_SPACING": '"0.000226907" "0.000226907"'}, 0.226907),
        (
            {
                "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0]": "0.0005",
                "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[1]": "0.0005",
            },
            0.5,
        ),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}, 0.25),
        ({"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"}, 0.5),
        ({"tiff.XResolution": "40000", "tiff.ResolutionUnit": "none"}, None),
        ({"aperio.MPP": "unknown"}, None),
        ({"aperio.MPP": "0"}, None),
        ({}, None),
    ],
)
def test_each_vendors_way_of_saying_the_resolution_is_known(properties: dict[str, str], mpp: float | None) -> None:
    assert _mpp(properties, Path("a.svs")) == (None if mpp is None else pytest.approx(mpp))


def test_sides_that_differ_are_refused_in_a_vendors_property_too() -> None:
    with pytest.raises(SlideError, match=r"a\.tiff has px of 0\.4 × 0\.2 µm"):  # rows first
        _mpp({"philips.DICOM_PIXEL_SPACING": '"0.0002" "0.0004"'}, Path("a.tiff"))
