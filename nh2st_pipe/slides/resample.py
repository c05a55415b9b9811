"""Tiles made smaller: by Pillow, or by torch's kernel for eight bits (the same px in a fifth of the time)."""

from __future__ import annotations

import sys
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["SUPPORT", "Interpolation", "resized", "shrunk", "times_smaller"]

Interpolation = Literal["bilinear", "bicubic"]
_FILTER = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SUPPORT = {"bilinear": 1, "bicubic": 2}
"""Radius of each filter in px of what it makes: what has to be read around a tile for its edge to be right."""
_TRIED_PX, _NEAR = 24, 1e-9


def resized(
    pixels: NDArray[np.uint8], out_px: int, box: tuple[float, float, float, float], interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Return the `box` (left, top, right, bottom) of h × w × 3 as out_px × out_px × 3, by Pillow: any scale, any place.

    What lies around the box is seen by the filter.
    """
    return np.asarray(Image.fromarray(pixels).resize((out_px, out_px), _FILTER[interpolation], box=box))


def times_smaller(scale: float, corner: tuple[float, float], interpolation: Interpolation) -> int | None:
    """Return how many times smaller `shrunk` can make a tile: `scale` px of its level for one of output, counted from
    its `corner`.

    None where that is for Pillow: torch knows whole px and whole times alone, and is not loaded for this (it takes
    seconds).
    """
    times = round(scale)
    between = max(abs(each - round(each)) for each in (scale, *corner))
    if times < 2 or between > _NEAR or "torch" not in sys.modules:
        return None
    return times if _same(times, interpolation) else None


def shrunk(pixels: NDArray[np.uint8], times: int, interpolation: Interpolation) -> NDArray[np.uint8]:
    """Return a tile from the px of its level, h × w × 3, with as many around it as the filter sees."""
    import torch
    from torch.nn.functional import interpolate

    height, width = (side // times for side in pixels.shape[:2])
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with torch.inference_mode():
        small = interpolate(values, size=(height, width), mode=interpolation, antialias=True, align_corners=False)
    cut = SUPPORT[interpolation]
    tile: NDArray[np.uint8] = small[0].permute(1, 2, 0).numpy()[cut:-cut, cut:-cut]
    return tile


@cache
def _same(times: int, interpolation: Interpolation) -> bool:
    """Whether torch gives the same px as Pillow on this processor: tried once, on noise."""
    edge, side = SUPPORT[interpolation] * times, (_TRIED_PX + 2 * SUPPORT[interpolation]) * times
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    by_pillow = resized(pixels, _TRIED_PX, (edge, edge, side - edge, side - edge), interpolation)
    return np.array_equal(shrunk(pixels, times, interpolation), by_pillow)
