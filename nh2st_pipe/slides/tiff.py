"""TIFF files that OpenSlide reads in part or not at all, through tifffile and imagecodecs.

OME-TIFF (levels in sub-IFDs, resolution in its XML), plain TIFF too large to be decoded whole, planar TIFF, and
compressions that OpenSlide and Pillow do not know (JPEG 2000, LERC, zstd …). Pieces of the file (tiles or strips) are
decoded when a region asks for them, and the last ones kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import check_image
from nh2st_pipe.slides.base import libraries
from nh2st_pipe.slides.directories import open_tiff
from nh2st_pipe.slides.levels import downsample_of, true_levels
from nh2st_pipe.slides.pieces import Grid, Pieces
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["TiffLevel", "TiffPieces", "TiffSlide", "tiled_pages"]

_LARGE_PX = 64_000_000  # from which on a plain image is not decoded whole
_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_PER_CM, _PER_INCH = 3, 2  # the tag's values
_ALIKE = (1, 5, 7, 8, 32946, 33005)  # none, LZW, JPEG, deflate, Aperio's JPEG 2000 of RGB
_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


@dataclass(frozen=True)
class TiffLevel:
    """One resolution: a page, or a page for each colour."""

    pages: tuple[Any, ...]
    planar: bool
    """Whether the colours of a page lie one behind the other."""
    grid: Grid

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px."""
        return self.grid.width, self.grid.height


