"""The H&E under spots at the encoder's resolution: pictures of three by three tiles, as many as a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError

__all__ = ["crops_of", "spread_over"]

_TILES, _TILE_PX = 3, 224
_QUALITY = 72
_BYTES = 4_000_000  # of all slides' crops together, before base64
_PER_CROP = 45_000  # that one takes, about
_FEWEST = 4


def spread_over(xy: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Return the rows of up to `most` of n × 2 places, spread over all of them: each the farthest from those before."""
    n = len(xy)
    if n <= most:
        return np.arange(n)
    chosen = [int(np.argmin(np.linalg.norm(xy - np.median(xy, axis=0), axis=1)))]
    away = np.linalg.norm(xy - xy[chosen[0]], axis=1)
    while len(chosen) < most:
        chosen.append(int(away.argmax()))
        away = np.minimum(away, np.linalg.norm(xy - xy[chosen[-1]], axis=1))
    return np.sort(np.array(chosen, np.int64))


def crops_of(path: Path, xy: NDArray[np.float64], about: Mapping[str, Any], slides: int) -> tuple[list[int], list[str]]:
    """Return which spots (n × 2, level-0 px) have a picture, and these as base64 of JPEG, for a page of so many
    `slides`. `about` is what the prediction says of its image: its size, and that of a tile.

    Raises SlideError where the image cannot be read, or is not the one that was predicted.
    """
    from nh2st_pipe.slides import open_slide
    from nh2st_pipe.slides.base import read_tile

    slide = open_slide(path)
    try:
        if slide.size != (about["width"], about["height"]):
            raise SlideError(
                f"{path} has {slide.size[0]:,} × {slide.size[1]:,} px, and the slide that was predicted "
                f"{about['width']:,} × {about['height']:,}: is it another?"
            )
        rows = spread_over(xy, max(_FEWEST, _BYTES // _PER_CROP // max(1, slides)))
        side, found, held = _TILES * float(about["tile_level0_px"]), list[str](), 0
        for row in rows:
            centre = float(xy[row, 0]), float(xy[row, 1])
            buffer = io.BytesIO()
            Image.fromarray(read_tile(slide, centre, side, _TILES * _TILE_PX, "bicubic")).save(
                buffer, "JPEG", quality=_QUALITY
            )
            held += len(buffer.getvalue())
            found.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    finally:
        slide.close()
    while held > 2 * _BYTES / max(1, slides) and len(found) > 1:  # tissue of more detail than most
        held -= len(found.pop()) * 3 // 4
    return [int(row) for row in rows[: len(found)]], found
