"""Whole slide formats through OpenSlide: SVS, NDPI, MRXS, SCN, BIF, DICOM, tiled TIFF."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.resolution import square_mpp

__all__ = ["OpenSlideSlide"]


class OpenSlideSlide:
    """A slide read by OpenSlide, which keeps a cache of decoded blocks of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise SlideError(f"{path} cannot be opened: {error}; is the file complete?") from error
        self.size: tuple[int, int] = self._handle.dimensions
        self.downsamples: tuple[float, ...] = (1.0, *self._handle.level_downsamples[1:])
        self.notices: tuple[str, ...] = ()
        self.mpp = _mpp(self._handle.properties, path)

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
        down = self.downsamples[level]
        try:
            rgba = np.asarray(self._handle.read_region((round(x * down), round(y * down)), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise SlideError(f"{self.path} is damaged near x={x * down:.0f}, y={y * down:.0f}: {error}") from error
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgb)
        white = 255 - alpha.astype(np.uint16)
        blended = (rgb.astype(np.uint16) * alpha + 127) // 255 + white
        return np.asarray(blended, dtype=np.uint8)

    def close(self) -> None:
        """See `Slide.close`."""
        self._handle.close()


def _mpp(properties: Mapping[str, str], path: Path) -> float | None:
    sides = []
    for key in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y):
        with suppress(KeyError, ValueError):
            sides.append(float(properties[key]))
    return square_mpp(sides, path)
