"""Which parts of a slide are tissue, for slides without spots.

Tissue is coloured and glass is not: Otsu's threshold on the saturation of a thumbnail, cleaned of specks and
holes. A mask image or a GeoJSON outline in the manifest takes its place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import closing, disk, opening

from nh2st_pipe.slides.base import Slide, thumbnail
from nh2st_pipe.tiles.masks import MASK_PX, mask_from_geojson, mask_from_image

__all__ = ["tissue_mask"]

_LEAST_SATURATION = 0.05  # below this Otsu would only split glass from glass


def tissue_mask(slide: Slide, given: Path | None = None) -> NDArray[np.bool_]:
    """Return the tissue of the whole slide as a mask (h × w, any resolution), from `given` where there is one."""
    if given is not None:
        return (
            mask_from_geojson(given, slide) if given.suffix.lower() in (".geojson", ".json") else mask_from_image(given)
        )
    picture, _ = thumbnail(slide, MASK_PX)
    rgb = picture.astype(np.float32) / 255
    brightest, darkest = rgb.max(axis=2), rgb.min(axis=2)
    saturation = (brightest - darkest) / np.maximum(brightest, 1e-6)
    saturation[brightest < 0.1] = 0  # black borders of a scan are not tissue
    smooth = gaussian(saturation, sigma=2)
    mask = smooth > max(float(threshold_otsu(smooth)), _LEAST_SATURATION)
    return np.asarray(closing(opening(mask, disk(3)), disk(5)), dtype=np.bool_)
