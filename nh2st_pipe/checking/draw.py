"""A slide's thumbnail with what is known of it drawn on top: the edge of the tissue, and the tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import binary_closing, binary_dilation

__all__ = ["overlay"]

_EDGE, _TILE, _OFF, _DOUBTED = (16, 122, 62), (20, 80, 200), (214, 40, 40), (235, 120, 0)
_LEAST_BOX_PX, _DOT_PX = 8.0, 5.0
_MOST_TILES = 20_000  # more are not told apart on a picture of this size


def overlay(
    picture: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    size: tuple[int, int],
    xy: NDArray[np.float64] | None,
    tile_level0_px: float | None,
    doubted: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Return the thumbnail h × w × 3 of a slide of `size` level-0 px, drawn on.

    The tissue (`mask`, the whole slide) has a green edge, what was taken off it and may be tissue (`doubted`) an orange
    one. Tiles around `xy` (n × 2) are blue squares, dots where they are small; those whose centre is not on tissue are
    red.
    """
    height, width = picture.shape[:2]
    on = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    drawn = picture.copy()
    drawn[binary_dilation(on, iterations=2) & ~on] = _EDGE
    if doubted is not None:
        of = np.asarray(Image.fromarray(doubted).resize((width, height), Image.Resampling.NEAREST))
        of = binary_closing(of, iterations=3) | of
        drawn[binary_dilation(of, iterations=2) & ~of] = _DOUBTED
    image = Image.fromarray(drawn)
    if xy is None or not len(xy):
        return np.asarray(image)
    draw = ImageDraw.Draw(image)
    scale = width / size[0]
    side = max((tile_level0_px or 0.0) * scale, _DOT_PX)
    step = max(1, len(xy) // _MOST_TILES)
    for x, y in xy[::step] * scale:
        inside = 0 <= x < width and 0 <= y < height
        colour = _TILE if inside and on[int(y), int(x)] else _OFF
        box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
        if side >= _LEAST_BOX_PX:
            draw.rectangle(box, outline=colour)
        else:
            draw.rectangle(box, fill=colour)
    return np.asarray(image)
