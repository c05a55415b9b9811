"""OME-TIFF: a pyramid of heat maps, a channel a gene, in float32 with the size of a px in µm.

Compressed with zlib, which every Bio-Formats reads. The format has no place for where a picture lies on another: that
is in the JSON beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.exporting.rasters import Raster, halved, raster_of
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["write"]

_TILE = 256
_MANY = 50


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide, and beside it where its px lie. Returns notices."""
    raster, said = raster_of(view), list[str]()
    mpp = view.image.mpp
    size = {} if mpp is None else {"PhysicalSizeX": raster.px * mpp, "PhysicalSizeXUnit": "µm"}
    size |= {} if mpp is None else {"PhysicalSizeY": raster.px * mpp, "PhysicalSizeYUnit": "µm"}
    if mpp is None:
        said.append("µm per px is not known, so its heat maps have no size")
    if len(view.columns) > _MANY:
        said.append(f"QuPath is slow to open more than about {_MANY} channels; --genes names fewer")
    about: dict[str, Any] = {
        "axes": "CYX",
        "Channel": {"Name": view.marked_genes},
        "Description": view.label,
        **size,
    }
    base: dict[str, Any] = {"tile": (_TILE, _TILE), "compression": "zlib", "photometric": "minisblack"}
    with written_whole(path) as part, tifffile.TiffWriter(part, bigtiff=True, ome=True) as file:
        for level in range(raster.levels):
            options_of: dict[str, Any] = {**base, "dtype": np.float32, "shape": _shape(view, raster, level)}
            if level == 0:
                options_of |= {"subifds": raster.levels - 1, "metadata": about}
            else:
                options_of |= {"subfiletype": 1, "metadata": None}
            file.write(_tiles(view, raster, level), **options_of)
    where = {
        "unit": view.unit,
        "px_level0_px": raster.px,
        "first_px_centre_level0_px": raster.first,
        "mpp_level0": mpp,
        "slide": {"name": view.image.name, "width": view.image.width, "height": view.image.height},
    }
    with written_whole(path.with_name(path.name.removesuffix(".tif") + ".json")) as part:
        part.write_text(json.dumps(where, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return said


def _shape(view: PredictionView, raster: Raster, level: int) -> tuple[int, int, int]:
    height, width = raster.tile.shape
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return len(view.columns), height, width


def _tiles(view: PredictionView, raster: Raster, level: int) -> Iterator[NDArray[np.float32]]:
    """Yield the TIFF tiles of all genes' pictures, one after another: no more than a block of genes is in memory."""
    for picture in raster.pictures(view):
        for _ in range(level):
            picture = halved(picture)
        for y in range(0, picture.shape[0], _TILE):
            for x in range(0, picture.shape[1], _TILE):
                cut = picture[y : y + _TILE, x : x + _TILE]
                down, across = _TILE - cut.shape[0], _TILE - cut.shape[1]
                yield np.pad(cut, ((0, down), (0, across)), constant_values=np.nan) if down or across else cut
