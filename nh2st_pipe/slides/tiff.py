"""TIFF files that OpenSlide reads in part or not at all, through tifffile and imagecodecs.

OME-TIFF (levels in sub-IFDs, resolution in its XML), plain TIFF too large to be decoded whole, planar TIFF, colours in
pages of their own (ImageJ), samples of more than eight bits, and whatever OpenSlide and Pillow cannot decode. Pieces of
the file (tiles or strips) are decoded when a region asks for them, and the last ones kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.slides.base import UndecodedError, libraries
from nh2st_pipe.slides.directories import open_tiff
from nh2st_pipe.slides.levels import Step, step_of, true_levels
from nh2st_pipe.slides.nvidia import PieceDecoder, jpeg_stream
from nh2st_pipe.slides.pieces import Grid, Pieces
from nh2st_pipe.slides.pixels import Samples, check_dtype, icc_notices, to_rgb, with_bits
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["MOST_APART", "TiffLevel", "TiffPieces", "TiffSlide", "beyond_others", "is_tiff", "tiled_pages"]

MOST_APART = 3
"""Grey levels between two decoders of the same piece."""

_LARGE_PX = 64_000_000  # from which on a plain image is not decoded whole
_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_PER_CM, _PER_INCH = 3, 2  # the tag's values
_JPEGS = (6, 7, 33003, 33005, 34712)  # decoders of JPEG and JPEG 2000 give the colours they are of
_BY_DECODERS = (7, 33003, 33005, 34712)  # those with streams that can stand alone
_ICC = 34675  # the tag, and those of the largest value and of the kind of inks
_MOST_VALUE = 281
_INKS = 332
_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


@dataclass(frozen=True)
class TiffLevel:
    """One resolution: a page, or a page for each colour."""

    pages: tuple[Any, ...]
    planar: bool
    """Whether the colours of a page lie one behind the other."""
    grid: Grid
    samples: Samples

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px."""
        return self.grid.width, self.grid.height


