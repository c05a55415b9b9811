"""What every slide offers, and how a tile is cut from it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.levels import Step, area_step
from nh2st_pipe.slides.nvidia import PieceDecoder
from nh2st_pipe.slides.resample import SUPPORT, Interpolation, resized, shrunk, times_smaller

__all__ = [
    "DecodesMany",
    "Interpolation",
    "Slide",
    "UndecodedError",
    "fetch_tiles",
    "libraries",
    "read_tile",
    "smaller",
    "thumbnail",
]

_STRIP_BYTES = 48e6  # of a level read at once for a thumbnail
_AT_ONCE = 2
_SAME_SCALE = 1e-3  # a level this close to the scale asked for is taken as it is


class UndecodedError(SlideError):
    """What is raised where a library cannot decode a file; another may. Any other SlideError is the last word."""


class Slide(Protocol):
    """An open slide. Safe to read from several threads; not to be carried across a fork."""

    path: Path
    size: tuple[int, int]
    """Width and height, level-0 px."""
    mpp: float | None
    """µm per level-0 px by the file itself, None where it does not say."""
    notices: tuple[str, ...]
    """What a person would not expect of how the file is read."""
    reader: str
    """The library that decodes it, and its version."""
    origin: tuple[int, int]
    """Where QuPath counts from, level-0 px: the corner of what was scanned, where the file says it (MRXS)."""
    steps: tuple[Step, ...]
    """Level-0 px per px of each level, along x and along y; of the first 1."""

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """Return height × width × 3 (RGB); white outside the image.

        x and y are px **of that level**. Raises SlideError where the image cannot be decoded.
        """
        ...

    def try_decoding(self) -> None:
        """Decode a piece of it. Raises SlideError where that cannot be done."""
        ...

    def close(self) -> None:
        """Free the file and whatever was decoded."""
        ...


@runtime_checkable
class DecodesMany(Protocol):
    """A slide that can have its pieces decoded by another library, many at once."""

    def decode_with(self, decoder: PieceDecoder) -> None:
        """Have it decoded by `decoder`, as far as it makes the same picture of it: `notices` says what it does not."""
        ...

    def fetch(self, level: int, boxes: Iterable[tuple[int, int, int, int]]) -> None:
        """Decode together what regions (x, y, width, height; px of that level) take."""
        ...


@cache
def libraries(*packages: str) -> str:
    """Return installed packages with their versions: "tifffile 2026.1.1, imagecodecs 2026.2.2"."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def read_tile(
    slide: Slide,
    centre_xy: tuple[float, float],
    size_level0_px: float,
    out_px: int,
    interpolation: Interpolation,
) -> NDArray[np.uint8]:
    """Cut the square of `size_level0_px` around `centre_xy` (level-0 px) as out_px × out_px × 3, uint8.

    The best level is the coarsest that is still at least as fine as asked for; it is resampled once, with an
    antialiasing filter that sees the pixels around the tile, or not at all where its scale fits.
    """
    cut = _cut(slide, centre_xy, size_level0_px, out_px, interpolation)
    pixels = slide.read_region(*cut.box, cut.level)
    if cut.times is not None:
        return shrunk(pixels, cut.times, interpolation)
    return pixels if cut.within is None else resized(pixels, out_px, cut.within, interpolation)


def fetch_tiles(
    slide: Slide,
    centres: NDArray[np.float64],
    size_level0_px: float,
    out_px: int,
    interpolation: Interpolation,
) -> None:
    """Decode together what `read_tile` takes for n × 2 centres; nothing of a slide that decodes a piece at a time."""
    if isinstance(slide, DecodesMany):
        cuts = [_cut(slide, (float(x), float(y)), size_level0_px, out_px, interpolation) for x, y in centres]
        for level in sorted({cut.level for cut in cuts}):
            slide.fetch(level, [cut.box for cut in cuts if cut.level == level])


