"""OME-Zarr folders (NGFF 0.4 and 0.5), through zarr: chunk by chunk, the levels as their metadata order them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.codecs import check_codecs
from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.slides.base import libraries
from nh2st_pipe.slides.levels import Step, step_of, true_levels
from nh2st_pipe.slides.pieces import Grid, Pieces
from nh2st_pipe.slides.pixels import Samples, check_dtype, to_rgb, with_bits
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["OmeZarrSlide"]

_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_LEAST_PIECE = 256  # px; smaller chunks are read several at once
_SERIES = "0"  # where bioformats2raw puts the first picture


@dataclass(frozen=True)
class _Level:
    array: Any
    axes: tuple[str, ...]
    """A letter for each dimension, of t, c, z, y, x."""
    scale: tuple[float, ...]
    """Of each dimension, in the axis' unit."""

    def side(self, axis: str) -> int:
        return int(self.array.shape[self.axes.index(axis)]) if axis in self.axes else 1

    @property
    def size(self) -> tuple[int, int]:
        return self.side("x"), self.side("y")

    def grid(self) -> Grid:
        down, across = (int(self.array.chunks[self.axes.index(axis)]) for axis in "yx")
        piece = tuple(side * max(1, _LEAST_PIECE // side) for side in (down, across))
        return Grid(*self.size, (min(piece[0], self.size[1]), min(piece[1], self.size[0])))


class _Chunks(Pieces):
    def __init__(self, path: Path, levels: Sequence[_Level]) -> None:
        super().__init__([level.grid() for level in levels], path)
        self._path, self._levels = path, levels
        self.samples = {1: Samples("grey"), 3: Samples(), 4: Samples(alpha="straight")}[levels[0].side("c")]

    def decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Pieces.decode`."""
        return to_rgb(self._values(level, row, column), self.samples)

    def some(self, level: int) -> Iterator[NDArray[Any]]:
        """Yield pieces from all over a level as they are stored, those that can be decoded."""
        for row, column in self.spread(level):
            with suppress(SlideError):
                yield self._values(level, row, column)

    def _values(self, level: int, row: int, column: int) -> NDArray[Any]:
        """Return a piece as it is stored, h × w × samples."""
        of, grid = self._levels[level], self._grids[level]
        top, left = row * grid.piece[0], column * grid.piece[1]
        at = {
            "y": slice(top, min(top + grid.piece[0], grid.height)),
            "x": slice(left, min(left + grid.piece[1], grid.width)),
            "c": slice(0, of.side("c")),
        }
        where = f"{self._path} is damaged near x={left}, y={top} (of a level of {grid.width:,} px)"
        with fault_of(SlideError, where):
            values = np.asarray(of.array[tuple(at.get(axis, 0) for axis in of.axes)])
            left_over = [axis for axis in of.axes if axis in at]
            values = np.expand_dims(values, 0) if "c" not in left_over else values
            return np.transpose(values, [(["c"] * ("c" not in left_over) + left_over).index(axis) for axis in "yxc"])


class OmeZarrSlide:
    """A picture of red, green and blue in a folder of OME-Zarr. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = (0, 0)
        self.reader = libraries("zarr", "numcodecs")
        with fault_of(SlideError, f"{path} cannot be opened (is the folder complete?)"):
            self._describe(path)

    def _describe(self, path: Path) -> None:
        image, of, first_of = _image(path)
        multiscales = of["multiscales"]
        scales = multiscales[0]
        axes = tuple(str(axis["name"] if isinstance(axis, Mapping) else axis) for axis in scales.get("axes", "tczyx"))
        whole = _scale(scales, len(axes))
        levels = [
            _Level(_array(_inside(image, str(each["path"]))), axes, tuple(np.multiply(whole, _scale(each, len(axes)))))
            for each in scales["datasets"]
        ]
        _check(path, levels)
        scales_xy = [(level.scale[axes.index("x")], level.scale[axes.index("y")]) for level in levels]
        said = len(set(scales_xy)) == len(scales_xy)
        steps = [step_of(levels[0].size, level.size) for level in levels]
        if said:
            steps = [(x / scales_xy[0][0], y / scales_xy[0][1]) for x, y in scales_xy]
        kept, words = true_levels([level.size for level in levels], steps, said=said)
        levels = [levels[number] for number in kept]
        self.size: tuple[int, int] = levels[0].size
        self.steps: tuple[Step, ...] = tuple(steps[number] for number in kept)
        units = {str(axis["name"]): axis.get("unit") for axis in scales.get("axes", ()) if isinstance(axis, Mapping)}
        um = [_UM.get(str(units.get(axis)), np.nan) * levels[0].scale[axes.index(axis)] for axis in "xy"]
        self.mpp = square_mpp(um, path)
        notices = [first_of] if first_of else []
        if len(multiscales) > 1:
            notices.append(f"picture 1 of {len(multiscales)} is read")
        self._chunks = _Chunks(path, levels)
        samples = self._chunks.samples
        if samples.alpha != "none":
            notices.append("the fourth of its channels is read as opacity")
        self._chunks.samples, of_bits = with_bits(
            path, samples, levels[0].array.dtype, None, self._chunks.some(len(levels) - 1)
        )
        notices += of_bits
        array = levels[0].array
        absent = array.nchunks - array.nchunks_initialized
        if absent:
            notices.append(
                f"{absent:,} of {array.nchunks:,} chunks are not in the folder, and are read as its fill value, "
                f"{array.fill_value}"
            )
        self.notices: tuple[str, ...] = (*notices, *words)

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether the folder `path` is one of Zarr."""
        return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup"))

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        return self._chunks.region(x, y, width, height, level)

    def try_decoding(self) -> None:
        """See `Slide.try_decoding`; no other library would read it."""

    def close(self) -> None:
        """See `Slide.close`."""
        self._chunks.close()


def _image(path: Path) -> tuple[Path, Mapping[str, Any], str | None]:
    """Return the folder of the picture, its attributes, and what to say of others beside it."""
    of = _attributes(path)
    if "multiscales" in of:
        return path, of, None
    if "plate" in of or "well" in of:
        raise SlideError(f"{path} is a plate of many wells; give the folder of one picture in it")
    if "bioformats2raw.layout" in of and (path / _SERIES).is_dir():
        others = sum(each.is_dir() and each.name.isdigit() for each in path.iterdir()) - 1
        of = _attributes(path / _SERIES)
        if "multiscales" in of:
            words = f"picture {_SERIES} is read; {others} others (labels, overviews) lie beside it" if others else None
            return path / _SERIES, of, words
    raise SlideError(f"{path} is a folder of Zarr, and no OME-Zarr picture: its attributes name no multiscales")


def _attributes(folder: Path) -> Mapping[str, Any]:
    """Return what NGFF keeps of a group: under `ome` in zarr.json since 0.5, in .zattrs before."""
    if (folder / "zarr.json").is_file():
        attributes = json.loads((folder / "zarr.json").read_text("utf-8")).get("attributes", {})
        found = attributes.get("ome", attributes)
    elif (folder / ".zattrs").is_file():
        found = json.loads((folder / ".zattrs").read_text("utf-8"))
    else:
        found = {}
    return found if isinstance(found, Mapping) else {}


def _inside(picture: Path, path: str) -> Path:
    """Return where a level lies. Raises SlideError where that is not inside the picture's folder."""
    place = picture / path
    if not place.resolve().is_relative_to(picture.resolve()):
        raise SlideError(f"{picture} names a level outside of its own folder ('{path}'), which is not read")
    return place


def _array(folder: Path) -> Any:
    """Open an array for reading, unless it is packed in a way that is not known."""
    import zarr

    check_codecs(folder, SlideError)
    return zarr.open_array(folder, mode="r")


def _scale(of: Mapping[str, Any], dimensions: int) -> NDArray[np.float64]:
    total = np.ones(dimensions)
    for each in of.get("coordinateTransformations", ()):
        if each.get("type") == "scale":
            total = total * np.asarray(each["scale"], np.float64)
    return total


def _check(path: Path, levels: Sequence[_Level]) -> None:
    """Raise SlideError where a level is no picture of one or three colours."""
    for level in levels:
        of = f"{path} has a picture of {','.join(level.axes)} {level.array.shape}, {level.array.dtype}"
        if not {"x", "y"} <= set(level.axes) or len(level.axes) != level.array.ndim:
            raise SlideError(f"{of}, and its axes should be of t, c, z, y, x, one for each dimension")
        if level.side("c") not in (1, 3, 4) or level.side("z") != 1 or level.side("t") != 1:
            raise SlideError(f"{of}, and a slide has one picture of red, green and blue; save it as RGB")
        check_dtype(path, level.array.dtype)
