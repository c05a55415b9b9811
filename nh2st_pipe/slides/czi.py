"""Zeiss' CZI through libCZI (the extra `czi`): brightfield pictures, their scenes where they lie on the glass."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.slides.base import libraries
from nh2st_pipe.slides.levels import Step
from nh2st_pipe.slides.pixels import Samples, to_rgb, with_bits
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["CziSlide"]

_MAGIC = b"ZISRAWFILE"
_UM = 1e6  # of the metres that a CZI counts in
_CACHE_BYTES = 64 << 20  # of decoded pieces
_CELLS, _MISSING = 512, 0.005  # a side of a picture, and the share of them that rounding at its edges may leave out
_KINDS = {"Bgr24": (Samples(), np.uint8), "Bgr48": (Samples(), np.uint16)} | {
    "Gray8": (Samples("grey"), np.uint8),
    "Gray16": (Samples("grey"), np.uint16),
}
_DIRECTORY_AT = 84  # bytes into the file, where it says where the directory of its pieces begins
_HEADER, _BEFORE_ENTRIES = 32, 128  # bytes of each segment before what it holds, and of a directory before its entries
_LEAST_ENTRY, _DIMENSION, _MOST_ENTRY = 32, 20, 32 + 20 * 12
_BITS = "./Metadata/Information/Image/ComponentBitCount"
_LOOKED_AT = 512  # px a side of the piece that is decoded to see whether it can be


class CziSlide:
    """A picture of red, green and blue, or of grey, in a CZI. Its pieces are put together by libCZI.

    Level 0 spans all scenes, and coordinates count from its upper left corner; between the scenes it is white.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = (0, 0)
        try:
            from pylibCZIrw import czi
        except ImportError as error:
            raise SlideError(
                f"{path.name} is of the format that Zeiss writes, which takes a library more: install "
                f"nh2st-pipe[czi] (or pylibCZIrw), or export the slide from QuPath as OME-TIFF ({path})"
            ) from error
        self.reader = libraries("pylibCZIrw")
        cache = czi.CacheOptions(type=czi.CacheType.Standard, max_memory_usage=_CACHE_BYTES, max_sub_block_count=None)
        with fault_of(SlideError, f"{path} cannot be opened (is the file complete?)"):
            self._pieces = _Pieces(path)
            self._czi = czi.CziReader(str(path), cache_options=cache)
            try:
                self._describe(path)
            except BaseException:
                self._czi.close()
                raise

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether the file at `path` is a CZI, by its first bytes."""
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC

    def _describe(self, path: Path) -> None:
        sides, kinds = self._czi.total_bounding_box, self._czi.pixel_types
        for axis, what in {"C": "channels, as fluorescence has", "Z": "planes of focus", "T": "times"}.items():
            count = sides[axis][1] - sides[axis][0]
            if count > 1:
                of = f"{path} has {count} {what}"
                raise SlideError(f"{of}, and a slide has one picture of red, green and blue; save that one alone")
        kind = kinds.get(0, "no kind that is known")
        if kind not in _KINDS:
            raise SlideError(f"{path} holds px of {kind}, whose white is not known; save it with 8 bits a px")
        self._samples, dtype = _KINDS[kind]
        whole = self._czi.total_bounding_rectangle_no_pyramid
        self._corner = int(whole.x), int(whole.y)
        self.size: tuple[int, int] = (int(whole.w), int(whole.h))
        if min(self.size) < 1:
            raise SlideError(f"{path} holds no picture")
        check_image(path, self.size, alone=False)
        self.steps: tuple[Step, ...] = ((1.0, 1.0), *self._smaller())
        about = _about(self._czi.raw_metadata)
        self.mpp = square_mpp([about.get(f"mpp {axis}", np.nan) for axis in "XY"], path)
        said = int(about["bits"]) if "bits" in about else None
        self._samples, notices = with_bits(path, self._samples, dtype, said, self._some())
        scenes = len(self._czi.scenes_bounding_rectangle_no_pyramid)
        if scenes > 1:
            notices.append(
                f"its {scenes} scenes are read as one picture, each where it lies on the glass; coordinates count from "
                "the corner of them all (QuPath counts from that of each scene)"
            )
        self.notices: tuple[str, ...] = tuple(notices)

    def _smaller(self) -> list[Step]:
        """Return the steps of the levels that the file holds all of, from the finest on.

        Where a piece of one is missing libCZI shows the ground, so that each is held against the finest.
        """
        cell = [max(1.0, side / _CELLS) for side in self.size]
        there: dict[int, NDArray[np.bool_]] = defaultdict(lambda: np.zeros((_CELLS, _CELLS), bool))

        def add(_: int, piece: Any) -> bool:
            logical, stored = piece.logicalRect, piece.physicalSize
            require(4 * stored.w * stored.h, f"{self.path}: a piece of {stored.w:,} × {stored.h:,} px")
            step = round(max(logical.w / max(stored.w, 1), logical.h / max(stored.h, 1)))
            left, top = logical.x - self._corner[0], logical.y - self._corner[1]
            across, down = (
                slice(max(0, round(start / size)), max(0, round((start + side) / size)))
                for start, side, size in zip((left, top), (logical.w, logical.h), cell, strict=True)
            )
            there[step][down, across] = True
            return True

        self._czi.enumerate_subblocks(add)
        most = _MISSING * np.count_nonzero(there[1])
        return [(float(s), float(s)) for s in sorted(there) if s > 1 and np.sum(there[1] & ~there[s]) <= most]

    def _found(self, roi: tuple[int, int, int, int]) -> list[int]:
        """Return the numbers of the pieces, of all levels, that touch a region (its own x, y, width and height)."""
        found = list[int]()

        def add(number: int, _: Any) -> bool:
            found.append(number)
            return True

        self._czi.enumerate_subblocks_subset(add, roi=roi)
        return found

    def _some(self) -> Iterator[NDArray[Any]]:
        """Yield pieces from all over the coarsest level, as they are stored, those that can be decoded."""
        last = len(self.steps) - 1
        width, height = self._side(0, last), self._side(1, last)
        for y in np.linspace(0, max(height - _LOOKED_AT, 0), 5).astype(int):
            for x in np.linspace(0, max(width - _LOOKED_AT, 0), 5).astype(int):
                with suppress(SlideError):
                    yield self._values(int(x), int(y), min(_LOOKED_AT, width), min(_LOOKED_AT, height), last, 0.0)

    def _side(self, axis: int, level: int) -> int:
        return int(np.ceil(self.size[axis] / self.steps[level][axis]))

    def _values(self, x: int, y: int, width: int, height: int, level: int, ground: float) -> NDArray[Any]:
        """Return a region as it is stored, h × w × samples, `ground` (0 to 1) where there is nothing."""
        step = int(self.steps[level][0])
        left, top = (start + at * step for start, at in zip(self._corner, (x, y), strict=True))
        with fault_of(SlideError, f"{self.path} is damaged near x={x * step}, y={y * step}"):
            self._pieces.check(self._found((left, top, width * step, height * step)))
            values = self._czi.read(
                roi=(left, top, width * step, height * step),
                plane={"C": 0, "Z": 0, "T": 0},
                zoom=1 / step,
                background_pixel=(ground,) * 3,
            )
        if abs(values.shape[0] - height) > 1 or abs(values.shape[1] - width) > 1:
            raise SlideError(f"{self.path}: libCZI gives {values.shape} for {height} × {width} px")
        missing = [(0, max(0, want - have)) for want, have in zip((height, width), values.shape[:2], strict=True)]
        values = np.pad(values, [*missing, (0, 0)], mode="edge")[:height, :width]
        return values[..., ::-1]

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        region = np.full((height, width, 3), 255, np.uint8)
        left, right = max(x, 0), min(x + width, self._side(0, level))
        top, bottom = max(y, 0), min(y + height, self._side(1, level))
        if right > left and bottom > top:
            inside = self._values(left, top, right - left, bottom - top, level, 1.0)
            region[top - y : bottom - y, left - x : right - x] = to_rgb(inside, self._samples)
        return region

    def try_decoding(self) -> None:
        """See `Slide.try_decoding`; no other library would read it."""

    def close(self) -> None:
        """See `Slide.close`."""
        self._czi.close()


class _Pieces:
    """Where a CZI's pieces lie. libCZI takes a piece's size as it stands there, and dies of one beyond the file's."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes = path, path.stat().st_size
        with path.open("rb") as file:
            file.seek(_DIRECTORY_AT)
            (directory,) = struct.unpack("<q", file.read(8))
            file.seek(directory + _HEADER)
            (count,) = struct.unpack("<i", file.read(4))
            require(_LEAST_ENTRY * count, f"{path}: a directory of {count:,} pieces")
            file.seek(directory + _HEADER + _BEFORE_ENTRIES)
            entries = file.read(min(count * _MOST_ENTRY, self._bytes))
        self._places = np.empty(max(count, 0), np.int64)
        at = 0
        for number in range(count):
            (self._places[number],) = struct.unpack_from("<q", entries, at + 6)
            (dimensions,) = struct.unpack_from("<i", entries, at + 28)
            at += _LEAST_ENTRY + _DIMENSION * max(dimensions, 0)
        self._sound = np.zeros(len(self._places), bool)

    def check(self, numbers: Iterable[int]) -> None:
        """Raise ValueError where one of the pieces says that it is larger than the file."""
        unseen = [number for number in numbers if not self._sound[number]]
        if not unseen:
            return
        with self._path.open("rb") as file:
            for number in unseen:
                place = int(self._places[number])
                file.seek(place + _HEADER)
                sizes = struct.unpack("<iiq", file.read(16))
                if min(sizes) < 0 or place + sum(sizes) > self._bytes:
                    raise ValueError(f"piece {number} is said to have {max(sizes):,} bytes")
                self._sound[number] = True


def _about(metadata: str) -> dict[str, float]:
    """Return what a CZI's XML says: the sides of a px in µm ("mpp X", "mpp Y") and the bits of a sample ("bits")."""
    found: dict[str, float] = {}
    with suppress(ElementTree.ParseError):
        root = ElementTree.fromstring(metadata)
        for axis in "XY":
            with suppress(ValueError, TypeError):
                found[f"mpp {axis}"] = _UM * float(
                    root.findtext(f"./Metadata/Scaling/Items/Distance[@Id='{axis}']/Value")  # type: ignore[arg-type]
                )
        with suppress(ValueError, TypeError):
            found["bits"] = int(root.findtext(_BITS))  # type: ignore[arg-type]
    return found