class TiffPieces(Pieces):
    """Levels of a TIFF (of several files, where its parts lie in several), opened anew for as long as this lives."""

    def __init__(self, path: Path, levels: Sequence[TiffLevel]) -> None:
        super().__init__([level.grid for level in levels], path)
        for level in levels:
            of = level.pages[0].keyframe
            require(np.prod(of.chunks, dtype=float) * of.dtype.itemsize, f"{path}: a piece of {of.chunks} samples")
        self._path, self._levels = path, levels
        self._decoder: PieceDecoder | None = None
        self._by_decoder: frozenset[int] = frozenset()
        self._bytes_of = {name: _Bytes(name) for level in levels for name in map(_file_of, level.pages)}

    def close(self) -> None:
        """Close the files, and free what was decoded."""
        super().close()
        for file in self._bytes_of.values():
            file.close()

    def decode_with(self, decoder: PieceDecoder) -> list[str]:
        """Have pieces of JPEG or JPEG 2000 decoded by `decoder`; return in words which levels are not.

        Those are levels of another kind, and those whose fullest piece it makes anything but the same picture of.
        """
        self._decoder, self._by_decoder = decoder, frozenset()
        by, words = set[int](), list[str]()
        for number, level in enumerate(self._levels):
            page = level.pages[0].keyframe
            plain = len(level.pages) == 1 and level.samples == Samples() and page.samplesperpixel == 3
            if not (plain and page.dtype == np.uint8 and page.compression in _BY_DECODERS):
                words.append(f"level {number} is of a kind that {decoder.name} does not decode here")
                continue
            place = self.fullest(number)
            theirs, ours = self._by_the_decoder(number, [place])[0], self.decode(number, *place)
            if theirs is None or np.abs(ours.astype(np.int16) - theirs).max(initial=0) > MOST_APART:
                words.append(f"{decoder.name} makes another picture of level {number}")
            else:
                by.add(number)
        super().close()  # what was decoded on the CPU
        self._by_decoder = frozenset(by)
        return [f"{word}: it is decoded on the CPU" for word in words]

    @property
    def by_decoder(self) -> bool:
        """Whether any level is decoded by the decoder that was given."""
        return bool(self._by_decoder)

    def region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Pieces.region`."""
        if level in self._by_decoder:
            self.fetch(level, [(x, y, width, height)])
        return super().region(x, y, width, height, level)

    def decode_many(self, level: int, places: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8] | SlideError]:
        """See `Pieces.decode_many`."""
        if level not in self._by_decoder or not places:
            return super().decode_many(level, places)
        found = self._by_the_decoder(level, places)
        alone = iter(super().decode_many(level, [at for at, px in zip(places, found, strict=True) if px is None]))
        return [next(alone) if px is None else px for px in found]

    def _by_the_decoder(self, level: int, places: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8] | None]:
        """Return what the decoder makes of pieces; None of those that it cannot decode, or the file leaves out."""
        assert self._decoder is not None
        page, grid = self._levels[level].pages[0], self._grids[level]
        n_across = -(-grid.width // grid.piece[1])
        numbers = [row * n_across + column for row, column in places]
        there = [number for number in numbers if page.databytecounts[number]]
        of, rgb = self._bytes_of[_file_of(page)], page.keyframe.photometric == 2
        streams = [
            jpeg_stream(of.read(page.dataoffsets[number], page.databytecounts[number]), page.jpegtables, rgb=rgb)
            for number in there
        ]
        made = dict(zip(there, self._decoder.decode(streams), strict=True))
        cut = [None if (px := made.get(number)) is None else px[: grid.piece[0], : grid.piece[1]] for number in numbers]
        return [px if px is not None and px.shape == (*grid.piece, 3) else None for px in cut]

    def decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Pieces.decode`."""
        if level in self._by_decoder:
            found = self._by_the_decoder(level, [(row, column)])[0]
            if found is not None:
                return found
        return to_rgb(self.values(level, row, column), self._levels[level].samples)

    def values(self, level: int, row: int, column: int) -> NDArray[Any]:
        """Return a piece as it is stored, h × w × samples. Raises SlideError where it cannot be decoded."""
        of, grid = self._levels[level], self._grids[level]
        down, across = grid.piece
        n_across, n_down = -(-grid.width // across), -(-grid.height // down)
        index = row * n_across + column
        if of.planar:
            sources = [(of.pages[0], index + sample * n_across * n_down) for sample in range(of.samples.count)]
        else:
            sources = [(page, index) for page in of.pages]
        at = f"x={column * across}, y={row * down} (of a level of {grid.width:,} px)"
        with fault_of(SlideError, f"{self._path} is damaged near {at}"):
            parts = [self._one(page, index, grid.piece) for page, index in sources]
            return parts[0] if len(parts) == 1 else np.concatenate([part[..., :1] for part in parts], axis=2)

    def fullest(self, level: int) -> tuple[int, int]:
        """Return row and column of the piece with the most bytes: there is something in it."""
        of, grid = self._levels[level], self._grids[level]
        n_across, n_down = -(-grid.width // grid.piece[1]), -(-grid.height // grid.piece[0])
        lengths = of.pages[0].databytecounts[: n_across * n_down]
        index = int(np.argmax(lengths))
        return index // n_across, index % n_across

    def some(self, level: int) -> Iterator[NDArray[Any]]:
        """Yield pieces from all over a level as they are stored, those that can be decoded."""
        of, grid = self._levels[level], self._grids[level]
        n_across = -(-grid.width // grid.piece[1])
        for row, column in self.spread(level):
            if of.pages[0].databytecounts[row * n_across + column]:
                with suppress(SlideError):
                    values = self.values(level, row, column)
                    yield values[: grid.height - row * grid.piece[0], : grid.width - column * grid.piece[1]]

    def _one(self, page: Any, index: int, piece: tuple[int, int]) -> NDArray[Any]:
        """Return one piece of one page, h × w × samples; white where the file leaves it out."""
        of = page.keyframe  # pages of a series have all but their data in common
        samples = 1 if of.planarconfig == 2 else of.samplesperpixel
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if length == 0:
            return self._white(page, piece, samples)
        data = self._bytes_of[_file_of(page)].read(offset, length)
        if len(data) < length:
            raise ValueError(f"the file ends {length - len(data):,} bytes early")
        found = of.decode(data, index, jpegtables=page.jpegtables)[0]
        if found is None:
            return self._white(page, piece, samples)
        values: NDArray[Any] = found[0][: piece[0], : piece[1]]
        if values.shape[:2] == piece:
            return values
        filled = self._white(page, piece, samples)
        filled[: values.shape[0], : values.shape[1]] = values
        return filled

    def _white(self, page: Any, piece: tuple[int, int], samples: int) -> NDArray[Any]:
        """Return px that are white: the largest value, or none where that is ink or darkness."""
        of = page.keyframe
        dark = self._levels[0].samples
        value = 0 if dark.inverted or dark.colours == "cmyk" else np.iinfo(of.dtype).max
        return np.full((*piece, samples), value, of.dtype)


class TiffSlide:
    """A TIFF read piece by piece. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = (0, 0)
        self.reader = libraries("tifffile", "imagecodecs")
        cause = f"{path} cannot be opened (is the file complete?)"
        with fault_of(UndecodedError, cause), open_tiff(path) as file:
            self._describe(file)

    def _describe(self, file: Any) -> None:
        path = self.path
        series = max(file.series, key=lambda each: each.size)
        check_dtype(path, series.dtype)
        levels = [level for level in map(_level, series.levels) if level is not None]
        if not levels:
            if _pages_of(series.pages, series.axes):
                kind = getattr(series.keyframe.photometric, "name", "unknown")
                raise UndecodedError(f"{path} holds colours of a kind that is not read here ({kind})")
            raise SlideError(
                f"{path} is a TIFF of {series.axes} {series.shape}, and a slide has one picture of red, green and "
                "blue; save it as RGB"
            )
        words = list[str]()
        if len(series.levels) == 1:
            levels += _reduced(file, series, levels[0])
        else:
            kept, words = true_levels([each.size for each in levels], _steps(levels), said=False)
            levels = [levels[number] for number in kept]
        self.size: tuple[int, int] = levels[0].size
        check_image(path, self.size, alone=False)
        self.steps: tuple[Step, ...] = tuple(_steps(levels))
        self.mpp = _mpp(file, levels[0], path)
        notices = [*_notices(levels[0], series, file), *words]
        self._pieces = TiffPieces(path, levels)
        samples, last = levels[0].samples, len(levels) - 1
        if _is_unspecified(series.keyframe) and not any(values[..., 3].any() for values in self._pieces.some(last)):
            samples = replace(samples, alpha="none")  # what fills up words of four bytes
        if series.dtype != np.uint8:
            said = _significant_bits(file, levels[0])
            samples, of_bits = with_bits(path, samples, series.dtype, said, self._pieces.some(last))
            notices += of_bits
        if samples != levels[0].samples:
            self._pieces.close()
            self._pieces = TiffPieces(path, [replace(each, samples=samples) for each in levels])
        self.notices = tuple(notices)

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether this is a TIFF that is better read here.

        That is one of OME, with levels in sub-IFDs, large and not tiled, with colours in planes or pages of their own,
        or with samples of other than eight bits.
        """
        if not is_tiff(path):
            return False
        try:
            with open_tiff(path) as tif:
                series = max(tif.series, key=lambda each: each.size)
                pages, page = series.pages, series.keyframe
                large = page.imagewidth * page.imagelength > _LARGE_PX and not page.is_tiled
                planar = page.planarconfig == 2 and page.samplesperpixel > 1
                other = len(pages) > 1 or page.bitspersample > 8 or _is_unspecified(page)
                return bool(tif.is_ome or page.subifds or large or planar or other)
        except Exception:  # no TIFF that tifffile understands
            return False

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        return self._pieces.region(x, y, width, height, level)

    def decode_with(self, decoder: PieceDecoder) -> None:
        """See `DecodesMany.decode_with`."""
        self.notices += tuple(self._pieces.decode_with(decoder))
        self.reader += f", {decoder.name}" if self._pieces.by_decoder else ""

    def fetch(self, level: int, boxes: Iterable[tuple[int, int, int, int]]) -> None:
        """See `DecodesMany.fetch`."""
        self._pieces.fetch(level, boxes)

    def try_decoding(self) -> None:
        """See `Slide.try_decoding`."""
        last = len(self.steps) - 1
        try:
            self._pieces.decode(last, *self._pieces.fullest(last))
        except SlideError as error:
            raise UndecodedError(str(error)) from error

    def close(self) -> None:
        """See `Slide.close`."""
        self._pieces.close()


def is_tiff(path: Path) -> bool:
    """Whether a file begins as TIFFs do."""
    with path.open("rb") as file:
        return file.read(4) in _MAGIC


def beyond_others(path: Path) -> str | None:
    """Return in words why OpenSlide and Pillow would give another picture than a TIFF holds; None where they do not.

    Both give the upper eight of sixteen bits, whichever are used, and the first of pages that are a colour each.
    """
    try:
        with open_tiff(path) as tif:
            series = max(tif.series, key=lambda each: each.size)
            page = series.keyframe
            if page.bitspersample > 8:
                return f"{path} holds px of {page.bitspersample} bits"
            if len(series.pages) > 1 and page.samplesperpixel == 1:
                return f"{path} holds {len(series.pages)} grey pages of the same size"
            if _is_unspecified(page):
                return f"{path} holds a fourth sample that it does not say the meaning of"
    except Exception:  # no TIFF that tifffile understands
        return None
    return None


def tiled_pages(path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[dict[int, TiffLevel], list[str]]:
    """Return those of an OpenSlide slide's levels (width, height) that are tiled pages of a TIFF, by their number; and
    what is to be said of level 0.

    Such a page has the level's size, samples of eight bits, and all of its tiles. Whether they decode to what OpenSlide
    makes of them is for the caller to try.
    """
    found: dict[int, TiffLevel] = {}
    words: list[str] = []
    try:
        with open_tiff(path) as file:
            pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            for number, size in enumerate(sizes):
                for page in pages:
                    level = _level_of_pages((page,), page.axes)
                    full = level is not None and level.size == size and page.dtype == np.uint8 and not level.planar
                    if not full or level is None:
                        continue
                    if min(page.databytecounts, default=0) > 0:
                        found[number] = level
                    elif number == 0:
                        words = _absent([page])
                    break
    except Exception:  # a TIFF that only OpenSlide understands
        return {}, []
    return found, words


def _level(series: Any) -> TiffLevel | None:
    """Return what is needed to read one resolution; None where it is no picture of one or three colours."""
    return _level_of_pages(tuple(series.pages), series.axes)


def _pages_of(pages: Sequence[Any], axes: str) -> tuple[Any, ...] | None:
    """Return the pages of one picture, one or one for each of three colours; None where they are something else.

    Of several pages in colours that lie side by side the first is the picture; of grey ones there is no knowing.
    """
    axes = axes.replace("Q", "").replace("I", "")
    if any(page is None for page in pages) or axes not in ("YX", "YXS", "SYX", "CYX"):
        return None
    if axes in ("YXS", "SYX"):
        return tuple(pages[:1])
    return tuple(pages) if len(pages) in (1, 3) else None


def _level_of_pages(pages: tuple[Any, ...], axes: str) -> TiffLevel | None:
    found = _pages_of(pages, axes)
    if found is None:
        return None
    page = found[0].keyframe
    samples = _samples(page, len(found))
    deep = page.imagedepth > 1 or page.tiledepth > 1
    if samples is None or deep or page.dtype not in (np.uint8, np.uint16) or page.bitspersample < 8:
        return None
    for each in found:  # read while the file is open
        _ = each.dataoffsets, each.databytecounts, each.jpegtables, each.keyframe.decode
    piece = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    planar = page.planarconfig == 2 and page.samplesperpixel > 1
    grid = Grid(page.imagewidth, page.imagelength, (min(piece[0], page.imagelength), piece[1]))
    return TiffLevel(found, planar, grid, samples)


def _samples(page: Any, pages: int) -> Samples | None:
    """Return what a page's samples mean, a page for each colour where there are several; None where it is not known."""
    count = page.samplesperpixel
    if pages == 3:
        return Samples() if page.photometric in (1, 2) and count == 1 else None
    if page.compression in _JPEGS and page.photometric not in (0, 5):
        of = Samples() if count >= 3 else Samples("grey")
    elif page.photometric in (0, 1):
        of = Samples("grey", inverted=page.photometric == 0)
    elif page.photometric == 2:
        of = Samples()
    elif page.photometric == 5 and getattr(page.tags.get(_INKS), "value", 1) == 1:
        of = Samples("cmyk")
    else:
        return None  # a palette, YCbCr that no JPEG decoder turns into RGB, CIELAB
    if count < of.count:
        return None
    alpha: Any = {0: "premultiplied", 1: "premultiplied", 2: "straight"}[next(iter(page.extrasamples), 0)]
    return replace(of, alpha=alpha) if count > of.count else of


