"""Whether tiles can lie where they are said to lie: their size, their pitch, and the tissue under them.

What cannot be is refused; what is unlikely is said, with the value and where it is from. Resolution has a module of its
own, `slides.resolution`. All lengths are level-0 px unless their name says µm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, SlideError, listed
from nh2st_pipe.slides.base import Slide
from nh2st_pipe.slides.resolution import LEAST_TILE_PX, SpotsSay
from nh2st_pipe.tiles.lattice import SPOT_PITCH_UM, fitted_lattice, pitch_px
from nh2st_pipe.tiles.spots import Spots

__all__ = [
    "CLEARLY_BETTER",
    "WAYS",
    "check_on_image",
    "check_pitch",
    "check_tile",
    "darkness",
    "enlarged",
    "mask_notices",
    "on_tissue",
    "spots_say",
    "tissue_notices",
]

_ASPECT = 0.05  # how far a mask's sides may be from the slide's
_MOST_ENLARGED, _USUAL_INPUT_PX = 1.5, 224
_BRIGHT_PERCENT, _LEAST_LIGHT = 99.0, 80.0  # stained tissue has 150 and more, 12 bits read as 16 have 16
_OVERLAP = 0.7  # spots nearer than this share of their own diameter cannot be
_APART = 3.0  # diameters from spot to spot: 1 on Visium HD, 1.8 on Visium, 2 on ST
_DENSE, _SPARSE = 0.1, 10.0  # pitch in sides of a tile
CLEARLY_BETTER = 0.1
"""Share of the spots by which another way of laying them must be better before it is said."""
_FEW = 0.5
_LARGEST_ST = 100  # rows or columns; the bins of Visium HD and Stereo-seq are thousands

Way = Callable[[NDArray[np.float64], tuple[int, int]], NDArray[np.float64]]
WAYS: Mapping[str, Way] = {
    "with x and y swapped": lambda xy, size: xy[:, ::-1],
    "mirrored left to right": lambda xy, size: np.column_stack((size[0] - xy[:, 0], xy[:, 1])),
    "mirrored top to bottom": lambda xy, size: np.column_stack((xy[:, 0], size[1] - xy[:, 1])),
    "turned by 180°": lambda xy, size: np.asarray(size) - xy,
    "turned by 90° clockwise": lambda xy, size: np.column_stack((size[0] - xy[:, 1], xy[:, 0])),
    "turned by 90° anticlockwise": lambda xy, size: np.column_stack((xy[:, 1], size[1] - xy[:, 0])),
}
"""Other ways in which spots may have been meant, from (n × 2, x then y; the image's width and height) to n × 2."""


def check_tile(size_level0_px: float, slide: Slide) -> None:
    """Raise SlideError where a tile of that side shows nothing of a slide, or is larger than all of it."""
    if size_level0_px < LEAST_TILE_PX:
        raise SlideError(
            f"{slide.path}: tiles would be {size_level0_px:.3g} px wide, and from {LEAST_TILE_PX:g} px on there is "
            "something to see; check the slide's mpp, or give the tile's size with --tile-um or --tile-px"
        )
    if size_level0_px > max(slide.size):
        raise SlideError(
            f"{slide.path} has {slide.size[0]:,} × {slide.size[1]:,} px, and one tile would be {size_level0_px:,.0f} "
            "px wide; check the slide's mpp, or give the tile's size with --tile-um or --tile-px"
        )


def enlarged(size_level0_px: float, input_px: int | None) -> list[str]:
    """Say where the encoder's input is made of much fewer px of the slide: it sees blur, not cells.

    Where it is not known which encoder it will be, that is said of the usual input.
    """
    times = (input_px or _USUAL_INPUT_PX) / size_level0_px
    if times <= _MOST_ENLARGED:
        return []
    takes = f"{input_px} px that the encoder takes" if input_px else f"{_USUAL_INPUT_PX} px that most encoders take"
    return [
        f"tiles of {size_level0_px:.4g} px are enlarged {times:.1f} × to the {takes}, and show no more than they hold: "
        "was the slide scanned, or saved, at too low a resolution?"
    ]


def darkness(picture: NDArray[np.uint8]) -> list[str]:
    """Return a doubt where nothing on a slide's thumbnail (h × w × 3) is as bright as glass or stained tissue."""
    light = float(np.percentile(picture.max(axis=2), _BRIGHT_PERCENT))
    if light >= _LEAST_LIGHT:
        return []
    return [
        f"the picture is dark: its bright parts have {light:.0f} of 255; is it brightfield, and are its bits all used?"
    ]


def check_on_image(spots: Spots, slide: Slide) -> None:
    """Raise SlideError naming the spots whose centre is not on the image."""
    width, height = slide.size
    x, y = spots.xy.T
    outside = np.flatnonzero((x < 0) | (y < 0) | (x > width) | (y > height))
    if len(outside):
        first = outside[0]
        raise SlideError(
            f"{len(outside)} of {len(spots)} spots lie outside {slide.path} ({width:,} × {height:,} px): "
            f"{listed(spots.barcodes[i] for i in outside)}; {spots.barcodes[first]} is at x={x[first]:,.0f}, "
            f"y={y[first]:,.0f}. obsm['spatial'] should hold x, y in full-resolution pixels of this image"
        )


def spots_say(spots: Spots) -> SpotsSay | None:
    """Return the resolution that follows from spots: their file's own, or that of an array whose pitch is known."""
    if spots.mpp is not None:
        return SpotsSay(spots.mpp, "the expression file's scale factors", sure=True)
    if spots.grid is None:
        return None
    found = fitted_lattice(spots.xy, spots.grid)
    if found is None or (found[0] == "square" and spots.grid.max() - spots.grid.min() > _LARGEST_ST):
        return None
    kind, pitch = found
    um = SPOT_PITCH_UM[kind]
    array = "Visium's hexagonal array" if kind == "hexagonal" else "a square array, taken for ST's"
    return SpotsSay(um / pitch, f"the {um:g} µm pitch of {array} ({pitch:.4g} px here)", sure=kind == "hexagonal")


def check_pitch(spots: Spots, size_level0_px: float, path: Path) -> list[str]:
    """Return what is unlikely about the distance between the spots of `path` under tiles of that side.

    Raises ExpressionError where spots would overlap by their own diameter: then they are not full-resolution px.
    """
    if len(spots) < 2:
        return []
    pitch = pitch_px(spots.xy)
    if pitch == 0:
        raise ExpressionError(
            f"{path}: most spots lie at the place of another; obsm['spatial'] should hold each spot's own centre"
        )
    diameter = spots.diameter_px
    if diameter is not None and pitch < _OVERLAP * diameter:
        raise ExpressionError(
            f"{path}: spots are {pitch:.4g} px apart, and {diameter:.4g} px wide by uns['spatial']: they would "
            "overlap, so obsm['spatial'] is not in full-resolution pixels" + _whose(spots, pitch / diameter)
        )
    found = []
    if diameter is None and pitch < _DENSE * size_level0_px:
        found.append(
            f"spots are {pitch:.3g} px apart under tiles of {size_level0_px:.4g} px, as for Visium HD; otherwise "
            "obsm['spatial'] may be in pixels of a smaller image"
        )
    if pitch > _SPARSE * size_level0_px:
        found.append(f"tiles of {size_level0_px:.3g} px are small for spots {pitch:.4g} px apart")
    return found


def _whose(spots: Spots, share: float) -> str:
    """Say of which smaller image coordinates may be, from the scale factors beside them."""
    for image, scale in spots.scales.items():
        if scale < 1 and _OVERLAP < share / scale < _APART:
            return f" but looks like that of the {image} image: divide it by tissue_{image}_scalef ({scale:.4g})"
    smaller = [f"tissue_{image}_scalef ({scale:.4g})" for image, scale in spots.scales.items() if scale < 1]
    return f": divide it by {' or '.join(smaller)}, if it is of that image" if smaller else ""


def on_tissue(xy: NDArray[np.float64], mask: NDArray[np.bool_], size: tuple[int, int]) -> float:
    """Return the share of n spots (n × 2) whose centre lies on the tissue of `mask` (h × w, the whole slide)."""
    at = np.floor(xy * np.array(mask.shape[::-1]) / np.array(size)).astype(np.int64)
    within = ((xy >= 0) & (xy <= np.array(size))).all(axis=1)
    column, row = np.minimum(np.maximum(at, 0), np.array(mask.shape[::-1]) - 1).T
    return float((mask[row, column] & within).mean())


def tissue_notices(xy: NDArray[np.float64], mask: NDArray[np.bool_], size: tuple[int, int]) -> list[str]:
    """Return what is unlikely about spots on that tissue: few of them on it, or more if they were laid otherwise."""
    if not mask.any() or not len(xy):
        return []
    share = on_tissue(xy, mask, size)
    best, way = max((on_tissue(lay(xy, size), mask, size), way) for way, lay in WAYS.items())
    if best > share + CLEARLY_BETTER:
        better = f"{best:.0%} would if they were {way}"
        return [f"{share:.0%} of the spots lie on tissue, and {better}: does obsm['spatial'] hold x, y of this image?"]
    return [f"only {share:.0%} of the spots lie on what looks like tissue"] if share < _FEW else []


def mask_notices(mask: NDArray[np.bool_], slide: Slide) -> list[str]:
    """Return what is unlikely about a tissue mask of a whole slide: sides in another proportion than the slide's."""
    height, width = mask.shape
    stretched = (width / height) / (slide.size[0] / slide.size[1])
    # A px more or less is no other proportion, however small the mask.
    if abs(stretched - 1) <= max(_ASPECT, 1 / height, 1 / width):
        return []
    return [
        f"the tissue mask has {width:,} × {height:,} px and the slide {slide.size[0]:,} × {slide.size[1]:,}: it is "
        f"stretched by {max(stretched, 1 / stretched) - 1:.0%} to fit"
    ]
