"""Tissue as a person drew it: a mask image, or outlines in a GeoJSON file as QuPath exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.tables import read_text
from nh2st_pipe.slides.base import Slide
from nh2st_pipe.slides.raster import any_size

__all__ = ["MASK_PX", "mask_from_geojson", "mask_from_image"]

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a TIFF's tag, and what tifffile writes there for booleans

MASK_PX = 2048  # longest side of the thumbnail the mask is made on


def mask_from_image(path: Path) -> NDArray[np.bool_]:
    """Return h × w: what is not black in the image at `path`. Raises SlideError where it is none.

    Of whatever size: a mask has few bytes a px, and Pillow's limit is meant for uploads of strangers.
    """
    with fault_of(SlideError, f"the tissue mask {path} is not a readable image"), any_size(), Image.open(path) as image:
        inverted = image.mode == "1" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        mask = np.asarray(image.convert("L")) > 0
    return ~mask if inverted else mask  # what is stored counts, not how it would be shown


def mask_from_geojson(path: Path, slide: Slide) -> NDArray[np.bool_]:
    """Draw the polygons of a GeoJSON file as QuPath exports it: level-0 px from its `origin`; holes stay empty."""
    with fault_of(SlideError, f"the tissue outline {path} is not GeoJSON"):
        return _drawn(path, list(_polygons(json.loads(read_text(path, SlideError)))), slide)


def _drawn(path: Path, polygons: list[list[list[list[float]]]], slide: Slide) -> NDArray[np.bool_]:
    if not polygons:
        raise SlideError(f"the tissue outline {path} holds no Polygon or MultiPolygon")
    width, height = slide.size
    left, upper = slide.origin
    scale = min(1.0, MASK_PX / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    total = np.zeros((size[1], size[0]), np.bool_)
    for rings in polygons:
        canvas = Image.new("L", size, 0)
        draw = ImageDraw.Draw(canvas)
        for number, ring in enumerate(rings):
            corners = [((float(x) + left) * scale, (float(y) + upper) * scale) for x, y, *_ in ring]
            if len(corners) < 3:
                raise SlideError(f"the tissue outline {path} has a polygon of {len(corners)} points")
            draw.polygon(corners, fill=0 if number else 1)
        total |= np.asarray(canvas) > 0
    return total


def _polygons(node: Any) -> list[list[list[list[float]]]]:
    if isinstance(node, list):  # as QuPath exports features without a collection around them
        return [polygon for each in node for polygon in _polygons(each)]
    kind = node.get("type")
    if kind == "FeatureCollection":
        return [polygon for feature in node["features"] for polygon in _polygons(feature)]
    if kind == "Feature":
        return _polygons(node["geometry"] or {})
    if kind == "GeometryCollection":
        return [polygon for geometry in node["geometries"] for polygon in _polygons(geometry)]
    if kind == "Polygon":
        return [node["coordinates"]]
    return list(node["coordinates"]) if kind == "MultiPolygon" else []
