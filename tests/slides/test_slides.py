from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.levels import step_of, true_levels
from nh2st_pipe.slides.openslide import OpenSlideSlide, _full_resolution_missing, _origin
from nh2st_pipe.slides.raster import RasterSlide
from tests.conftest import Study, picture


def write_pyramid(path: Path, pixels: NDArray[np.uint8], mpp: float | None = 0.5) -> None:
    resolution = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    with tifffile.TiffWriter(path) as tif:
        for level in range(3):
            image = Image.fromarray(pixels).reduce(2**level) if level else Image.fromarray(pixels)
            tif.write(
                np.asarray(image),
                tile=(64, 64),
                compression="zlib",
                photometric="rgb",
                subfiletype=1 if level else 0,
                resolution=None if resolution is None else tuple(r / 2**level for r in resolution),
                resolutionunit="CENTIMETER" if resolution else None,
            )


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return picture(512, 384, seed=3)


def test_a_pyramid_goes_through_openslide_and_a_png_does_not(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pyramid, plain = open_slide(tmp_path / "a.tif"), open_slide(tmp_path / "a.png")
    assert isinstance(pyramid, OpenSlideSlide)
    assert isinstance(plain, RasterSlide)
    assert pyramid.size == plain.size == (512, 384)
    assert pyramid.mpp == pytest.approx(0.5)
    assert plain.mpp is None
    assert pyramid.steps == ((1, 1), (2, 2), (4, 4))
    for region in ((0, 0, 512, 384), (100, 50, 60, 70), (-20, -10, 50, 40), (490, 370, 50, 40), (600, 600, 8, 8)):
        assert np.array_equal(pyramid.read_region(*region, 0), plain.read_region(*region, 0)), region


def test_outside_the_image_is_white(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    tile = read_tile(open_slide(tmp_path / "a.tif"), (0.0, 0.0), 64, 64, "bicubic")
    assert (tile[:32] == 255).all()
    assert (tile[:, :32] == 255).all()
    assert np.array_equal(tile[32:, 32:], pixels[:32, :32])


def test_a_tile_at_full_resolution_is_the_pixels_themselves(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    for x, y in ((200.2, 150.4), (199.8, 149.7)):  # the nearest px, on both sides
        assert np.array_equal(read_tile(slide, (x, y), 64, 64, "bicubic"), pixels[118:182, 168:232])
    assert (read_tile(slide, (31.4, 31.4), 64, 64, "bicubic")[0] == 255).all()  # a px beyond the edge


@pytest.mark.parametrize("kind", ["a.tif", "a.png"])
@pytest.mark.parametrize("scale", [1.5, 2.0, 3.3, 5.0])
def test_a_resampled_tile_is_a_part_of_the_downsampled_whole(
    tmp_path: Path, pixels: NDArray[np.uint8], kind: str, scale: float
) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out, side = 40, 40 * scale
    box = (256 - side / 2, 192 - side / 2, 256 + side / 2, 192 + side / 2)
    expected = np.asarray(Image.fromarray(pixels).resize((out, out), Image.Resampling.BICUBIC, box=box)).astype(int)
    tile = read_tile(open_slide(tmp_path / kind), (256.0, 192.0), side, out, "bicubic").astype(int)
    assert np.abs(tile - expected).mean() < 1.0  # levels of a pyramid are averaged before; the places must agree
    shifted = np.roll(expected, 1, axis=1)
    assert np.abs(tile - expected).mean() < 0.5 * np.abs(tile - shifted).mean()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [1.3, 2.7, 7.9])
def test_a_resampled_tile_is_right_up_to_its_edge(
    tmp_path: Path, scale: float, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    """What lies around a tile is read too: without it a filter would mirror the tile's own edge."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    side = 40 * scale
    box = (200 - side / 2, 200 - side / 2, 200 + side / 2, 200 + side / 2)
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(Image.fromarray(noise).resize((40, 40), how, box=box))
    tile = read_tile(open_slide(tmp_path / "a.png"), (200.0, 200.0), side, 40, interpolation).astype(int)
    assert np.abs(tile - expected).max() <= 1


def test_the_coarsest_level_that_is_fine_enough_is_read(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    slide, levels = open_slide(tmp_path / "a.tif"), list[int]()
    read = slide.read_region

    def recording(x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        levels.append(level)
        return read(x, y, width, height, level)

    monkeypatch.setattr(slide, "read_region", recording)
    for scale in (0.5, 1.0, 1.9, 2.0, 3.0, 4.0, 7.0):
        read_tile(slide, (256.0, 192.0), 40 * scale, 40, "bicubic")
    assert levels == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("directly", [True, False])
def test_a_level_that_is_not_the_whole_made_smaller_is_passed_over(
    tmp_path: Path, pixels: NDArray[np.uint8], directly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not directly:
        monkeypatch.setattr("nh2st_pipe.slides.openslide._PLAIN_TILES", ())
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for level, part in enumerate((pixels, pixels[::2, ::3], pixels[::4, ::4])):
            tif.write(part, tile=(64, 64), compression="zlib", photometric="rgb", subfiletype=1 if level else 0)
    slide = open_slide(tmp_path / "a.tif")
    assert isinstance(slide, OpenSlideSlide)
    assert bool(slide._direct) is directly
    assert slide.steps == ((1, 1), (4, 4))
    assert [note for note in slide.notices if "is not the whole of 512 × 384 px made smaller" in note]
    assert np.array_equal(slide.read_region(0, 0, 128, 96, 1), pixels[::4, ::4])


@pytest.mark.parametrize(
    ("size", "down", "more", "good"),
    [
        ((250, 190), 2.0, 0, True),
        ((249, 189), 2.0, 0, True),  # rounded down to even numbers, and once more
        ((256, 256), 2.0, 256, True),  # filled up with whole tiles
        ((256, 256), 2.0, 0, False),
        ((250, 190), 3.0, 40, False),
        ((250, 100), 2.0, 256, False),
    ],
)
def test_sizes_of_levels_may_be_rounded_and_filled_up(
    size: tuple[int, int], down: float, more: int, good: bool
) -> None:
    kept, words = true_levels([(500, 380), size], [(1.0, 1.0), (down, down)], [more, more])
    assert (kept, len(words)) == (([0, 1], 0) if good else ([0], 1))


@pytest.mark.parametrize(
    ("level", "filled", "step"),
    [
        ((1000, 800), 0, (10, 10)),
        ((1000, 799), 0, (10, 10)),  # rounded down
        ((1001, 801), 0, (10, 10)),
        ((1024, 1024), 256, (10, 10)),  # filled up with whole tiles
        ((990, 800), 0, (10_005 / 990, 7_998 / 800)),  # made smaller by no whole number, and each side by its own
    ],
)
def test_a_level_is_so_many_times_smaller_along_each_side(
    level: tuple[int, int], filled: int, step: tuple[float, float]
) -> None:
    assert step_of((10_005, 7_998), level, filled) == pytest.approx(step)


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
def test_a_mark_far_from_the_corner_is_where_it_is_on_every_level(tmp_path: Path, name: str) -> None:
    """Sides of levels that are rounded each in its own way: with their mean, places far away would move."""
    pixels = np.full((257, 20_000, 3), 240, np.uint8)
    pixels[120:136, 15_000:15_016] = (200, 30, 40)
    with tifffile.TiffWriter(tmp_path / name, ome="ome" in name) as tif:
        options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
        of = {"subifds": 1, "metadata": {"axes": "YXS"}} if "ome" in name else {}
        tif.write(pixels, **of, **options)  # type: ignore[arg-type]
        small = np.asarray(Image.fromarray(pixels[:256]).reduce(8))
        tif.write(small, subfiletype=1, **options)  # type: ignore[arg-type]
    slide = open_slide(tmp_path / name)
    assert len(slide.steps) == 2
    tile = read_tile(slide, (15_008.0, 128.0), 128.0, 16, "bicubic").astype(int)
    assert np.argwhere(tile[..., 1] < 100).tolist() == [[7, 7], [7, 8], [8, 7], [8, 8]]


def test_what_properties_say_of_the_scan() -> None:
    assert not _full_resolution_missing({"openslide.objective-power": "40"}, 0.25)
    assert not _full_resolution_missing({"openslide.objective-power": "40"}, None)
    assert not _full_resolution_missing({"openslide.objective-power": "40 x"}, 4.0)
    assert "scanned at 40×" in _full_resolution_missing({"openslide.objective-power": "40"}, 4.0)[0]
    assert _origin({}) == (0, 0)
    assert _origin({"openslide.bounds-x": "300", "openslide.bounds-y": "20"}) == (300, 20)


def test_fine_stripes_come_out_grey_not_aliased(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    tile = read_tile(open_slide(tmp_path / "a.png"), (128.0, 128.0), 200, 25, "bicubic")
    assert np.abs(tile.astype(int) - 127).max() < 12


def test_a_plain_image_is_decoded_once(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    slide = RasterSlide(tmp_path / "a.jpg")
    opened = 0
    open_once = slide._open

    def counting() -> Image.Image:
        nonlocal opened
        opened += 1
        return open_once()

    monkeypatch.setattr(slide, "_open", counting)
    for x in range(0, 400, 40):
        slide.read_region(x, 0, 32, 32, 0)
    assert opened == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path: Path, pixels: NDArray[np.uint8], mode: str) -> None:
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.tif")
    region = open_slide(tmp_path / "a.tif").read_region(5, 5, 10, 10, 0)
    assert region.shape == (10, 10, 3)
    expected = np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))[5:15, 5:15]
    assert np.array_equal(region, expected)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (open_slide(tmp_path / "a.png").read_region(0, 0, 20, 20, 0) == 255).all()


def test_a_thumbnail_shows_the_whole_slide(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    small, scale = thumbnail(open_slide(tmp_path / "a.tif"), 100)
    assert small.shape == (75, 100, 3)
    assert scale == pytest.approx(100 / 512)
    expected = np.asarray(Image.fromarray(pixels).resize((100, 75), Image.Resampling.BOX)).astype(int)
    assert np.abs(small.astype(int) - expected).mean() < 3


def test_a_thumbnail_made_in_strips_is_the_one_made_at_once(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    whole = thumbnail(slide, 128)[0].astype(int)
    monkeypatch.setattr("nh2st_pipe.slides.base._STRIP_BYTES", 3 * 512 * 50)
    assert np.abs(thumbnail(slide, 128)[0].astype(int) - whole).max() <= 3  # strips end between px of the thumbnail


def test_files_that_are_no_slides(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    (tmp_path / "text.svs").write_text("not an image")
    (tmp_path / "empty.tif").touch()
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    write_pyramid(tmp_path / "whole.tif", pixels)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:2000])
    for name, message in (("text.svs", "not an image"), ("empty.tif", "empty file"), ("gone.tif", "there is no slide")):
        with pytest.raises(SlideError, match=message):
            open_slide(tmp_path / name)
    for name in ("cut.jpg", "cut.tif"):
        with pytest.raises(SlideError, match=rf"{name}.*(complete|damaged)"):
            open_slide(tmp_path / name).read_region(0, 0, 512, 384, 0)


def test_floating_point_px_are_refused(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels[..., 0].astype(np.float32) / 255).save(tmp_path / "a.tif")
    with pytest.raises(SlideError, match=r"a\.tif holds floating-point px"):
        RasterSlide(tmp_path / "a.tif")


def test_a_damaged_tile_fails_its_slide_alone_with_several_readers(study: Study) -> None:
    for name in ("s0", "s1"):
        whole = np.asarray(Image.open(study.folder / f"{name}.png").convert("RGB"))
        tifffile.imwrite(study.folder / f"{name}.tif", whole, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(study.folder / "s0.tif") as file:
        page = file.pages[0]
        offset, length = page.dataoffsets[5], page.databytecounts[5]
    with (study.folder / "s0.tif").open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x00" * length)
    assert isinstance(open_slide(study.folder / "s0.tif"), OpenSlideSlide)
    study.manifest.write_text(study.manifest.read_text().replace("s0.png", "s0.tif").replace("s1.png", "s1.tif"))
    summary = study.embed(workers=2, batch_size=2)
    assert (summary.done, set(summary.failed)) == (["s1", "s2"], {"s0"})
    assert "is damaged near x=" in summary.failed["s0"]


def test_an_image_larger_than_the_memory_is_refused(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    opened = open_slide(tmp_path / "a.png")
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 1e5)
    with pytest.raises(SlideError, match="convert it to a tiled pyramidal TIFF"):
        open_slide(tmp_path / "a.png")
    with pytest.raises(SlideError, match=r"a\.png declares a picture of .* GB are free"):  # taken by others meanwhile
        opened.read_region(0, 0, 5, 5, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_read_as_their_upper_eight(tmp_path: Path, pixels: NDArray[np.uint8], name: str) -> None:
    grey = pixels[..., 0].astype(np.uint16) * 256 + 77
    if name == "a.png":
        Image.fromarray(grey).save(tmp_path / name)
    else:
        tifffile.imwrite(tmp_path / name, grey)
    slide = open_slide(tmp_path / name)
    height, width = grey.shape
    assert np.array_equal(slide.read_region(0, 0, width, height, 0), np.repeat(pixels[..., :1], 3, axis=2))
    assert slide.notices == ("16 bits a px are read as their upper 8",)


@pytest.mark.parametrize("turned", range(2, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_pixels_are_taken_as_they_are_stored_and_a_turned_file_is_said_to_be(
    tmp_path: Path, pixels: NDArray[np.uint8], name: str, turned: int
) -> None:
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = turned
    image.save(tmp_path / f"plain{name[1:]}")
    image.save(tmp_path / name, exif=exif)
    slide, plain = RasterSlide(tmp_path / name), RasterSlide(tmp_path / f"plain{name[1:]}")
    assert slide.size == plain.size == (pixels.shape[1], pixels.shape[0])
    region = slide.read_region(0, 0, *slide.size, 0)
    assert np.array_equal(region, plain.read_region(0, 0, *plain.size, 0))
    assert f"its orientation tag ({turned}) is passed over" in slide.notices[0]
    assert plain.notices == ()


def test_of_several_pages_the_largest_is_read(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    label = np.full((20, 30, 3), 7, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in (label, pixels, pixels[:40, :50]):
            file.write(page, photometric="rgb")
    slide = RasterSlide(tmp_path / "a.tif")
    assert slide.size == (pixels.shape[1], pixels.shape[0])
    assert np.array_equal(slide.read_region(0, 0, *slide.size, 0), pixels)
    assert slide.notices == ("page 2 of 3 is read, the largest; the first has 30 × 20 px",)


def test_what_a_file_is_read_as_is_said_by_embed(study: Study) -> None:
    grey = np.asarray(Image.open(study.folder / "s1.png").convert("L")).astype(np.uint16) * 256
    Image.fromarray(grey).save(study.folder / "s1.png")
    summary = study.embed()
    assert [notice for notice in summary.notices if "16 bits" in notice] == [
        "s1: 16 bits a px are read as their upper 8"
    ]
