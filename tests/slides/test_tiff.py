"""TIFFs that go through tifffile: the same px as tifffile itself gives, in any layout, and the right resolution."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.openslide import OpenSlideSlide
from nh2st_pipe.slides.raster import RasterSlide
from nh2st_pipe.slides.tiff import TiffSlide
from tests.conftest import Study, picture
from tests.slides.test_slides import write_pyramid

MPP = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
REGIONS = (
    (0, 0, 512, 384),
    (100, 50, 60, 70),
    (-20, -10, 50, 40),
    (490, 370, 50, 40),
    (600, 600, 8, 8),
    (63, 63, 2, 2),
)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return picture(512, 384, seed=3)


def ome_pyramid(path: Path, pixels: NDArray[Any], **options: Any) -> None:
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", **options}
    with tifffile.TiffWriter(path, ome=True, bigtiff=bool(options.pop("bigtiff", False))) as tif:
        tif.write(pixels, subifds=2, metadata={"axes": "YXS", **MPP, **options.pop("metadata", {})}, **options)
        for level in (2, 4):
            tif.write(np.asarray(Image.fromarray(pixels).reduce(level)), subfiletype=1, **options)


def planes(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


WRITE: dict[str, Any] = {
    "ome, tiled, levels in sub-IFDs": lambda path, p: ome_pyramid(path, p),
    "ome, BigTIFF": lambda path, p: ome_pyramid(path, p, bigtiff=True),
    "ome, big-endian": lambda path, p: tifffile.imwrite(path, p, ome=True, byteorder=">", metadata=MPP),
    "ome, LZW": lambda path, p: ome_pyramid(path, p, compression="lzw"),
    "ome, strips": lambda path, p: tifffile.imwrite(path, p, ome=True, rowsperstrip=50, metadata=MPP),
    "ome, a page for each colour": lambda path, p: tifffile.imwrite(
        path, planes(p), ome=True, photometric="minisblack", metadata={"axes": "CYX", **MPP}
    ),
    "planar strips": lambda path, p: tifffile.imwrite(
        path, planes(p), planarconfig="separate", photometric="rgb", rowsperstrip=30
    ),
    "planar tiles": lambda path, p: tifffile.imwrite(
        path, planes(p), planarconfig="separate", photometric="rgb", tile=(64, 64), compression="zlib"
    ),
    "ome, zstd": lambda path, p: ome_pyramid(path, p, compression="zstd"),
    "ome, lossless JPEG 2000": lambda path, p: ome_pyramid(path, p, compression="jpeg2000"),
    "ome, 16 bits": lambda path, p: tifffile.imwrite(path, p.astype(np.uint16) * 256 + 9, ome=True, metadata=MPP),
}


@pytest.mark.parametrize("kind", WRITE)
def test_regions_are_those_of_the_picture(tmp_path: Path, pixels: NDArray[np.uint8], kind: str) -> None:
    path = tmp_path / "a.ome.tif"
    WRITE[kind](path, pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slide, plain = open_slide(path), open_slide(tmp_path / "a.png")
    assert isinstance(slide, TiffSlide)
    assert slide.size == (512, 384)
    for region in REGIONS:
        assert np.array_equal(slide.read_region(*region, 0), plain.read_region(*region, 0)), region
    assert slide.mpp == (None if "planar" in kind else pytest.approx(0.5))
    assert slide.notices == (("16 bits a px are read as their upper 8",) if "16" in kind else ())
    slide.close()


def test_levels_and_lossy_colours_are_tifffiles(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    ome_pyramid(tmp_path / "a.ome.tif", pixels, compression="jpeg", compressionargs={"level": 95})
    slide = open_slide(tmp_path / "a.ome.tif")
    assert slide.steps == ((1, 1), (2, 2), (4, 4))
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tif:
        for level, series in enumerate(tif.series[0].levels):
            expected = series.asarray()
            height, width = expected.shape[:2]
            assert np.array_equal(slide.read_region(0, 0, width, height, level), expected)
    assert np.abs(slide.read_region(0, 0, 512, 384, 0).astype(int) - pixels).mean() < 3
    tile = read_tile(slide, (256.0, 192.0), 160, 40, "bicubic")
    shown = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC, box=(176, 112, 336, 272))
    assert np.abs(tile.astype(int) - np.asarray(shown)).mean() < 3


def test_the_same_tile_from_every_format(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write_pyramid(tmp_path / "a.tif", pixels)
    ome_pyramid(tmp_path / "a.ome.tif", pixels)
    tifffile.imwrite(tmp_path / "planar.tif", planes(pixels), planarconfig="separate", photometric="rgb")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slides = [open_slide(tmp_path / name) for name in ("a.tif", "a.ome.tif", "planar.tif", "a.png")]
    assert [type(slide) for slide in slides] == [OpenSlideSlide, TiffSlide, TiffSlide, RasterSlide]
    tiles = [read_tile(slide, (250.0, 190.0), 100, 64, "bicubic").astype(int) for slide in slides]
    assert max(np.abs(tile - tiles[0]).max() for tile in tiles) <= 3


def test_a_level_that_is_not_the_whole_made_smaller_is_passed_over(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tif:
        tif.write(pixels, tile=(64, 64), photometric="rgb", subifds=2, metadata={"axes": "YXS"})
        for part in (pixels[::2, ::3], pixels[::4, ::4]):
            tif.write(np.ascontiguousarray(part), tile=(64, 64), photometric="rgb", subfiletype=1)
    slide = open_slide(tmp_path / "a.ome.tif")
    assert isinstance(slide, TiffSlide)
    assert slide.steps == ((1, 1), (4, 4))
    assert "is not the whole of 512 × 384 px made smaller" in slide.notices[0]
    assert np.array_equal(slide.read_region(0, 0, 128, 96, 1), pixels[::4, ::4])


def test_a_large_tiff_that_is_not_tiled_is_not_decoded_whole(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", rowsperstrip=16, compression="zlib")
    assert isinstance(open_slide(tmp_path / "a.tif"), RasterSlide)
    monkeypatch.setattr("nh2st_pipe.slides.tiff._LARGE_PX", 1000)
    slide = open_slide(tmp_path / "a.tif")
    assert isinstance(slide, TiffSlide)
    assert np.array_equal(slide.read_region(0, 100, 512, 10, 0), pixels[100:110])
    assert len(slide._pieces._kept) == 1  # one strip of 24


def test_pieces_are_decoded_once_and_few_are_kept(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    ome_pyramid(tmp_path / "a.ome.tif", pixels)
    slide = open_slide(tmp_path / "a.ome.tif")
    assert isinstance(slide, TiffSlide)
    pieces, decoded = slide._pieces, list[tuple[int, int]]()
    once = pieces.decode

    def counting(level: int, row: int, column: int) -> NDArray[np.uint8]:
        decoded.append((row, column))
        return once(level, row, column)

    monkeypatch.setattr(pieces, "decode", counting)
    for x in range(0, 128, 16):
        slide.read_region(x, 0, 16, 16, 0)
    assert decoded == [(0, 0), (0, 1)]
    monkeypatch.setattr("nh2st_pipe.slides.pieces._KEPT_BYTES", 3 * 64 * 64 * 3)
    slide.read_region(0, 0, 512, 384, 0)
    assert len(pieces._kept) == 3
    assert pieces._bytes == sum(piece.nbytes for piece in pieces._kept.values())


def test_colours_may_lie_in_files_of_their_own(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    names = [f"{colour}.ome.tif" for colour in ("red", "green", "blue")]
    ids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{number}" for number in range(3)]
    planes_of = "".join(
        f'<TiffData FirstC="{number}" IFD="0" PlaneCount="1"><UUID FileName="{name}">{ids[number]}</UUID></TiffData>'
        for number, name in enumerate(names)
    )
    for number, name in enumerate(names):
        xml = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{ids[number]}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="512" SizeY="384" '
            'SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.25" PhysicalSizeY="0.25">'
            f"{planes_of}</Pixels></Image></OME>"
        )
        tifffile.imwrite(
            tmp_path / name,
            np.ascontiguousarray(pixels[..., number]),
            tile=(64, 64),
            description=xml,
            metadata=None,
        )
    slide = open_slide(tmp_path / "red.ome.tif")
    assert isinstance(slide, TiffSlide)
    assert (slide.size, slide.mpp) == ((512, 384), 0.25)
    assert np.array_equal(slide.read_region(0, 0, 512, 384, 0), pixels)


def test_a_piece_that_two_threads_want_is_decoded_once(
    tmp_path: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    ome_pyramid(tmp_path / "a.ome.tif", pixels)
    slide = open_slide(tmp_path / "a.ome.tif")
    assert isinstance(slide, TiffSlide)
    pieces, decoded = slide._pieces, list[tuple[int, int, int]]()
    once, both = pieces.decode, threading.Barrier(2)

    def slow(level: int, row: int, column: int) -> NDArray[np.uint8]:
        decoded.append((level, row, column))
        time.sleep(0.05)
        if row:
            raise SlideError("damaged")
        return once(level, row, column)

    def read(y: int) -> NDArray[np.uint8]:
        both.wait()
        return slide.read_region(0, y, 30, 30, 0)

    monkeypatch.setattr(pieces, "decode", slow)
    with ThreadPoolExecutor(2) as pool:
        for region in pool.map(read, (0, 0)):
            assert np.array_equal(region, pixels[:30, :30])
        failed = [pool.submit(read, 64) for _ in range(2)]
        for each in failed:
            with pytest.raises(SlideError, match="damaged"):
                each.result()
    assert decoded == [(0, 0, 0), (0, 1, 0)]
    assert not pieces._under_way


def test_several_threads_read_the_same_px(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    ome_pyramid(tmp_path / "a.ome.tif", pixels)
    slide = open_slide(tmp_path / "a.ome.tif")

    def read(i: int) -> bool:
        x, y = 7 * i % 400, 11 * i % 300
        return np.array_equal(slide.read_region(x, y, 80, 60, 0), pixels[y : y + 60, x : x + 80])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


@pytest.mark.parametrize(
    ("unit", "value", "expected"), [("nm", 250.0, 0.25), ("mm", 0.0005, 0.5), ("pixel", 1.0, None), ("µm", 0.25, 0.25)]
)
def test_the_xmls_resolution_has_its_unit(
    tmp_path: Path, pixels: NDArray[np.uint8], unit: str, value: float, expected: float | None
) -> None:
    of = {f"PhysicalSize{axis}{more}": each for axis in "XY" for more, each in (("", value), ("Unit", unit))}
    ome_pyramid(tmp_path / "a.ome.tif", pixels, metadata=of)
    assert open_slide(tmp_path / "a.ome.tif").mpp == (None if expected is None else pytest.approx(expected))


def test_px_that_are_not_square_are_refused_here_too(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    ome_pyramid(tmp_path / "a.ome.tif", pixels, metadata={"PhysicalSizeY": 1.0})
    with pytest.raises(SlideError, match=r"a\.ome\.tif has px of 0\.5 × 1 µm"):
        open_slide(tmp_path / "a.ome.tif")


def test_what_is_no_picture_of_colours_is_refused(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    stack = np.repeat(pixels[None, ..., 0], 5, axis=0)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.raises(SlideError, match=r"a\.ome\.tif is a TIFF of CYX \(5, 384, 512\), and a slide has one picture"):
        open_slide(tmp_path / "a.ome.tif")


def test_missing_pieces_are_white_and_damaged_ones_a_fault_of_the_slide(
    study: Study, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = study.folder / "s0.ome.tif"
    ome_pyramid(path, np.asarray(Image.open(study.folder / "s0.png").convert("RGB")))
    with tifffile.TiffFile(path) as tif:
        page: Any = tif.pages[0]
        offset, length = page.dataoffsets[5], page.databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x00" * length)
    study.manifest.write_text(study.manifest.read_text().replace("s0.png", "s0.ome.tif"))
    summary = study.embed(workers=2, batch_size=2)
    assert (summary.done, set(summary.failed)) == (["s1", "s2"], {"s0"})
    assert "s0.ome.tif is damaged near x=" in summary.failed["s0"]
    blank = np.zeros_like(pixels)
    blank[:128] = pixels[:128]
    for name, kind in (("b.ome.tif", TiffSlide), ("b.tif", OpenSlideSlide)):
        with tifffile.TiffWriter(tmp_path / name, ome=kind is TiffSlide) as tif:
            places = [(y, x) for y in range(0, 384, 128) for x in range(0, 512, 128)]
            pieces = (blank[y : y + 128, x : x + 128] if y < 128 else None for y, x in places)
            of: dict[str, Any] = {"shape": pixels.shape, "dtype": np.uint8, "tile": (128, 128), "photometric": "rgb"}
            tif.write(pieces, compression="zlib", metadata={"axes": "YXS"} if kind is TiffSlide else None, **of)
        slide = open_slide(tmp_path / name)
        assert isinstance(slide, kind)
        region = slide.read_region(0, 0, 512, 384, 0)
        assert np.array_equal(region[:128], pixels[:128])
        assert (region[128:] == 255).all()
        assert slide.notices == ("8 of 12 pieces of the image are not in the file",)


@pytest.mark.parametrize(
    ("tag", "size", "value"), [(277, 2, 60_000), (322, 4, 2**31), (323, 4, 2**31), (278, 4, 2**31)]
)
def test_a_wrong_number_in_the_header_takes_no_memory(
    tmp_path: Path, pixels: NDArray[np.uint8], tag: int, size: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, and the sides of a tile or a strip, multiply what a piece is decoded to."""
    path = tmp_path / "a.ome.tif"
    tile = None if tag == 278 else (64, 64)
    tifffile.imwrite(path, pixels, ome=True, photometric="rgb", tile=tile, compression="zlib")
    with tifffile.TiffFile(path) as file:
        found: Any = file.pages[0]
        at = found.tags[tag].valueoffset
        assert found.tags[tag].dtype == {2: 3, 4: 4}[size]
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(value.to_bytes(size, "little"))
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 50e6)
    try:
        open_slide(path).read_region(0, 0, 100, 100, 0)
    except SlideError as error:
        said = str(error)
    else:
        said = path.name if tag == 278 else ""  # one strip may be higher than its picture
    assert path.name in said


@pytest.mark.parametrize("tag", [322, 323, 256, 257])
def test_a_tag_that_says_nought_is_a_fault(tmp_path: Path, tag: int) -> None:
    path = tmp_path / "a.ome.tif"
    rng = np.random.default_rng(0)
    tifffile.imwrite(path, rng.integers(0, 255, (300, 400, 3), np.uint8), tile=(64, 64), ome=True)
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        at = page.tags[tag].valueoffset
    data = bytearray(path.read_bytes())
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.ome\.tif"):
        thumbnail(open_slide(path), 100)


def test_a_resolution_of_nought_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    px = rng.integers(0, 255, (3, 300, 400), np.uint8)
    tifffile.imwrite(path, px, tile=(64, 64), photometric="rgb", planarconfig="separate", **given)
    assert isinstance(open_slide(path), TiffSlide)
    assert open_slide(path).mpp == pytest.approx(0.5)
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        places = [page.tags[name].valueoffset for name in ("XResolution", "YResolution")]
    data = bytearray(path.read_bytes())
    for at in places:
        data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    assert open_slide(path).mpp is None
    assert isinstance(open_slide(path), TiffSlide)
