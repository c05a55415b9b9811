"""Whole slide formats through OpenSlide: SVS, NDPI, MRXS, SCN, BIF, DICOM, tiled TIFF."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, reason_of
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.slides.base import UndecodedError, libraries
from nh2st_pipe.slides.levels import Size, Step, step_of, true_levels
from nh2st_pipe.slides.nvidia import PieceDecoder
from nh2st_pipe.slides.pixels import Samples, icc_notices, to_rgb
from nh2st_pipe.slides.resolution import square_mpp
from nh2st_pipe.slides.tiff import MOST_APART, TiffPieces, beyond_others, tiled_pages

__all__ = ["OpenSlideSlide"]

_PLAIN_TILES = ("aperio", "generic-tiff")
"""Vendors whose levels are pages of tiles that adjoin: we decode those ourselves, without OpenSlide's way over
premultiplied BGRA, at 1.7 to 5 times its speed (benchmarks/reader.py)."""
_SPACING = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
_BETWEEN = 1e-3  # px
_NEAR = 0.02
_MOST_PER_POWER = 25.0  # µm per px times magnification; about 10 for all scanners


class OpenSlideSlide:
    """A slide read by OpenSlide, which keeps a cache of decoded blocks of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        why = beyond_others(path) if _by_anyone(path) else None
        if why is not None:
            raise UndecodedError(f"{why}, which OpenSlide does not give as it is")
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            kind = UndecodedError if _by_anyone(path) else SlideError
            raise kind(f"{path} cannot be opened: {reason_of(error)}; is the file complete?") from error
        self.size: tuple[int, int] = self._handle.dimensions
        self.reader = f"openslide {openslide.__library_version__}"
        try:
            self._describe()
        except BaseException:
            self._handle.close()
            raise

    def _describe(self) -> None:
        handle, properties = self._handle, self._handle.properties
        self._downs = (1.0, *handle.level_downsamples[1:])  # by which OpenSlide takes coordinates to a level
        sides = [
            tuple(int(properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in ("width", "height"))
            for number in range(handle.level_count)
        ]
        tiles = [max(each) for each in sides]
        check_image(self.path, handle.dimensions, alone=False)
        for across, down in sides:
            require(4 * across * down, f"{self.path}: a tile of {across:,} × {down:,} px")
        sizes = handle.level_dimensions
        steps = [_step(sizes[0], *of) for of in zip(sizes, self._downs, tiles, strict=True)]
        self._numbers, words = true_levels(sizes, steps, tiles)
        self.steps: tuple[Step, ...] = tuple(steps[number] for number in self._numbers)
        self.origin = _origin(properties)
        self.mpp = _mpp(properties, self.path)
        self.notices: tuple[str, ...] = (*words, *_full_resolution_missing(properties, self.mpp))
        self._direct: dict[int, int] = {}
        self._pieces: TiffPieces
        if properties.get(openslide.PROPERTY_NAME_VENDOR) in _PLAIN_TILES:
            pages, absent = tiled_pages(self.path, [sizes[number] for number in self._numbers])
            self.notices += tuple(absent)
            if pages:
                self._pieces = TiffPieces(self.path, list(pages.values()))
                self._direct = {level: at for at, level in enumerate(pages) if self._alike(level, at)}
                self._direct = self._direct if 0 in self._direct or 0 not in pages else {}
            if self._direct:
                self.reader += f", {libraries('tifffile', 'imagecodecs')}"
        self.notices += tuple(icc_notices(_profile(handle)))

    def _alike(self, level: int, at: int) -> bool:
        """Whether a level's tile with the most in it decodes to the same px here and in OpenSlide.

        Of a level on which OpenSlide, which takes level-0 px, would begin between two px there, the first tile is held
        against it instead.
        """
        row, column = self._pieces.fullest(at)
        step, (tall, wide) = self._downs[self._numbers[level]], self._pieces.piece(at)
        if any(abs(round(each * step) / step - each) > _BETWEEN for each in (column * wide, row * tall)):
            row = column = 0
        try:
            ours = self._pieces.decode(at, row, column)
        except SlideError:
            return False
        place = column * wide, row * tall
        width, height = self._handle.level_dimensions[self._numbers[level]]
        across, down = min(wide, width - place[0]), min(tall, height - place[1])
        try:
            theirs = self._read(*place, across, down, level)
        except SlideError:
            return True
        return bool(np.abs(ours[:down, :across].astype(np.int16) - theirs).max(initial=0) <= MOST_APART)

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
        return self._read(x, y, width, height, level)

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        at = self._numbers[level]
        down = self._downs[at]
        try:
            rgba = np.asarray(self._handle.read_region((round(x * down), round(y * down)), at, (width, height)))
        except openslide.OpenSlideError as error:
            raise SlideError(
                f"{self.path} is damaged near x={x * down:.0f}, y={y * down:.0f}: {reason_of(error)}"
            ) from error
        return to_rgb(rgba, Samples(alpha="straight"))

    def decode_with(self, decoder: PieceDecoder) -> None:
        """See `DecodesMany.decode_with`: of the levels that are not left to OpenSlide."""
        if self._direct:
            self.notices += tuple(self._pieces.decode_with(decoder))
            self.reader += f", {decoder.name}" if self._pieces.by_decoder else ""
        else:
            self.notices += (f"OpenSlide decodes all of it, and {decoder.name} none",)

    def fetch(self, level: int, boxes: Iterable[tuple[int, int, int, int]]) -> None:
        """See `DecodesMany.fetch`."""
        if level in self._direct:
            self._pieces.fetch(self._direct[level], boxes)

    def try_decoding(self) -> None:
        """See `Slide.try_decoding`."""
        last = len(self.steps) - 1
        if last in self._direct:
            return  # it was
        width, height = self._handle.level_dimensions[self._numbers[last]]
        try:
            self.read_region(width // 2, height // 2, 1, 1, last)
        except SlideError as error:
            raise UndecodedError(str(error)) from error

    def close(self) -> None:
        """See `Slide.close`."""
        self._handle.close()
        if hasattr(self, "_pieces"):
            self._pieces.close()


def _by_anyone(path: Path) -> bool:
    """Whether this is a tiled TIFF that no scanner made: others may read it as well."""
    with suppress(openslide.OpenSlideError):
        return bool(openslide.OpenSlide.detect_format(str(path)) == "generic-tiff")
    return True


def _step(full: Size, size: Size, down: float, tile: int) -> Step:
    """Return a level's step by its size, where that is what OpenSlide makes of it: some count px that are not there."""
    step = step_of(full, size, tile)
    return step if max(abs(each / down - 1) for each in step) < _NEAR else (down, down)


def _profile(handle: openslide.OpenSlide) -> bytes | None:
    try:
        profile = handle.color_profile
    except Exception:  # Pillow's, of one that is damaged
        return b"damaged"
    return None if profile is None else bytes(profile.tobytes())


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


_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
_MM = 1e3
_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
_MPP_KEYS: tuple[tuple[str, str, float], ...] = (
    (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y, 1.0),
    ("aperio.MPP", "aperio.MPP", 1.0),
    (f"{_MIRAX}X", f"{_MIRAX}Y", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("philips.DICOM_PIXEL_SPACING[1]", "philips.DICOM_PIXEL_SPACING[0]", _MM),
    (f"{_SPACING}[1]", f"{_SPACING}[0]", _MM),
)
"""Where OpenSlide and vendors say the width and the height of a px, in µm once multiplied; the first that says counts.

DICOM names the distance between rows first, which is the height.
"""
_TIFF_UNITS = {"inch": 25_400.0, "centimeter": 1e4}


def _mpp(properties: Mapping[str, str], path: Path) -> float | None:
    """Return µm per level-0 px, by OpenSlide's own property or that of a vendor, None where there is none."""
    for keys in _MPP_KEYS:
        sides = [um * keys[2] for um in (_value(properties, key) for key in keys[:2]) if um is not None and um > 0]
        if sides:
            return square_mpp(sides, path)
    of_inch = _TIFF_UNITS.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = [_value(properties, f"tiff.{axis}Resolution") for axis in "XY"]
    sides = [of_inch / value for value in per_unit if of_inch is not None and value is not None and value > 0]
    return square_mpp(sides, path)


def _value(properties: Mapping[str, str], key: str) -> float | None:
    """Return a property as a number; KEY[1] is the second number of what KEY holds, where it is not a key itself."""
    place = 0
    if key not in properties and key.endswith("]"):
        key, _, number = key[:-1].rpartition("[")
        place = int(number)
    found = _NUMBER.findall(properties.get(key, ""))
    return float(found[place]) if place < len(found) else None