def _is_unspecified(page: Any) -> bool:
    """Whether a sample follows red, green and blue that may be opacity, as it mostly is, or nothing."""
    return page.photometric == 2 and page.samplesperpixel > 3 and next(iter(page.extrasamples), 0) == 0


def _steps(levels: Sequence[TiffLevel]) -> list[Step]:
    return [step_of(levels[0].size, level.size) for level in levels]


def _reduced(file: Any, series: Any, full: TiffLevel) -> list[TiffLevel]:
    """Return the levels of a picture that lie in pages of their own, each marked as another one made smaller."""
    pages = [each for each in file.series if each is not series and each.keyframe.is_reduced]
    levels = [_level(each) for each in pages if each.dtype == series.dtype]
    alike = [each for each in levels if each is not None and each.samples == full.samples]
    alike = [full, *sorted(alike, key=lambda each: -each.size[0])]
    kept, _ = true_levels([each.size for each in alike], _steps(alike), said=False)
    return [alike[number] for number in kept[1:] if alike[number].size != full.size]


def _significant_bits(file: Any, level: TiffLevel) -> int | None:
    """Return how many bits of a sample are used, by the OME-XML or the tags; None where they do not say."""
    page = level.pages[0].keyframe
    if page.bitspersample < 16:
        return int(page.bitspersample)
    most = getattr(page.tags.get(_MOST_VALUE), "value", None)
    most = max(most) if isinstance(most, tuple) else most
    if isinstance(most, int) and most > 255 and most & (most + 1) == 0:
        return most.bit_length()
    with suppress(ElementTree.ParseError, KeyError, TypeError, ValueError):
        for node in _pixels_nodes(file, level):
            return int(node.get("SignificantBits"))
    return None


