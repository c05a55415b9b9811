"""Which parts of a slide are tissue, for slides without spots.

Tissue is coloured and glass is not: Otsu's threshold on the saturation of a thumbnail, cleaned of specks and
holes. Where there is no glass, Otsu would split tissue from tissue: what is more coloured than any glass counts.
A mask image or a GeoJSON outline in the manifest takes its place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import closing, disk, opening

from nh2st_pipe.slides.base import Slide, thumbnail
from nh2st_pipe.tiles.masks import MASK_PX, mask_from_geojson, mask_from_image

__all__ = ["tissue_mask", "tissue_of"]

_LEAST_SATURATION = 0.05  # below this Otsu would only split glass from glass
_GLASS_SATURATION = 0.12  # the glass of scans has 0.001 to 0.075
_DARK = 0.1  # light that dyes leave through, of at least two colours of three
_CLEANED = 8  # px beyond the edge that the cleaning looks at
_PADDING_DARK, _PADDING_SHARE, _PADDING_REACH = 0.35, 0.2, 3


def tissue_mask(slide: Slide, given: Path | None = None) -> NDArray[np.bool_]:
    """Return the tissue of the whole slide as a mask (h × w, any resolution), from `given` where there is one."""
    if given is not None:
        return (
            mask_from_geojson(given, slide) if given.suffix.lower() in (".geojson", ".json") else mask_from_image(given)
        )
    return tissue_of(thumbnail(slide, MASK_PX)[0])


def tissue_of(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which px of a slide's thumbnail (h × w × 3) are tissue, h × w."""
    padding = _padding(picture)
    if padding.all():
        return ~padding
    rgb = picture.astype(np.float32) / 255
    brightest, darkest = rgb.max(axis=2), rgb.min(axis=2)
    saturation = (brightest - darkest) / np.maximum(brightest, 1e-6)
    saturation[padding] = 0
    smooth = gaussian(saturation, sigma=2)
    seen = smooth[~padding]
    threshold = float(threshold_otsu(seen))
    if np.median(seen[seen <= threshold]) > _GLASS_SATURATION:  # both sides are tissue
        threshold = _GLASS_SATURATION
    mask = (smooth > max(threshold, _LEAST_SATURATION)) & ~padding
    # Mirrored beyond the edge, or cleaning would take tissue off along it.
    wide = np.pad(mask, _CLEANED, mode="symmetric")
    clean = closing(opening(wide, disk(3)), disk(5))
    return np.asarray(clean[_CLEANED:-_CLEANED, _CLEANED:-_CLEANED], dtype=np.bool_)


def _padding(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return what a scanner or a program filled in: too dark for stained tissue, or the border's own dark colour."""
    light = np.sort(picture, axis=2)
    padding = light[..., 1] < 255 * _DARK
    border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    colours, counts = np.unique(border, axis=0, return_counts=True)
    colour = colours[counts.argmax()]
    if counts.max() >= _PADDING_SHARE * len(border) and np.median(colour) < 255 * _PADDING_DARK:
        padding |= (np.abs(picture.astype(np.int16) - colour) <= _PADDING_REACH).all(axis=2)
    return np.asarray(padding, dtype=np.bool_)