@dataclass(frozen=True)
class _Cut:
    """The px that a tile is made of: a box (x, y, width, height) of a level, `times` smaller or the part `within`."""

    level: int
    box: tuple[int, int, int, int]
    times: int | None = None
    within: tuple[float, float, float, float] | None = None


def _cut(
    slide: Slide,
    centre_xy: tuple[float, float],
    size_level0_px: float,
    out_px: int,
    interpolation: Interpolation,
) -> _Cut:
    scale = size_level0_px / out_px
    level = _level_for(slide, scale)
    steps = slide.steps[level]
    left, top = ((centre - size_level0_px / 2) / step for centre, step in zip(centre_xy, steps, strict=True))
    if all(abs(scale / step - 1) <= _SAME_SCALE for step in steps):
        return _Cut(level, (round(left), round(top), out_px, out_px))
    across, down = (size_level0_px / step for step in steps)
    times = times_smaller(across / out_px, (left, top), interpolation) if across == down else None
    if times is not None:
        edge, side = SUPPORT[interpolation] * times, (out_px + 2 * SUPPORT[interpolation]) * times
        return _Cut(level, (round(left) - edge, round(top) - edge, side, side), times)
    margin = int(np.ceil(SUPPORT[interpolation] * max(1.0, scale / min(steps)))) + 1
    x0, y0 = int(np.floor(left)) - margin, int(np.floor(top)) - margin
    width, height = (int(np.ceil(side)) + 2 * margin + 1 for side in (across, down))
    within = (left - x0, top - y0, left - x0 + across, top - y0 + down)
    return _Cut(level, (x0, y0, width, height), within=within)


def thumbnail(slide: Slide, longest_px: int) -> tuple[NDArray[np.uint8], float]:
    """Return the whole slide as h × w × 3 (uint8) and its scale in thumbnail px per level-0 px."""
    width, height = slide.size
    scale = min(1.0, longest_px / max(width, height))
    out = (max(1, round(width * scale)), max(1, round(height * scale)))
    level = _level_for(slide, 1 / scale)
    # Strips keep the memory small where the coarsest level is still large; two at a time, for decoding lets others in.
    level_w, level_h = (max(1, round(side / step)) for side, step in zip(slide.size, slide.steps[level], strict=True))
    strip = max(1, int(_STRIP_BYTES // (3 * level_w)))
    if level_h <= strip:
        whole = Image.fromarray(slide.read_region(0, 0, level_w, level_h, level))
        return np.asarray(whole.resize(out, Image.Resampling.BOX)), scale
    rows = np.linspace(0, level_h, int(np.ceil(level_h / strip)) + 1).round().astype(int)
    picture = np.empty((out[1], out[0], 3), np.uint8)
    edges = (rows * out[1] / level_h).round().astype(int)

    def read(number: int) -> None:
        top, bottom = (int(v) for v in rows[number : number + 2])
        out_top, out_bottom = (int(v) for v in edges[number : number + 2])
        if out_bottom > out_top:
            part = Image.fromarray(slide.read_region(0, top, level_w, bottom - top, level))
            picture[out_top:out_bottom] = np.asarray(part.resize((out[0], out_bottom - out_top), Image.Resampling.BOX))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="thumbnail") as pool:
        for done in [pool.submit(read, number) for number in range(len(rows) - 1)]:
            done.result()
    return picture, scale


def _level_for(slide: Slide, scale: float) -> int:
    """Return the coarsest level that is at least as fine as `scale` level-0 px per px."""
    fine_enough = [i for i, step in enumerate(slide.steps) if max(step) <= scale * (1 + _SAME_SCALE)]
    return max(fine_enough, key=lambda i: area_step(slide.steps[i]), default=0)


def smaller(picture: NDArray[np.uint8], longest_px: int) -> NDArray[np.uint8]:
    """Return a thumbnail (h × w × 3) with at most so many px on its longest side."""
    height, width = picture.shape[:2]
    scale = longest_px / max(width, height)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