class TiffPieces(Pieces):
    """Levels of a TIFF (of several files, where its parts lie in several), opened anew for as long as this lives."""

    def __init__(self, path: Path, levels: Sequence[TiffLevel]) -> None:
        super().__init__([level.grid for level in levels], path)
        self._path, self._levels = path, levels
        self._bytes_of = {name: _Bytes(name) for level in levels for name in map(_file_of, level.pages)}

    def close(self) -> None:
        """Close the files, and free what was decoded."""
        super().close()
        for file in self._bytes_of.values():
            file.close()

    def decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Pieces.decode`."""
        of, grid = self._levels[level], self._grids[level]
        down, across = grid.piece
        n_across, n_down = -(-grid.width // across), -(-grid.height // down)
        index = row * n_across + column
        if of.planar:
            sources = [(of.pages[0], index + colour * n_across * n_down) for colour in range(3)]
        else:
            sources = [(page, index) for page in of.pages]
        at = f"x={column * across}, y={row * down} (of a level of {grid.width:,} px)"
        with fault_of(SlideError, f"{self._path} is damaged near {at}"):
            return _rgb([self._one(page, index, grid.piece) for page, index in sources])

    def _one(self, page: Any, index: int, piece: tuple[int, int]) -> NDArray[Any]:
        """Return one piece of one page, h × w × samples; white where the file leaves it out."""
        of = page.keyframe  # pages of a series have all but their data in common
        samples = 1 if of.planarconfig == 2 else of.samplesperpixel
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if length == 0:
            return _white(piece, samples, of.dtype)
        data = self._bytes_of[_file_of(page)].read(offset, length)
        if len(data) < length:
            raise ValueError(f"the file ends {length - len(data):,} bytes early")
        found = of.decode(data, index, jpegtables=page.jpegtables)[0]
        if found is None:
            return _white(piece, samples, of.dtype)
        values: NDArray[Any] = found[0][: piece[0], : piece[1]]
        if values.shape[:2] == piece:
            return values
        filled = _white(piece, samples, of.dtype)
        filled[: values.shape[0], : values.shape[1]] = values
        return filled


class TiffSlide:
    """A TIFF read piece by piece. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = (0, 0)
        self.reader = libraries("tifffile", "imagecodecs")
        cause = f"{path} cannot be opened (is the file complete?)"
        with fault_of(SlideError, cause), open_tiff(path) as file:
            self._describe(file)

    def _describe(self, file: Any) -> None:
        path = self.path
        series = max(file.series, key=lambda each: each.size)
        levels = [level for level in map(_level, series.levels) if level is not None]
        if not levels:
            raise SlideError(
                f"{path} is a TIFF of {series.axes} {series.shape}, and a slide has one picture of red, green and "
                "blue; save it as RGB"
            )
        kept, words = true_levels([level.size for level in levels])
        levels = [levels[number] for number in kept]
        self.size: tuple[int, int] = levels[0].size
        check_image(path, self.size, alone=False)
        self.downsamples: tuple[float, ...] = tuple(downsample_of(self.size, level.size) for level in levels)
        self.mpp = _mpp(file, levels[0], path)
        self.notices = (*_notices(levels[0], series, file), *words)
        self._pieces = TiffPieces(path, levels)

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether this is a TIFF that is better read here: of OME, with levels in sub-IFDs, or large and not tiled."""
        with path.open("rb") as file:
            if file.read(4) not in _MAGIC:
                return False
        try:
            with open_tiff(path) as tif:
                series = max(tif.series, key=lambda each: each.size)
                level = _level(series.levels[0])
                if level is None:
                    return bool(tif.is_ome)  # opening it says what is wrong with it
                page = level.pages[0]
                large = level.size[0] * level.size[1] > _LARGE_PX and not page.is_tiled
                return bool(tif.is_ome or page.subifds or large or level.planar)
        except Exception:  # no TIFF that tifffile understands
            return False

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        return self._pieces.region(x, y, width, height, level)

    def close(self) -> None:
        """See `Slide.close`."""
        self._pieces.close()


def tiled_pages(path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[dict[int, TiffLevel], list[str]]:
    """Return those of an OpenSlide slide's levels (width, height) that are tiled pages of a TIFF, by their number; and
    what is to be said of level 0.

    Such a page has the level's size, colours of eight bits, a compression whose px OpenSlide and we read alike, and
    all of its tiles.
    """
    found: dict[int, TiffLevel] = {}
    words: list[str] = []
    try:
        with open_tiff(path) as file:
            pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            for number, size in enumerate(sizes):
                for page in (each for each in pages if each.compression in _ALIKE):
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


def _level_of_pages(pages: tuple[Any, ...], axes: str) -> TiffLevel | None:
    page = pages[0].keyframe
    axes = axes.replace("Q", "").replace("I", "")
    colours = {"YX": 1, "YXS": page.samplesperpixel, "SYX": page.samplesperpixel, "CYX": len(pages)}.get(axes)
    if colours not in (1, 3, 4) or page.dtype not in (np.uint8, np.uint16) or (axes == "CYX" and colours != 3):
        return None
    if axes != "CYX" and len(pages) != 1:
        return None
    if page.photometric not in (1, 2, 6) and page.compression not in (33003, 33005, 34712):
        return None  # white is zero, a palette, CMYK: Pillow's
    for each in pages:  # read while the file is open
        _ = each.dataoffsets, each.databytecounts, each.jpegtables, each.keyframe.decode
    piece = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    planar = page.planarconfig == 2 and page.samplesperpixel > 1
    return TiffLevel(
        pages, planar, Grid(page.imagewidth, page.imagelength, (min(piece[0], page.imagelength), piece[1]))
    )


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


def _white(piece: tuple[int, int], samples: int, dtype: Any) -> NDArray[Any]:
    return np.full((*piece, samples), np.iinfo(dtype).max, dtype)


def _rgb(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
    """Return h × w × 3 of eight bits from the pieces of one place: one for all colours, or one for each."""
    values = parts[0] if len(parts) == 1 else np.concatenate([part[..., :1] for part in parts], axis=2)
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    if values.shape[2] == 1:
        return np.repeat(values, 3, axis=2)
    return np.ascontiguousarray(values[..., :3])


def _absent(pages: Sequence[Any]) -> list[str]:
    """Say which pieces of a picture a file leaves out, as scanners and programs do with empty glass."""
    lengths = [length for page in pages for length in page.databytecounts]
    absent = sum(length == 0 for length in lengths)
    return [f"{absent:,} of {len(lengths):,} pieces of the image are not in the file"] if absent else []


def _notices(level: TiffLevel, series: Any, file: Any) -> list[str]:
    found = _absent(level.pages)
    if level.pages[0].dtype == np.uint16:
        found.append("16 bits a px are read as their upper 8")
    number = file.series.index(series)
    if number:
        found.append(f"picture {number + 1} of {len(file.series)} is read, the largest")
    return found


def _mpp(file: Any, level: TiffLevel, path: Path) -> float | None:
    """Return µm per px by the OME-XML, else by the resolution tags."""
    sides: list[float] = []
    if file.is_ome:
        with suppress(ElementTree.ParseError, KeyError, TypeError, ValueError):
            for node in ElementTree.fromstring(file.ome_metadata).iter():
                if node.tag.endswith("}Pixels") and int(node.get("SizeX", 0)) == level.grid.width:
                    for axis in "XY":
                        um = _UM[node.get(f"PhysicalSize{axis}Unit", "µm")]
                        sides.append(float(node.get(f"PhysicalSize{axis}", "nan")) * um)
                    break
    if not sides:
        tags = level.pages[0].tags
        unit = {_PER_CM: 1e4, _PER_INCH: 25_400.0}.get(int(getattr(tags.get("ResolutionUnit"), "value", 0)))
        for name in ("XResolution", "YResolution") if unit else ():
            tag = tags.get(name)
            if tag is not None and tag.value[0] > 0 and tag.value[1] > 0:
                assert unit is not None
                sides.append(unit * tag.value[1] / tag.value[0])
    return square_mpp(sides, path)
