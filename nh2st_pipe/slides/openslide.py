"""Whole slide formats through OpenSlide: SVS, NDPI, MRXS, SCN, BIF, DICOM, tiled TIFF."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, reason_of
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.slides.base import libraries
from nh2st_pipe.slides.levels import true_levels
from nh2st_pipe.slides.resolution import square_mpp
from nh2st_pipe.slides.tiff import TiffPieces, tiled_pages

__all__ = ["OpenSlideSlide"]

_PLAIN_TILES = ("aperio", "generic-tiff")
"""Vendors whose levels are pages of tiles that adjoin: we decode those ourselves, without OpenSlide's way over
premultiplied BGRA, at 1.7 to 5 times its speed (benchmarks/reader.py)."""
_MOST_PER_POWER = 25.0  # µm per px times magnification; about 10 for all scanners


class OpenSlideSlide:
    """A slide read by OpenSlide, which keeps a cache of decoded blocks of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise SlideError(f"{path} cannot be opened: {reason_of(error)}; is the file complete?") from error
        self.size: tuple[int, int] = self._handle.dimensions
        self.reader = f"openslide {openslide.__library_version__}"
        try:
            self._describe()
        except BaseException:
            self._handle.close()
            raise

    def _describe(self) -> None:
        handle, properties = self._handle, self._handle.properties
        downs = (1.0, *handle.level_downsamples[1:])
        sides = [
            tuple(int(properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in ("width", "height"))
            for number in range(handle.level_count)
        ]
        tiles = [max(each) for each in sides]
        check_image(self.path, handle.dimensions, alone=False)
        for across, down in sides:
            require(4 * across * down, f"{self.path}: a tile of {across:,} × {down:,} px")
        self._numbers, words = true_levels(handle.level_dimensions, downs, tiles)
        self.downsamples: tuple[float, ...] = tuple(downs[number] for number in self._numbers)
        self.origin = _origin(properties)
        self.mpp = _mpp(properties, self.path)
        self.notices: tuple[str, ...] = (*words, *_full_resolution_missing(properties, self.mpp))
        self._direct: dict[int, int] = {}
        if properties.get(openslide.PROPERTY_NAME_VENDOR) in _PLAIN_TILES:
            pages, absent = tiled_pages(self.path, [handle.level_dimensions[number] for number in self._numbers])
            self.notices += tuple(absent)
            if pages:
                self._direct = {level: index for index, level in enumerate(pages)}
                self._pieces = TiffPieces(self.path, list(pages.values()))
                self.reader += f", {libraries('tifffile', 'imagecodecs')}"

    @staticmethod
    def reads(path: Path, *, scanners_only: bool = False) -> bool:
        """Whether OpenSlide knows the format of the file at `path`; `scanners_only` leaves out tiled TIFF of anyone."""
        try:
            kind = openslide.OpenSlide.detect_format(str(path))
        except openslide.OpenSlideError:
            return True  # it knows the format and cannot read this file; opening it says why
        return kind is not None and not (scanners_only and kind == "generic-tiff")

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`."""
        if level in self._direct:
            return self._pieces.region(x, y, width, height, self._direct[level])
        down, at = self.downsamples[level], self._numbers[level]
        try:
            rgba = np.asarray(self._handle.read_region((round(x * down), round(y * down)), at, (width, height)))
        except openslide.OpenSlideError as error:
            raise SlideError(
                f"{self.path} is damaged near x={x * down:.0f}, y={y * down:.0f}: {reason_of(error)}"
            ) from error
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgb)
        white = 255 - alpha.astype(np.uint16)
        blended = (rgb.astype(np.uint16) * alpha + 127) // 255 + white
        return np.asarray(blended, dtype=np.uint8)

    def close(self) -> None:
        """See `Slide.close`."""
        self._handle.close()
        if self._direct:
            self._pieces.close()


def _full_resolution_missing(properties: Mapping[str, str], mpp: float | None) -> list[str]:
    """Say where the largest picture is not the scan itself: of several files (DICOM) one may have stayed behind."""
    if properties.get("dicom.ImageType[3]") == "RESAMPLED":
        return [
            "its largest picture is marked as resampled: is the file of full resolution missing from the folder? "
            "Coordinates are counted on what is there"
        ]
    with suppress(KeyError, ValueError):
        power = float(properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER])
        if mpp is not None and power > 0 and mpp > _MOST_PER_POWER / power:
            return [
                f"it was scanned at {power:g}×, and its largest picture has {mpp:.4g} µm per px: is the one of full "
                "resolution missing? Coordinates are counted on what is there"
            ]
    return []


def _origin(properties: Mapping[str, str]) -> tuple[int, int]:
    names = openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y
    x, y = (int(properties.get(name, 0)) for name in names)
    return x, y


def _mpp(properties: Mapping[str, str], path: Path) -> float | None:
    sides = []
    for key in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y):
        with suppress(KeyError, ValueError):
            sides.append(float(properties[key]))
    return square_mpp(sides, path)