def _pixels_nodes(file: Any, level: TiffLevel) -> list[Any]:
    """Return what the OME-XML says of pictures as wide as this one."""
    if not file.is_ome:
        return []
    every = ElementTree.fromstring(file.ome_metadata).iter()
    return [node for node in every if node.tag.endswith("}Pixels") and int(node.get("SizeX", 0)) == level.grid.width]


class _Bytes:
    """A file's bytes, to several threads at once."""

    def __init__(self, path: str) -> None:
        self._fd: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        if self._fd is None:
            raise ValueError("the slide is closed")
        if hasattr(os, "pread"):
            return os.pread(self._fd, length, offset)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, length)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    __del__ = close


def _file_of(page: Any) -> str:
    return str(page.parent.filehandle.path)


def _absent(pages: Sequence[Any]) -> list[str]:
    """Say which pieces of a picture a file leaves out, as scanners and programs do with empty glass."""
    lengths = [length for page in pages for length in page.databytecounts]
    absent = sum(length == 0 for length in lengths)
    return [f"{absent:,} of {len(lengths):,} pieces of the image are not in the file"] if absent else []


def _notices(level: TiffLevel, series: Any, file: Any) -> list[str]:
    found = _absent(level.pages)
    if len(level.pages) == 3 and not file.is_ome:
        found.append("three pages of one colour each are read as red, green and blue")
    others = len(series.pages) - len(level.pages)
    if others:
        found.append(f"page 1 of {others + 1} of the same size is read")
    profile = level.pages[0].keyframe.tags.get(_ICC)
    found += icc_notices(None if profile is None else bytes(profile.value))
    number = file.series.index(series)
    if number:
        found.append(f"picture {number + 1} of {len(file.series)} is read, the largest")
    return found


def _mpp(file: Any, level: TiffLevel, path: Path) -> float | None:
    """Return µm per px by the OME-XML, else by the resolution tags."""
    sides: list[float] = []
    with suppress(ElementTree.ParseError, KeyError, TypeError, ValueError):
        for node in _pixels_nodes(file, level)[:1]:
            for axis in "XY":
                um = _UM[node.get(f"PhysicalSize{axis}Unit", "µm")]
                sides.append(float(node.get(f"PhysicalSize{axis}", "nan")) * um)
    if not sides:
        tags = level.pages[0].tags
        unit = {_PER_CM: 1e4, _PER_INCH: 25_400.0}.get(int(getattr(tags.get("ResolutionUnit"), "value", 0)))
        for name in ("XResolution", "YResolution") if unit else ():
            tag = tags.get(name)
            if tag is not None and tag.value[0] > 0 and tag.value[1] > 0:
                assert unit is not None
                sides.append(unit * tag.value[1] / tag.value[0])
    return square_mpp(sides, path)
