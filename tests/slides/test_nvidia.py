"""Pieces decoded by nvImageCodec, which has decoders for the CPU too: the same picture, many at once, or not there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError, UsageError
from nh2st_pipe.slides import nvidia, open_slide
from nh2st_pipe.slides.base import DecodesMany, fetch_tiles, read_tile
from nh2st_pipe.slides.nvidia import NvDecoder, check_decoder, jpeg_stream
from nh2st_pipe.slides.tiff import MOST_APART
from nh2st_pipe.store.read import open_store
from tests.conftest import Study, picture

_REAL = Path(__file__).parents[3] / "shared/wsi"
_CENTRES = np.array([[x, y] for y in (40.0, 96.0, 300.0) for x in (32.0, 100.0, 200.5, 490.0)])


class Counting:
    """A decoder that notes how many streams it is given at a time."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.calls, self.name = inner or NvDecoder(on_cpu=True), list[int](), "counting 1"

    def decode(self, streams: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        self.calls.append(len(streams))
        decoded: list[NDArray[np.uint8] | None] = self.inner.decode(streams)
        return decoded


def write(path: Path, pixels: NDArray[np.uint8], **options: Any) -> None:
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", **options}
    with tifffile.TiffWriter(path) as file:
        for level in range(2):
            image = np.asarray(Image.fromarray(pixels).reduce(2**level))
            file.write(image, subfiletype=1 if level else 0, resolution=(20_000, 20_000), resolutionunit=3, **options)


KINDS: dict[str, dict[str, Any]] = {
    "JPEG of red, green and blue": {},
    "JPEG of YCbCr": {"photometric": "ycbcr"},
    "JPEG 2000": {"compression": "jpeg2000"},
}


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return picture(512, 384, seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_same_picture_and_their_pieces_decoded_at_once(
    tmp_path: Path, pixels: NDArray[np.uint8], kind: str
) -> None:
    write(tmp_path / "a.tif", pixels, **KINDS[kind])
    plain, slide, decoder = open_slide(tmp_path / "a.tif"), open_slide(tmp_path / "a.tif"), Counting()
    assert isinstance(slide, DecodesMany)
    slide.decode_with(decoder)
    assert slide.notices == plain.notices
    assert slide.reader == f"{plain.reader}, counting 1"
    decoder.calls.clear()
    for size in (64.0, 128.0, 90.0):
        fetch_tiles(slide, _CENTRES, size, 64, "bicubic")
        fetched = list(decoder.calls)
        for x, y in _CENTRES:
            tile, expected = (read_tile(each, (x, y), size, 64, "bicubic").astype(int) for each in (slide, plain))
            assert np.abs(tile - expected).max() <= 2 * MOST_APART
        assert decoder.calls == fetched  # no piece on its own
    assert len(decoder.calls) == 3  # once for each size
    assert min(decoder.calls) >= 8


def test_a_piece_keeps_its_colours_and_gets_its_tables() -> None:
    image, whole, tables, rest = Image.fromarray(picture(64, 64, seed=1)), io.BytesIO(), io.BytesIO(), io.BytesIO()
    for file, kind in ((whole, 0), (tables, 1), (rest, 2)):
        image.save(file, "jpeg", quality=80, streamtype=kind)
    expected = np.asarray(Image.open(io.BytesIO(whole.getvalue())))
    joined = jpeg_stream(rest.getvalue(), tables.getvalue(), rgb=False)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(joined))), expected)
    streams = [joined, jpeg_stream(rest.getvalue(), tables.getvalue(), rgb=True)]
    as_said, as_rgb = NvDecoder(on_cpu=True).decode(streams)
    assert as_said is not None
    assert as_rgb is not None
    assert np.array_equal(as_said, expected)
    assert np.abs(as_rgb.astype(int) - expected).max() > 50  # luma taken for red, as it says


