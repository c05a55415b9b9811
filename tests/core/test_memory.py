"""Small files that declare much: refused at opening, with the file and the size, and hardly any memory taken."""

from __future__ import annotations

import gzip
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tifffile
import zarr
from PIL import Image

from nh2st_pipe.core.errors import ExpressionError, NH2STError, SlideError
from nh2st_pipe.core.h5ad import read_h5ad
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.datasets.visium import _check_declared
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.directories import open_tiff
from nh2st_pipe.slides.whole import missing_data
from nh2st_pipe.tiles.masks import mask_from_geojson, mask_from_image
from tests.conftest import blank


@contextmanager
def little_memory(most: int = 100 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_what_is_required_is_held_against_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 2e9)
    require(1.9e9, "it")
    with pytest.raises(ExpressionError, match=r"^it takes 2\.1 GB of memory, and 2\.0 GB are free; wait$"):
        require(2.1e9, "it", ExpressionError, "wait")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path: Path, width: int, height: int, *, interlaced: bool = False, depth: int = 8) -> None:
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, int(interlaced))
    body = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def wide_png(path: Path) -> None:
    png(path, 20_000_000, 1_000_000)


def large_png(path: Path) -> None:
    png(path, 60_000, 60_000)


def interlaced_png(path: Path) -> None:
    png(path, 40_000, 40_000, interlaced=True)


def deep_png(path: Path) -> None:
    png(path, 40_000, 40_000, depth=16)


def bmp(path: Path) -> None:
    Image.new("L", (8, 8)).save(path, "BMP")
    data = bytearray(path.read_bytes())
    data[18:26] = struct.pack("<ii", 2_000_000_000, 400_000_000)
    path.write_bytes(data)


def strip_tiff(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), compression="zlib", rowsperstrip=64, metadata=None)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        places = {tag.code: tag.valueoffset for tag in page.tags if tag.code in (256, 257, 278)}
        kinds = {tag.code: tag.dtype for tag in page.tags if tag.code in places}
    for code, side in ((256, 60_000), (257, 60_000), (278, 60_000)):
        struct.pack_into("<H" if kinds[code] == 3 else "<I", data, places[code], side)
    path.write_bytes(data)


@pytest.mark.parametrize("make", [wide_png, large_png, interlaced_png, deep_png, bmp, strip_tiff])
def test_a_picture_that_its_file_cannot_hold_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "a.png"
    make(path)
    for read in (mask_from_image, open_slide):
        with little_memory(), pytest.raises(SlideError, match=r"a\.png"):
            read(path)


def test_a_picture_as_empty_as_a_mask_may_be_is_not(tmp_path: Path) -> None:
    """Four fifths of what deflate can do: nothing that was saved by a program is refused."""
    Image.new("1", (30_000, 20_000)).save(tmp_path / "mask.png", optimize=True)
    assert (tmp_path / "mask.png").stat().st_size < 100_000
    check_image(tmp_path / "mask.png", (30_000, 20_000))
    assert not mask_from_image(tmp_path / "mask.png").any()


def test_a_fax_takes_hardly_a_byte_for_rows_of_nothing(tmp_path: Path) -> None:
    """16,000 by 10,000 px, most of them no tissue, in a few kB: what a program saves as a mask."""
    mask = Image.new("1", (16_000, 10_000))
    mask.paste(1, (100, 100, 3000, 3000))
    mask.save(tmp_path / "mask.tif", compression="group4")
    assert 20_000 * (tmp_path / "mask.tif").stat().st_size < 16_000 * 10_000
    assert mask_from_image(tmp_path / "mask.tif").any()


def test_a_piece_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.create_array("0", shape=(3, 64, 64), chunks=(1, 1 << 20, 1 << 20), dtype="uint8")
    axes: Any = [{"name": name, "type": "space"} for name in "cyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    level: dict[str, Any] = {"path": "0", "coordinateTransformations": scale}
    root.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [level]}]
    assert open_slide(tmp_path / "a.zarr").read_region(0, 0, 8, 8, 0).shape == (8, 8, 3)  # no chunk is larger than it
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 10_000)
    with pytest.raises(SlideError, match=r"a\.zarr: a piece of 64 × 64 px takes"):
        open_slide(tmp_path / "a.zarr")


def test_a_matrix_that_its_file_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file.create_dataset("X", shape=(1 << 20, 1 << 20), dtype="f4", chunks=(1024, 1024))
    with little_memory(), pytest.raises(ExpressionError, match=r"a\.h5ad declares 4,398.0 GB of values \(X the most\)"):
        read_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["X"] = np.zeros((100, 100))
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 10_000)
    with pytest.raises(ExpressionError, match=r"a\.h5ad \(X the most\) takes .* are free"):
        read_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("packed", [False, True])
