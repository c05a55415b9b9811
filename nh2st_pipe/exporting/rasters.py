"""Predictions as pictures: a px a tile where tiles lie on a square grid, smaller px where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.exporting.view import PredictionView
from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["Raster", "halved", "raster_of"]

_OFF_GRID = 0.1  # of the pitch, by which a tile may lie beside its place
_REACH = 0.75  # of the pitch, from a tile's centre to that of a px which shows it
_MOST_PX = 64_000_000
_SMALL_PX = 512  # from which on a level is not halved again
_FINER = 2


@dataclass(frozen=True)
class Raster:
    """Where each px of a picture comes from."""

    tile: NDArray[np.int64]
    """h × w: which of the view's tiles a px shows, -1 where none."""
    px: float
    """Side of a px, level-0 px."""
    first: tuple[float, float]
    """Centre of the first px, level-0 px, x then y."""

    @property
    def levels(self) -> int:
        """How many there are, each half as large as the one before."""
        levels, side = 1, max(self.tile.shape)
        while side > _SMALL_PX:
            levels, side = levels + 1, -(-side // 2)
        return levels

    def pictures(self, view: PredictionView, layer: str = "") -> Iterator[NDArray[np.float32]]:
        """Yield a picture h × w of each gene, float32, NaN where no tile is."""
        for block in view.blocks():
            values = view.values(layer, of=block)
            for column in range(values.shape[1]):
                yield np.append(values[:, column], np.float32(np.nan))[self.tile]  # -1 is the last


def raster_of(view: PredictionView) -> Raster:
    """Lay the chosen tiles of a prediction on a raster. Raises RunError where it would be immense."""
    pitch = pitch_px(view.every_xy) or view.image.tile_px  # of all tiles: the chosen may be far apart
    low, high = view.xy.min(axis=0), view.xy.max(axis=0)
    steps = (view.xy - low) / pitch
    on_grid = bool((np.abs(steps - np.rint(steps)) < _OFF_GRID).all())
    px = pitch if on_grid else pitch / _FINER
    width, height = (int(side) + 1 for side in np.rint((high - low) / px))
    if width * height > _MOST_PX:
        raise RunError(
            f"{view.slide_id}: tiles {pitch:,.0f} px apart over {high[0] - low[0]:,.0f} × {high[1] - low[1]:,.0f} px "
            "are too few for a picture; csv and spatialdata take them as they are"
        )
    if on_grid:
        tile = np.full((height, width), -1, np.int64)
        column, row = np.rint(steps).astype(int).T
        tile[row, column] = np.arange(len(view))
    else:
        y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
        far, which = cKDTree(view.xy).query(np.column_stack((x, y)) * px + low)
        tile = np.where(far <= _REACH * pitch, which, -1).reshape(height, width).astype(np.int64)
    return Raster(tile, px, (float(low[0]), float(low[1])))


def halved(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a picture half as large: each px the mean of up to four, of those that are numbers."""
    height, width = picture.shape
    wide: NDArray[Any] = np.pad(picture, ((0, height % 2), (0, width % 2)), constant_values=np.nan)
    four = wide.reshape(wide.shape[0] // 2, 2, wide.shape[1] // 2, 2)
    seen = np.isfinite(four)
    n, total = seen.sum(axis=(1, 3)), np.where(seen, four, 0).sum(axis=(1, 3))
    return np.where(n > 0, total / np.maximum(n, 1), np.nan).astype(np.float32)
