"""Which parts of a slide are tissue, for slides without spots.

Tissue is coloured and glass is not: Otsu's threshold on the saturation of a thumbnail, cleaned of specks and
holes. Where there is no glass, Otsu would split tissue from tissue: what is more coloured than any glass counts.
Padding, pen marks and folds are taken off.
A mask image or a GeoJSON outline in the manifest takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label, median
from skimage.filters import gaussian, threshold_otsu

from nh2st_pipe.slides.base import Slide, thumbnail
from nh2st_pipe.tiles.masks import MASK_PX, mask_from_geojson, mask_from_image
from nh2st_pipe.tiles.morphology import closed, dilated, opened

__all__ = ["Tissue", "find_tissue", "look_for_tissue", "tissue_mask", "tissue_of"]

_LEAST_SATURATION = 0.05  # below this Otsu would only split glass from glass
_GLASS_SATURATION = 0.12  # the glass of scans has 0.001 to 0.075
_DARK = 0.1  # light that dyes leave through, of at least two colours of three
_CLEANED = 8  # px beyond the edge that the cleaning looks at
_PADDING_DARK, _PADDING_SHARE, _PADDING_REACH = 0.35, 0.2, 3
_INK_HUES = 65.0, 232.0  # degrees: H&E goes from violet through pink to orange
_INK_SATURATION = 0.3
_RED_HUES, _RED_SATURATION, _RED_LIGHT = 12.0, 0.8, 0.6
_BLACK_LIGHT, _BLACK_CHROMA = 0.4, 0.08
_STROKE = 2  # px of the thumbnail: half the width of the thinnest stroke
_MOST_INK = 0.5  # share of all that is coloured
_MIXES = 24
_LEAST_MARK = 3e-4  # share of the thumbnail
_LEAST_FOLD = 1e-3  # share of the tissue
_LEAST_DOUBTED = 0.05  # share of what is coloured, from which on it is spoken of
_ALL_OF_IT = 0.95
_FAINT = 0.03  # of saturation over glass
_TEXTURE = 0.008  # of light, over a few px: glass has 0.001 to 0.004, fat 0.05
_EVEN = 0.01  # by which the saturation of glass varies
_OUTLINE = "An outline in the manifest's column tissue goes before"
_COMMON = 0.02  # share of the tissue
_DOUBLE = 1.8
_MOST_FOLDS = 0.1
_LEAST_FOR_FOLDS = 2000  # px
_ENOUGH_FOR_MEDIANS = 200_000  # px


@dataclass(frozen=True)
class Tissue:
    """What is on a slide, h × w each."""

    mask: NDArray[np.bool_]
    """Tissue to look at."""
    pen: NDArray[np.bool_]
    """Marks of a pen, on tissue or beside it."""
    folds: NDArray[np.bool_]
    """Tissue that lies double."""
    picture: NDArray[np.uint8] | None = None
    """The thumbnail it was found on, h × w × 3; None where it was given."""
    said: tuple[str, ...] = ()
    """What to know of it where it was given."""
    doubts: tuple[str, ...] = ()
    """What may have been taken for tissue, or off it, wrongly."""
    doubted: NDArray[np.bool_] | None = None
    """Where that is, of what was taken off; None where nothing was."""

    def notes(self) -> list[str]:
        """Say what was taken off the tissue."""
        found = (("pen marks", self.pen), ("folds of the tissue", self.folds))
        return [
            *self.said,
            *(f"{what} are left out, {part.mean():.1%} of the slide" for what, part in found if part.any()),
        ]


def find_tissue(slide: Slide, given: Path | None = None) -> Tissue:
    """Return the tissue of the whole slide, at any resolution, as it is in the file `given` where there is one."""
    if given is None:
        picture = thumbnail(slide, MASK_PX)[0]
        return replace(look_for_tissue(picture), picture=picture)
    outlined = given.suffix.lower() in (".geojson", ".json")
    mask, said = mask_from_geojson(given, slide) if outlined else (mask_from_image(given), [])
    return Tissue(mask, np.zeros((1, 1), np.bool_), np.zeros((1, 1), np.bool_), said=tuple(said))


def tissue_mask(slide: Slide, given: Path | None = None) -> NDArray[np.bool_]:
    """Return the mask of `find_tissue`, h × w."""
    return find_tissue(slide, given).mask


def tissue_of(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which px of a slide's thumbnail (h × w × 3) are tissue, h × w."""
    return look_for_tissue(picture).mask