def test_a_matrix_market_file_that_cannot_hold_its_entries_is_refused(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("matrix.mtx.gz" if packed else "matrix.mtx")
    head = b"%%MatrixMarket matrix coordinate integer general\n%\n"
    for entries, good in ((2, True), (10**12, False)):
        text = head + f"3 3 {entries}\n1 1 1\n2 2 1\n".encode()
        path.write_bytes(gzip.compress(text) if packed else text)
        if good:
            _check_declared(path)
        else:
            with pytest.raises(ValueError, match="declares 1,000,000,000,000 entries"):
                _check_declared(path)


def test_many_outlines_are_drawn_each_on_a_canvas_of_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = open_slide(blank(tmp_path, (2000, 2000)))
    drawn, plain = list[int](), Image.new

    def counted(mode: str, size: tuple[int, int], *more: Any) -> Image.Image:
        drawn.append(size[0] * size[1])
        return plain(mode, size, *more)

    cells = [[[x, y], [x + 6, y], [x + 6, y + 6], [x, y + 6]] for x in range(0, 1990, 40) for y in range(0, 1990, 40)]
    (tmp_path / "a.geojson").write_text(json.dumps([{"type": "Polygon", "coordinates": [cell]} for cell in cells]))
    monkeypatch.setattr(Image, "new", counted)
    mask, _ = mask_from_geojson(tmp_path / "a.geojson", slide)
    assert len(drawn) == len(cells) == 2500
    assert sum(drawn) < 4 * mask.size
    assert 2500 * 36 <= mask.sum() <= 2500 * 64
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 10_000)
    with pytest.raises(NH2STError, match=r"a\.geojson, as JSON, takes"):
        mask_from_geojson(tmp_path / "a.geojson", slide)


@pytest.mark.parametrize("where", ["X", "layers/more"])
def test_a_matrix_that_points_outside_of_itself_is_never_used(tmp_path: Path, where: str) -> None:
    """Taking rows of one ends the interpreter."""
    counts = sp.csr_matrix(np.eye(20, 10, dtype=np.float32))
    data = anndata.AnnData(counts, layers={"more": counts})
    data.write_h5ad(tmp_path / "a.h5ad")
    read_h5ad(tmp_path / "a.h5ad")
    for part, wrong in (("indices", 2_000_000), ("indptr", 1 << 30)):
        data.write_h5ad(tmp_path / "a.h5ad")
        with h5py.File(tmp_path / "a.h5ad", "r+") as file:
            file[f"{where}/{part}"][5] = wrong
        with pytest.raises(ExpressionError, match=f"{where} is damaged: a sparse matrix that points outside of itself"):
            read_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_directories_that_go_round_in_a_circle_are_refused(tmp_path: Path, big: bool, order: Any) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as file:
        for _ in range(3):
            file.write(np.zeros((16, 16, 3), np.uint8), photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as opened:
        assert len(opened.pages) == 3
        first, last = opened.pages[0].offset, opened.pages[2].offset
    with open_tiff(path) as opened:
        assert len(opened.pages) == 3
    data = bytearray(path.read_bytes())
    count, entry, offset = ("Q", 20, "Q") if big else ("H", 12, "I")
    (entries,) = struct.unpack_from(order + count, data, last)
    struct.pack_into(order + offset, data, last + struct.calcsize(count) + entry * entries, first)
    path.write_bytes(data)
    for read in (open_tiff, open_slide, mask_from_image):
        with pytest.raises(SlideError, match=r"a\.tif is damaged: its directories go round in a circle"):
            read(path)
    assert "go round in a circle" in str(missing_data(path))


def test_a_heap_of_texts_that_its_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    anndata.AnnData(np.eye(3, dtype=np.float32)).write_h5ad(tmp_path / "a.h5ad")
    data = bytearray((tmp_path / "a.h5ad").read_bytes())
    at = data.index(b"GCOL\1\0\0\0") + 8
    data[at : at + 8] = struct.pack("<Q", 2_100_000_000)
    (tmp_path / "a.h5ad").write_bytes(data)
    with pytest.raises(ExpressionError, match=r"a\.h5ad is damaged: a heap of texts .* declares 2,100,000,000 bytes"):
        read_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "a.h5ad").write_bytes(b"")
    with pytest.raises(ExpressionError, match=r"a\.h5ad cannot be read"):
        read_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_that_its_file_cannot_hold_is_refused(tmp_path: Path, packed: bool) -> None:
    path, names = tmp_path / "a.h5ad", [f"a spot called {i}" for i in range(40)]
    data = anndata.AnnData(np.eye(40, dtype=np.float32), obs=pd.DataFrame(index=names))
    data.write_h5ad(path, compression="gzip" if packed else None)
    assert list(read_h5ad(path).obs_names) == names
    with h5py.File(path, "r+") as file:
        texts = file["obs/_index"]
        assert (texts.chunks is not None) == packed
        if packed:
            _, chunk = texts.id.read_direct_chunk((0,))
            raw = bytearray(zlib.decompress(chunk))
            raw[16 * 7 : 16 * 7 + 4] = struct.pack("<I", 4_200_000_000)
            texts.id.write_direct_chunk((0,), zlib.compress(bytes(raw)))
        else:
            at = texts.id.get_offset() + 16 * 7
    if not packed:
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + struct.pack("<I", 4_200_000_000) + whole[at + 4 :])
    with pytest.raises(ExpressionError, match=r"a\.h5ad is damaged: a text in obs/_index declares 4,200,000,000 bytes"):
        read_h5ad(path)


def test_a_tile_as_wide_as_the_slide_is_held_against_the_memory_by_its_px(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some formats cut a slide into low and very wide tiles: their area is what is decoded."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((256, 8192, 3), np.uint8), tile=(16, 4096), photometric="rgb")
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 20 << 20)  # 4,096 times 4,096 px would take 64 MB
    opened = open_slide(tmp_path / "a.tif")
    assert opened.reader.startswith("openslide ")
    opened.close()
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 100_000)
    with pytest.raises(SlideError, match=r"a tile of 4,096 × 16 px takes"):
        open_slide(tmp_path / "a.tif")
