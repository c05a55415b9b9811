"""Which parts of a slide are tissue, for slides without spots.

Tissue is coloured and glass is not: Otsu's threshold on the saturation of a thumbnail, cleaned of specks and
holes. A mask image or a GeoJSON outline in the manifest takes its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, UnidentifiedImageError
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import closing, disk, opening

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.base import Slide, thumbnail

__all__ = ["tissue_mask"]

_MASK_PX = 2048  # longest side of the thumbnail the mask is made on
_LEAST_SATURATION = 0.05  # below this Otsu would only split glass from glass


def tissue_mask(slide: Slide, given: Path | None = None) -> NDArray[np.bool_]:
    """Return the tissue of the whole slide as a mask (h × w, any resolution), from `given` where there is one."""
    if given is not None:
        return _from_geojson(given, slide) if given.suffix.lower() in (".geojson", ".json") else _from_image(given)
    picture, _ = thumbnail(slide, _MASK_PX)
    rgb = picture.astype(np.float32) / 255
    brightest, darkest = rgb.max(axis=2), rgb.min(axis=2)
    saturation = (brightest - darkest) / np.maximum(brightest, 1e-6)
    saturation[brightest < 0.1] = 0  # black borders of a scan are not tissue
    smooth = gaussian(saturation, sigma=2)
    mask = smooth > max(float(threshold_otsu(smooth)), _LEAST_SATURATION)
    return np.asarray(closing(opening(mask, disk(3)), disk(5)), dtype=np.bool_)


def _from_image(path: Path) -> NDArray[np.bool_]:
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("L")) > 0
    except (UnidentifiedImageError, OSError) as error:
        raise SlideError(f"the tissue mask {path} is not a readable image: {error}") from error
    return mask


def _from_geojson(path: Path, slide: Slide) -> NDArray[np.bool_]:
    """Draw the polygons of a GeoJSON file (level-0 px, as QuPath exports them); later rings are holes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        polygons = list(_polygons(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlideError(f"the tissue outline {path} is not GeoJSON: {error}") from error
    if not polygons:
        raise SlideError(f"the tissue outline {path} holds no Polygon or MultiPolygon")
    width, height = slide.size
    scale = min(1.0, _MASK_PX / max(width, height))
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
