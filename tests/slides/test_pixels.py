"""One rule for px: the same picture in every layout, with every property, by every reader, or a refusal by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import UndecodedError
from nh2st_pipe.slides.czi import CziSlide
from nh2st_pipe.slides.omezarr import OmeZarrSlide
from nh2st_pipe.slides.openslide import OpenSlideSlide
from nh2st_pipe.slides.raster import RasterSlide
from nh2st_pipe.slides.tiff import TiffPieces, TiffSlide
from tests.slides.pictures import CELLS, HEIGHT, PROPERTIES, WIDTH, picture, smooth

READERS = (OpenSlideSlide, TiffSlide, RasterSlide, OmeZarrSlide, CziSlide)


@pytest.mark.parametrize(("layout", "name"), CELLS)
def test_the_same_picture_or_a_refusal_by_name(tmp_path: Path, layout: str, name: str) -> None:
    path, shown = picture(tmp_path, layout, name)
    refused = PROPERTIES[name].refused
    if refused is not None:
        with pytest.raises(SlideError, match=f"{path.name} .*{refused}"):
            open_slide(path)
    else:
        _check(open_slide(path), shown)
    for reader in READERS:
        if path.is_dir() != (reader is OmeZarrSlide):
            continue
        try:
            slide = reader(path)
            slide.try_decoding()
        except SlideError as error:
            said = str(error)
        else:
            _check(slide, shown)
            continue
        assert path.name in said


def _check(slide: Slide, shown: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    assert slide.size == (WIDTH, HEIGHT)
    for level, (step, _) in enumerate(slide.steps):
        width, height = round(WIDTH / step), round(HEIGHT / step)
        region = slide.read_region(0, 0, width, height, level).astype(int)
        every = shown[:: int(step), :: int(step)]
        assert np.abs(region - every).max() <= 3, (type(slide).__name__, level)
    slide.close()


@pytest.mark.parametrize("profile", ["sRGB", "XYZ", "damaged", None])
@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif", "tiled.tif", "a.png"])
def test_a_profile_that_is_not_applied_is_said_to_be_none(tmp_path: Path, name: str, profile: str | None) -> None:
    data = {"damaged": b"profile" * 30, None: None}.get(profile)
    if profile in ("sRGB", "XYZ"):
        data = ImageCms.ImageCmsProfile(ImageCms.createProfile(profile)).tobytes()  # type: ignore[arg-type]
    if name == "a.png":
        Image.fromarray(smooth()).save(tmp_path / name, icc_profile=data)
    else:
        tags = [] if data is None else [(34675, 7, len(data), data, True)]
        tile = (64, 64) if name == "tiled.tif" else None
        tifffile.imwrite(tmp_path / name, smooth(), photometric="rgb", ome="ome" in name, tile=tile, extratags=tags)
    notices = open_slide(tmp_path / name).notices
    named = {"XYZ": "XYZ", "damaged": "unreadable"}.get(profile or "")
    if named is None:
        assert notices == ()
    else:
        assert [words for words in notices if f"ICC profile ('{named}" in words and "is not applied" in words]


@pytest.mark.parametrize(
    ("said", "largest", "expected"),
    [
        ({"SignificantBits": 12}, 1000, "12 bits a px are read as their upper 8"),  # a dark one
        ({"SignificantBits": 16}, 4000, "12 bits a px (of 16; the largest value found is 4,000) are read"),
        ({"SignificantBits": 12}, 60_000, "16 bits a px are read as their upper 8"),  # what is said is not so
        ({}, 900, "10 bits a px (of 16; the largest value found is 900) are read"),
    ],
)
def test_as_many_bits_count_as_the_file_says_or_holds(
    tmp_path: Path, said: dict[str, int], largest: int, expected: str
) -> None:
    values = (smooth().astype(np.float64) * largest / smooth().max()).astype(np.uint16)
    options = {"ome": True, "metadata": {"axes": "YXS", **said}}
    tifffile.imwrite(tmp_path / "a.ome.tif", values, photometric="rgb", tile=(64, 64), **options)  # type: ignore[arg-type]
    slide = open_slide(tmp_path / "a.ome.tif")
    assert expected in slide.notices[0]
    bits = int(expected.split()[0])
    assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT, 0), np.minimum(values >> (bits - 8), 255))


def test_a_largest_value_that_the_tag_says_counts(tmp_path: Path) -> None:
    values = smooth().astype(np.uint16) * 4
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(281, 3, 3, (4095,) * 3, True)])
    slide = open_slide(tmp_path / "a.tif")
    assert slide.notices == ("12 bits a px are read as their upper 8",)
    assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT, 0), values >> 4)


def test_px_of_sixteen_bits_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((50, 60, 3), np.uint16), photometric="rgb")
    with pytest.raises(SlideError, match=r"a\.tif holds px of 16 bits that are all zero"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("pages", [2, 4, 5])
def test_a_stack_of_grey_pages_is_refused_by_name(tmp_path: Path, pages: int) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for _ in range(pages):
            file.write(smooth()[..., 0], photometric="minisblack", metadata=None)
    with pytest.raises(
        SlideError, match=rf"a\.tif is a TIFF of IYX \({pages}, {HEIGHT}, {WIDTH}\), and a slide has one picture"
    ):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_of_pages_of_the_same_size_the_first_is_read_and_that_is_said(
    tmp_path: Path, tile: tuple[int, int] | None
) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in (smooth(), 255 - smooth(), smooth()):
            file.write(page, photometric="rgb", metadata=None, tile=tile)
    slide = open_slide(tmp_path / "a.tif")
    assert slide.notices == ("page 1 of 3 of the same size is read",)
    assert np.array_equal(slide.read_region(0, 0, WIDTH, HEIGHT, 0), smooth())


@pytest.mark.parametrize("cannot", ["openslide", "pillow", "tifffile"])
def test_a_library_that_claims_a_file_and_cannot_decode_it_hands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot: str
) -> None:
    """Decided by trying, whatever the file says it is packed with."""
    layout = {"openslide": "tiles", "pillow": "strips", "tifffile": "OME-TIFF, tiles"}[cannot]
    path, shown = picture(tmp_path, layout, "8 bits")
    of = {"openslide": OpenSlideSlide, "pillow": RasterSlide, "tifffile": TiffSlide}[cannot]
    assert type(open_slide(path)) is of

    def fails(self: object) -> None:
        raise UndecodedError(f"{path} is packed in an unknown way")

    monkeypatch.setattr(of, "try_decoding", fails)
    slide = open_slide(path)
    assert type(slide) is not of
    _check(slide, shown)
    for other in (OpenSlideSlide, RasterSlide, TiffSlide):
        monkeypatch.setattr(other, "try_decoding", fails)
    with pytest.raises(SlideError, match="packed in an unknown way"):
        open_slide(path)


def test_a_level_that_we_decode_in_another_way_is_openslides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shown = picture(tmp_path, "pyramid of pages", "8 bits")
    slide = open_slide(path)
    assert isinstance(slide, OpenSlideSlide)
    assert slide._direct == {0: 0, 1: 1, 2: 2}
    monkeypatch.setattr("nh2st_pipe.slides.tiff.to_rgb", lambda values, of: 255 - values[..., :3])
    other = open_slide(path)
    assert isinstance(other, OpenSlideSlide)
    assert other._direct == {}
    assert "tifffile" not in other.reader
    _check(other, shown)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_level_is_tried_even_where_openslide_would_begin_between_two_px(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """The sides of level 1 are rounded, so that no tile but the first begins at a whole px of level 0."""
    pixels = np.asarray(Image.fromarray(smooth()).resize((401, 301)))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for level in (pixels, pixels[:300:3, :400:3]):
            options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb", "metadata": None}
            file.write(level, subfiletype=int(level is not pixels), **options)  # type: ignore[arg-type]
    whole = TiffPieces.decode

    def other(self: TiffPieces, level: int, row: int, column: int) -> NDArray[np.uint8]:
        found = whole(self, level, row, column)
        return 255 - found if level == wrong else found

    assert sorted(open_slide(tmp_path / "a.tif")._direct) == [0, 1]  # type: ignore[attr-defined]
    monkeypatch.setattr(TiffPieces, "decode", other)
    # Where what is decoded at full resolution is not the same, nothing is.
    assert sorted(open_slide(tmp_path / "a.tif")._direct) == ([0] if wrong else [])  # type: ignore[attr-defined]
