"""TIFF files that OpenSlide reads in part or not at all, through tifffile and imagecodecs.

OME-TIFF (levels in sub-IFDs, resolution in its XML), plain TIFF too large to be decoded whole, planar TIFF, and
compressions that OpenSlide and Pillow do not know (JPEG 2000, LERC, zstd …). Pieces of the file (tiles or strips) are
decoded when a region asks for them, and the last ones kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["TiffSlide"]

_KEPT_BYTES = 96 << 20  # of decoded pieces
_LARGE_PX = 64_000_000  # from which on a plain image is not decoded whole
_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_PER_CM, _PER_INCH = 3, 2  # the tag's values
_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


@dataclass(frozen=True)
class _Level:
    """One resolution: a page, or a page for each colour."""

    pages: tuple[Any, ...]
    width: int
    height: int
    planar: bool
    """Whether the colours of a page lie one behind the other."""
    piece: tuple[int, int]
    """Height and width of a tile or strip, px."""


class TiffSlide:
    """A TIFF read piece by piece. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cause = f"{path} cannot be opened (is the file complete?)"
        with fault_of(SlideError, cause):
            self._file = tifffile.TiffFile(path)
        try:
            with fault_of(SlideError, cause):
                self._describe()
        except BaseException:
            self._file.close()
            raise
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0

    def _describe(self) -> None:
        path = self.path
        series = max(self._file.series, key=lambda each: each.size)
        self._levels = [level for level in map(_level, series.levels) if level is not None]
        if not self._levels:
            raise SlideError(
                f"{path} is a TIFF of {series.axes} {series.shape}, and a slide has one picture of red, green and "
                "blue; save it as RGB"
            )
        first = self._levels[0]
        self.size: tuple[int, int] = first.width, first.height
        self.downsamples: tuple[float, ...] = tuple(
            (first.width / level.width + first.height / level.height) / 2 for level in self._levels
        )
        self.mpp = _mpp(self._file, first, path)
        self.notices = tuple(_notices(first, series, self._file))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether this is a TIFF that is better read here: of OME, with levels in sub-IFDs, or large and not tiled."""
        with path.open("rb") as file:
            if file.read(4) not in _MAGIC:
                return False
        try:
            with tifffile.TiffFile(path) as tif:
                series = max(tif.series, key=lambda each: each.size)
                level = _level(series.levels[0])
                if level is None:
                    return bool(tif.is_ome)  # opening it says what is wrong with it
                page = level.pages[0]
                large = level.width * level.height > _LARGE_PX and not page.is_tiled
                return bool(tif.is_ome or page.subifds or large or level.planar)
        except Exception:  # no TIFF that tifffile understands
            return False

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        of = self._levels[level]
        region = np.full((height, width, 3), 255, np.uint8)
        left, right = (min(max(v, 0), of.width) for v in (x, x + width))
        top, bottom = (min(max(v, 0), of.height) for v in (y, y + height))
        down, across = of.piece
        for row in range(top // down, -(-bottom // down)) if right > left else ():
            for column in range(left // across, -(-right // across)):
                piece = self._piece(level, row, column)
                y0, x0 = max(top, row * down), max(left, column * across)
                y1, x1 = min(bottom, (row + 1) * down), min(right, (column + 1) * across)
                part = piece[y0 - row * down : y1 - row * down, x0 - column * across : x1 - column * across]
                region[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return region

    def close(self) -> None:
        """See `Slide.close`."""
        self._file.close()
        self._kept.clear()

    def _piece(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """Return a tile or strip h × w × 3, decoded or as it was kept."""
        key = level, row, column
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        piece = self._decoded(self._levels[level], row, column)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = piece
                self._bytes += piece.nbytes
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return piece

    def _decoded(self, level: _Level, row: int, column: int) -> NDArray[np.uint8]:
        down, across = level.piece
        n_across, n_down = -(-level.width // across), -(-level.height // down)
        number = row * n_across + column
        if level.planar:
            sources = [(level.pages[0], number + colour * n_across * n_down) for colour in range(3)]
        else:
            sources = [(page, number) for page in level.pages]
        where = f"{self.path} is damaged near x={column * across}, y={row * down} (of a level of {level.width:,} px)"
        with fault_of(SlideError, where):
            return _rgb([self._one(page, index, level.piece) for page, index in sources])

    def _one(self, page: Any, index: int, piece: tuple[int, int]) -> NDArray[Any]:
        """Return one piece of one page, h × w × samples; white where the file leaves it out."""
        of = page.keyframe  # pages of a series have all but their data in common
        samples = 1 if of.planarconfig == 2 else of.samplesperpixel
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        white = np.full((*piece, samples), np.iinfo(of.dtype).max, of.dtype)
        if length == 0:
            return white
        with self._lock:
            self._file.filehandle.seek(offset)
            data = self._file.filehandle.read(length)
        if len(data) < length:
            raise ValueError(f"the file ends {length - len(data):,} bytes early")
        found = of.decode(data, index, jpegtables=page.jpegtables)[0]
        if found is None:
            return white
        values = found[0][: piece[0], : piece[1]]
        white[: values.shape[0], : values.shape[1]] = values
        return white


def _level(series: Any) -> _Level | None:
    """Return what is needed to read one resolution; None where it is no picture of one or three colours."""
    page = series.keyframe
    axes = series.axes.replace("Q", "").replace("I", "")
    pages: tuple[Any, ...] = tuple(series.pages)
    colours = {"YX": 1, "YXS": page.samplesperpixel, "SYX": page.samplesperpixel, "CYX": len(pages)}.get(axes)
    if colours not in (1, 3, 4) or page.dtype not in (np.uint8, np.uint16) or (axes == "CYX" and colours != 3):
        return None
    if axes != "CYX" and len(pages) != 1:
        return None
    if page.photometric not in (1, 2, 6) and page.compression not in (33003, 33005, 34712):
        return None  # white is zero, a palette, CMYK: Pillow's
    piece = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    planar = page.planarconfig == 2 and page.samplesperpixel > 1
    return _Level(pages, page.imagewidth, page.imagelength, planar, (min(piece[0], page.imagelength), piece[1]))


def _rgb(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
    """Return h × w × 3 of eight bits from the pieces of one place: one for all colours, or one for each."""
    values = parts[0] if len(parts) == 1 else np.concatenate([part[..., :1] for part in parts], axis=2)
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    if values.shape[2] == 1:
        return np.repeat(values, 3, axis=2)
    return np.ascontiguousarray(values[..., :3])


def _notices(level: _Level, series: Any, file: Any) -> list[str]:
    found = []
    if level.pages[0].dtype == np.uint16:
        found.append("16 bits a px are read as their upper 8")
    number = file.series.index(series)
    if number:
        found.append(f"picture {number + 1} of {len(file.series)} is read, the largest")
    return found


def _mpp(file: Any, level: _Level, path: Path) -> float | None:
    """Return µm per px by the OME-XML, else by the resolution tags."""
    sides: list[float] = []
    if file.is_ome:
        with suppress(ElementTree.ParseError, KeyError, TypeError, ValueError):
            for node in ElementTree.fromstring(file.ome_metadata).iter():
                if node.tag.endswith("}Pixels") and int(node.get("SizeX", 0)) == level.width:
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
