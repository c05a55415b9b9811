"""OME-Zarr: a pyramid of heat maps, a channel a gene, by NGFF 0.5 (Zarr v3), or 0.4 (v2) for older viewers.

https://ngff.openmicroscopy.org/0.5/: the translation is where the first px's centre lies, in the unit of the scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.core.whole import folder_whole
from nh2st_pipe.exporting.rasters import Raster, halved, raster_of
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["write"]

_CHUNK = 512
_SHARD_GENES = 256
_MANY = 1000  # genes, from which on several lie in one file


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide. Returns notices."""
    raster, old = raster_of(view), options.ngff == "0.4"
    mpp = view.image.mpp
    with quiet_warnings(), folder_whole(path) as part:
        group = zarr.open_group(part, mode="w", zarr_format=2 if old else 3)
        lows, highs = _fill(group, view, raster, old=old)
        multiscale: Any = _multiscale(view, raster, mpp)
        channels: dict[str, Any] = {"channels": _channels(view, lows, highs), "rdefs": {"model": "greyscale"}}
        if old:
            group.attrs.update({"multiscales": [{"version": "0.4", **multiscale}], "omero": channels})
        else:
            group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale], "omero": channels}
        group.attrs["nh2st_pipe"] = {"unit": view.unit, "slide": view.image.name, "about": view.label}
    return [] if mpp is not None else ["µm per px is not known, so its heat maps are in level-0 px"]


def _fill(group: Any, view: PredictionView, raster: Raster, *, old: bool) -> tuple[list[float], list[float]]:
    """Write the arrays c × y × x of all levels, and return each gene's lowest and highest value."""
    genes, (height, width) = len(view.columns), raster.tile.shape
    arrays = list[Any]()
    for level in range(raster.levels):
        chunk = min(_CHUNK, height), min(_CHUNK, width)
        many: dict[str, Any] = {"shards": (_SHARD_GENES, *chunk)} if genes > _MANY and not old else {}
        arrays.append(
            group.create_array(
                str(level),
                shape=(genes, height, width),
                chunks=(1, *chunk),
                dtype="float32",
                fill_value=np.nan,
                **({"chunk_key_encoding": {"name": "v2", "separator": "/"}} if old else {"dimension_names": "cyx"}),
                **many,
            )
        )
        height, width = -(-height // 2), -(-width // 2)
    step = _SHARD_GENES if genes > _MANY else 1
    waiting: list[list[Any]] = [[] for _ in arrays]
    lows, highs = list[float](), list[float]()
    for number, picture in enumerate(raster.pictures(view)):
        seen = picture[np.isfinite(picture)]
        lows.append(float(seen.min(initial=np.inf)) if len(seen) else 0.0)
        highs.append(float(seen.max(initial=-np.inf)) if len(seen) else 1.0)
        for held in waiting:
            held.append(picture)
            picture = halved(picture)
        if len(waiting[0]) == step or number == genes - 1:
            for array, held in zip(arrays, waiting, strict=True):
                array[number + 1 - len(held) : number + 1] = np.stack(held)
                held.clear()
    return lows, highs


def _multiscale(view: PredictionView, raster: Raster, mpp: float | None) -> dict[str, Any]:
    of_px = {} if mpp is None else {"unit": "micrometer"}
    um = mpp or 1.0
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", **of_px} for name in "yx")]
    levels = list[dict[str, Any]]()
    for level in range(raster.levels):
        side = raster.px * 2**level
        x, y = (first + (side - raster.px) / 2 for first in raster.first)
        scale = {"type": "scale", "scale": [1.0, side * um, side * um]}
        moved = {"type": "translation", "translation": [0.0, y * um, x * um]}
        levels.append({"path": str(level), "coordinateTransformations": [scale, moved]})
    return {"name": view.slide_id, "axes": axes, "datasets": levels}


def _channels(view: PredictionView, lows: list[float], highs: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "label": gene,
            "color": "FFFFFF",
            "window": {"min": low, "max": high, "start": low, "end": high},
            "active": number == 0,
        }
        for number, (gene, low, high) in enumerate(zip(view.marked_genes, lows, highs, strict=True))
    ]
