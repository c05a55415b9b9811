"""Tissue as a person drew it: a mask image, or outlines in a GeoJSON file as QuPath exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, UnidentifiedImageError

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.base import Slide

__all__ = ["MASK_PX", "mask_from_geojson", "mask_from_image"]

MASK_PX = 2048  # longest side of the thumbnail the mask is made on


def mask_from_image(path: Path) -> NDArray[np.bool_]:
    """Return h × w: what is not black in the image at `path`. Raises SlideError where it is none."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("L")) > 0
    except (UnidentifiedImageError, OSError) as error:
        raise SlideError(f"the tissue mask {path} is not a readable image: {error}") from error
    return mask


def mask_from_geojson(path: Path, slide: Slide) -> NDArray[np.bool_]:
    """Draw the polygons of a GeoJSON file (level-0 px, as QuPath exports them); later rings are holes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        polygons = list(_polygons(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlideError(f"the tissue outline {path} is not GeoJSON: {error}") from error
    if not polygons:
        raise SlideError(f"the tissue outline {path} holds no Polygon or MultiPolygon")
    width, height = slide.size
    scale = min(1.0, MASK_PX / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    total = np.zeros((size[1], size[0]), np.bool_)
    for rings in polygons:
        canvas = Image.new("L", size, 0)
        draw = ImageDraw.Draw(canvas)
        for number, ring in enumerate(rings):
            corners = [(float(x) * scale, float(y) * scale) for x, y, *_ in ring]
            if len(corners) < 3:
                raise SlideError(f"the tissue outline {path} has a polygon of {len(corners)} points")
            draw.polygon(corners, fill=0 if number else 1)
        total |= np.asarray(canvas) > 0
    return total


def _polygons(node: dict[str, Any]) -> list[list[list[list[float]]]]:
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
