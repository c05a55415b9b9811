"""SpatialData: tiles as squares, their values as a table that annotates them, and the thumbnail, in one store a slide.

Coordinates are level-0 px, in a coordinate system called as the slide, as spatialdata-io has it for Visium. With
`slide_properties` and `tile_spec` LazySlide opens it as its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import shapely
import spatialdata
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.core.whole import folder_whole
from nh2st_pipe.exporting.h5ad import adata_of
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView
from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["element_name", "write"]

_REGION, _TILE = "region", "tile_id"


def element_name(slide_id: str) -> str:
    """Return a slide's name with nothing in it that SpatialData refuses: letters, digits and _-. alone."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", slide_id).lstrip("_.") or "slide"


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide. Returns notices."""
    with quiet_warnings(), folder_whole(path) as part:
        study_of(view).write(part)
    return []


def study_of(view: PredictionView) -> spatialdata.SpatialData:
    """Return a slide's prediction: shapes NAME_tiles, a table NAME_predicted, an image NAME_hires_image."""
    name = element_name(view.slide_id)
    tiles, whole, shown = f"{name}_tiles", {name: Identity()}, f"{name}_downscaled_hires"
    half = view.image.tile_px / 2
    low, high = view.xy - half, view.xy + half
    places = {_TILE: np.arange(len(view)), "x": low[:, 0], "y": low[:, 1], "tissue_id": 0}
    frame = geopandas.GeoDataFrame(places, geometry=shapely.box(*low.T, *high.T))
    table = adata_of(view)
    table.uns.pop("spatial", None)  # is an image of its own here
    table.obs[_REGION] = pd.Categorical([tiles] * len(view))
    table.obs[_TILE] = np.arange(len(view))
    parts: dict[str, Any] = {
        "shapes": {tiles: ShapesModel.parse(frame, transformations=whole)},
        "tables": {f"{name}_predicted": TableModel.parse(table, region=tiles, region_key=_REGION, instance_key=_TILE)},
    }
    if view.picture is not None:
        larger = Scale([1 / view.scale, 1 / view.scale], axes=("x", "y"))
        picture = Image2DModel.parse(
            np.moveaxis(view.picture, 2, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={name: larger, shown: Identity()},
        )
        parts["images"] = {f"{name}_hires_image": picture}
    return spatialdata.SpatialData(**parts, attrs=_of_lazyslide(view, tiles))


def _of_lazyslide(view: PredictionView, tiles: str) -> dict[str, Any]:
    """Return what LazySlide (wsidata) knows a slide and its tiles by."""
    image, side = view.image, max(1, round(view.image.tile_px))
    stride = max(1, round(pitch_px(view.every_xy) or image.tile_px))
    shape = [image.height, image.width]
    return {
        "slide_properties": {
            "shape": shape,
            "n_level": 1,
            "level_shape": [shape],
            "level_downsample": [1.0],
            "mpp": image.mpp,
            "magnification": None,
            "bounds": [0, 0, image.width, image.height],
        },
        "tile_spec": {
            tiles: {
                "height": side,
                "width": side,
                "stride_height": stride,
                "stride_width": stride,
                "mpp": image.mpp,
                "ops_level": 0,
                "ops_downsample": 1.0,
                "base_level": 0,
                "base_downsample": 1.0,
                "tissue_name": None,
            }
        },
    }