def test_what_cannot_be_decoded_there_is_decoded_here(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    """A decoder that makes another picture, one that fails now and then, a level of another kind."""

    class Wrong:
        name = "wrong 1"

        def decode(self, streams: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
            return [np.zeros((64, 64, 3), np.uint8) for _ in streams]

    class Failing(Counting):
        def decode(self, streams: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
            found = super().decode(streams)
            return found if len(found) == 1 else [None if number % 2 else px for number, px in enumerate(found)]

    write(tmp_path / "jpeg.tif", pixels)
    write(tmp_path / "zlib.tif", pixels, compression="zlib")
    for name, decoder, said in (
        ("jpeg.tif", Wrong(), "wrong 1 makes another picture of level 0: it is decoded on the CPU"),
        ("zlib.tif", Counting(), "level 0 is of a kind that counting 1 does not decode here: it is decoded on the CPU"),
        ("jpeg.tif", Failing(), None),
    ):
        slide, plain = open_slide(tmp_path / name), open_slide(tmp_path / name)
        assert isinstance(slide, DecodesMany)
        slide.decode_with(decoder)
        assert (said is None) or said in slide.notices
        assert slide.reader == plain.reader + ("" if said else f", {decoder.name}")  # the record says what decoded it
        fetch_tiles(slide, _CENTRES, 64.0, 64, "bicubic")
        for x, y in _CENTRES:
            tile, expected = (read_tile(each, (x, y), 64.0, 64, "bicubic").astype(int) for each in (slide, plain))
            assert np.abs(tile - expected).max() <= (0 if said else MOST_APART)


def test_a_damaged_piece_is_the_fault_of_its_tile_alone(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write(tmp_path / "a.tif", pixels)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page: Any = file.pages[0]
        offset, length = page.dataoffsets[-1], page.databytecounts[-1]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + length] = bytes(length)
    (tmp_path / "a.tif").write_bytes(data)
    slide = open_slide(tmp_path / "a.tif")
    assert isinstance(slide, DecodesMany)
    slide.decode_with(NvDecoder(on_cpu=True))
    centres = np.array([[32.0, 32.0], [480.0, 352.0]])
    fetch_tiles(slide, centres, 64.0, 64, "bicubic")
    assert read_tile(slide, (32.0, 32.0), 64.0, 64, "bicubic").shape == (64, 64, 3)
    with pytest.raises(SlideError, match=r"damaged near x=448, y=320"):
        read_tile(slide, (480.0, 352.0), 64.0, 64, "bicubic")


def test_embed_decodes_there_and_says_so(
    make_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: NDArray[np.uint8]
) -> None:
    study: Study = make_study(1)  # a PNG
    write(study.folder / "jpeg.tif", pixels)
    with study.manifest.open("a") as file:
        file.write("jpeg,jpeg.tif,P9,\n")
    study.embed(store=tmp_path / "plain.zarr", device="cpu")
    decoder = Counting()
    monkeypatch.setattr("nh2st_pipe.embedding.opener.the_decoder", lambda: decoder)
    with pytest.raises(UsageError, match="no NVIDIA GPU here"):
        study.embed(device="cpu", decode="gpu")
    monkeypatch.setattr("nh2st_pipe.embedding.run.check_decoder", lambda: None)
    summary = study.embed(device="cpu", decode="gpu")
    assert not summary.failed
    assert any("s0" in each and "decoded on the CPU alone" in each for each in summary.notices)
    assert len(decoder.calls) < sum(decoder.calls) / 4
    store, plain = open_store(study.folder / "store.zarr"), open_store(tmp_path / "plain.zarr")
    for key, named in (("jpeg", True), ("s0", False)):
        resolved = store.complete(key).resolved
        assert resolved is not None
        assert resolved.reader.endswith(", counting 1") == named
        assert np.abs(store.read(key).views.astype(float) - plain.read(key).views).max() < 0.05


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(nvidia, "import_module", missing)
    with pytest.raises(UsageError, match="pip install nvidia-nvimgcodec-cu13"):
        check_decoder()


@pytest.mark.skipif(not _REAL.exists(), reason="no real slides here")
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-no-mpp.svs"])
def test_a_real_slide_is_the_same_picture(name: str) -> None:
    slide, plain = open_slide(_REAL / name), open_slide(_REAL / name)
    assert isinstance(slide, DecodesMany)
    slide.decode_with(NvDecoder(on_cpu=True))
    assert slide.notices == plain.notices  # every level that we decode ourselves
    width, height = slide.size
    for share in (0.25, 0.5, 0.75):
        tiles = [read_tile(each, (width * share, height * share), 224.0, 224, "bicubic") for each in (slide, plain)]
        assert np.abs(tiles[0].astype(int) - tiles[1]).max() <= MOST_APART