def look_for_tissue(picture: NDArray[np.uint8]) -> Tissue:
    """Return the tissue on a slide's thumbnail (h × w × 3), and what was taken off it."""
    padding = _padding(picture)
    nothing = np.zeros_like(padding)
    if padding.all():
        return Tissue(nothing, nothing, nothing)
    rgb: NDArray[np.float32] = picture.astype(np.float32) / np.float32(255)
    brightest, darkest = (_over_colours(which, rgb) for which in (np.maximum, np.minimum))
    saturation = np.asarray((brightest - darkest) / np.maximum(brightest, 1e-6), np.float32)
    pen = _pen(rgb, saturation, brightest) & ~padding
    taken = padding | pen
    saturation_seen = saturation.copy()
    saturation[taken] = 0
    smooth = gaussian(saturation, sigma=2)
    seen = smooth[~taken]
    threshold = float(threshold_otsu(seen)) if len(seen) else 1.0
    if len(seen) and np.median(seen[seen <= threshold]) > _GLASS_SATURATION:  # both sides are tissue
        threshold = _GLASS_SATURATION
    mask = (smooth > max(threshold, _LEAST_SATURATION)) & ~taken
    # Mirrored beyond the edge, or cleaning would take tissue off along it.
    wide = np.pad(mask, _CLEANED, mode="symmetric")
    clean = closed(opened(wide, 3), 5)[_CLEANED:-_CLEANED, _CLEANED:-_CLEANED] & ~pen
    folds = _folds(rgb, clean)
    of_ink, ink = _doubts_on_ink(saturation_seen, pen, padding)
    of_glass, faint = _doubts_on_glass(rgb, smooth, clean, taken)
    doubted = ink | faint
    return Tissue(clean & ~folds, pen, folds, doubts=(*of_ink, *of_glass), doubted=doubted if doubted.any() else None)


_Doubts = tuple[list[str], NDArray[np.bool_]]
"""What is doubted, in words, and where (h × w)."""


def _doubts_on_ink(saturation: NDArray[np.float32], pen: NDArray[np.bool_], padding: NDArray[np.bool_]) -> _Doubts:
    """Return a doubt where much of what is coloured, or a whole piece of it, was taken for ink."""
    nowhere = np.zeros_like(pen)
    if not pen.any():
        return [], nowhere
    coloured = (saturation > _GLASS_SATURATION) & ~padding
    share = (coloured & pen).sum() / max(coloured.sum(), 1)
    pieces, n = label(coloured)
    sizes = np.bincount(pieces.ravel(), minlength=n + 1)
    inked = np.bincount(pieces[pen], minlength=n + 1)
    whole = (inked[1:] > _ALL_OF_IT * sizes[1:]) & (sizes[1:] > _LEAST_DOUBTED * coloured.sum())
    if share <= _LEAST_DOUBTED and not whole.any():
        return [], nowhere
    of = f"{share:.0%} of what is coloured" + (f", {whole.sum()} pieces of it whole," if whole.any() else "")
    return [f"{of} is taken for a pen's ink and left out: is it stained tissue? {_OUTLINE}"], coloured & pen


def _doubts_on_glass(
    rgb: NDArray[np.float32], smooth: NDArray[np.float32], mask: NDArray[np.bool_], taken: NDArray[np.bool_]
) -> _Doubts:
    """Return doubts where a faint piece was taken for glass, or coloured glass for tissue."""
    ground = ~mask & ~taken
    if ground.any():
        every = slice(None, None, 2)  # half of the thumbnail's size tells as much
        grey = rgb[every, every].mean(axis=2)
        uneven = gaussian(np.abs(grey - gaussian(grey, sigma=2)), sigma=2)  # stray light has a colour and no texture
        tissue, beside, colour = mask[every, every], ground[every, every], smooth[every, every]
        glass = float(np.median(colour[beside])) if beside.any() else 0.0
        faint = beside & ~dilated(tissue, _CLEANED // 2) & (colour > max(_LEAST_SATURATION, glass + _FAINT))
        pieces = _large(opened(faint & (uneven > _TEXTURE), 2), _LEAST_DOUBTED * max(tissue.sum(), 1))
        if pieces.any():
            of = f"a faintly coloured part, {pieces.mean():.1%} of the slide,"
            where = pieces.repeat(2, axis=0).repeat(2, axis=1)[: mask.shape[0], : mask.shape[1]]
            return [f"{of} is taken for glass: is it tissue? {_OUTLINE}"], where
    if mask[~taken].mean() > _ALL_OF_IT:
        seen = smooth[~taken]
        low, middle = np.percentile(seen, (5, 50))
        if middle - low < _EVEN:
            words = f"half of it is of one even colour (saturation {middle:.2f}): is that glass? {_OUTLINE}"
            return [f"the whole slide is taken for tissue, and {words}"], np.zeros_like(mask)
    return [], np.zeros_like(mask)


def _over_colours(which: np.ufunc, rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest or smallest of each px's three values: numpy takes five times as long over a short axis."""
    out: NDArray[np.float32] = which(which(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    return out


def _pen(rgb: NDArray[np.float32], saturation: NDArray[np.float32], light: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where a pen was: inks of a hue that no H&E has, black ones, and red ones purer than blood."""
    chroma = np.maximum(light - _over_colours(np.minimum, rgb), 1e-6)
    ink = (light < _BLACK_LIGHT) & (chroma < _BLACK_CHROMA)
    strong = saturation > _INK_SATURATION  # no other px has a hue that is asked for
    hue, pure, bright = _hue(rgb[strong], light[strong], chroma[strong]), saturation[strong], light[strong]
    low, high = _INK_HUES
    coloured_ink = (hue > low) & (hue < high)
    coloured_ink |= (pure > _RED_SATURATION) & ((hue < _RED_HUES) | (hue > 360 - _RED_HUES)) & (bright > _RED_LIGHT)
    ink[strong] |= coloured_ink
    if not ink.any():
        return np.asarray(ink, np.bool_)
    ink = _large(opened(ink, _STROKE), _LEAST_MARK * ink.size)
    coloured = saturation > _GLASS_SATURATION
    if not ink.any() or (ink & coloured).sum() > _MOST_INK * coloured.sum():  # then it is the stain
        return np.zeros_like(ink)
    return dilated(ink, _STROKE + 2)  # its edge is mixed with what lies under it


def _hue(rgb: NDArray[np.float32], light: NDArray[np.float32], chroma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the hue of px (n × 3), degrees, given the largest of their values and how far that lies from the least."""
    red, green, blue = rgb.T
    hue = np.select(
        [light == red, light == green],
        [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )
    return np.asarray(hue * 60, np.float32)


def _large(mask: NDArray[np.bool_], least_px: float) -> NDArray[np.bool_]:
    """Return the pieces of a mask that have so many px."""
    pieces, _ = label(mask, np.ones((3, 3)))
    enough = np.bincount(pieces.ravel()) >= least_px
    enough[0] = False
    return np.asarray(enough[pieces], np.bool_)


def _folds(rgb: NDArray[np.float32], tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where tissue lies double: it takes as much light again as tissue of the same dyes does.

    Nuclei close together are as dark, and of another mix of dyes than what is around them: each place is compared with
    the median of those whose mix is its own.
    """
    folds = np.zeros_like(tissue)
    if tissue.sum() < _LEAST_FOR_FOLDS:
        return folds
    red, green, blue = (_absorbed(rgb[..., channel])[tissue] for channel in range(3))
    dark = red + green + blue
    least = np.maximum(dark, 1e-6)
    of_red, of_blue = (np.clip(np.floor(each / least * _MIXES), 0, _MIXES - 1) for each in (red, blue))
    which = (of_red * _MIXES + of_blue).astype(np.intp)
    some = slice(None, None, max(1, len(which) // _ENOUGH_FOR_MEDIANS))
    usual = median(dark[some], which[some], np.arange(which.max() + 1))[which]
    common = np.bincount(which)[which] > _COMMON * len(which)
    folds[tissue] = common & (dark > _DOUBLE * usual)
    folds = _large(opened(folds, 2), _LEAST_FOLD * len(which))
    if folds.sum() > _MOST_FOLDS * tissue.sum():  # then it is two kinds of tissue
        return np.zeros_like(tissue)
    return dilated(folds, 2) & tissue


def _absorbed(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the optical density of one colour, h × w, smoothed; each by itself, for that is how memory lies."""
    smooth = gaussian(np.ascontiguousarray(light), sigma=1.5)
    return np.asarray(-np.log(np.clip(smooth, 0.02, 1.0)), np.float32)


def _padding(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return what a scanner or a program filled in: too dark for stained tissue, or the border's own dark colour."""
    red, green, blue = (picture[..., channel] for channel in range(3))
    middle = np.maximum(np.minimum(red, green), np.minimum(np.maximum(red, green), blue))
    padding = middle < 255 * _DARK
    border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    colours, counts = np.unique(border, axis=0, return_counts=True)
    colour = colours[counts.argmax()]
    if counts.max() >= _PADDING_SHARE * len(border) and np.median(colour) < 255 * _PADDING_DARK:
        padding |= (np.abs(picture.astype(np.int16) - colour) <= _PADDING_REACH).all(axis=2)
    return np.asarray(padding, dtype=np.bool_)
