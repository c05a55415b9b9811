"""Which resolution a slide has, and what a tile of a given size measures on it.

A tile's size is given in level-0 px or in µm; µm need the slide's resolution, taken from the manifest, else
from the file, else from spots whose distance on the array is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import SlideError, UsageError
from nh2st_pipe.slides.base import Slide

LEAST_TILE_PX = 8.0
"""Side of the smallest tile, level-0 px."""

__all__ = [
    "LEAST_TILE_PX",
    "SPOTS_TOLERANCE",
    "Resolution",
    "SpotsSay",
    "TileSize",
    "check_tile_options",
    "choose_mpp",
    "implausible_mpp",
    "plausible_mpp",
    "square_mpp",
]

_MPP_TOLERANCE = 0.05
SPOTS_TOLERANCE = 0.1
"""How far the resolution may be from what spots say before that is said, as a share."""
_SQUARE = 0.05  # how far the sides of a px may differ
_LEAST_MPP, _MOST_MPP = 0.05, 10.0


@dataclass(frozen=True)
class TileSize:
    """Side of a tile on the slide: exactly one of µm and level-0 px."""

    um: float | None = None
    level0_px: float | None = None

    def record(self) -> dict[str, Any]:
        """Return what a store keeps of it."""
        return {"size_um": self.um, "size_level0_px": self.level0_px}

    def on_slide(self, mpp: float | None, slide: Slide) -> float:
        """Return the side in level-0 px on a slide of `mpp` µm per px."""
        if self.level0_px is not None:
            return self.level0_px
        assert self.um is not None
        if mpp is None:
            raise SlideError(
                f"{slide.path} does not say its resolution, and tiles of {self.um:g} µm need it; give mpp in the "
                "manifest (µm per px), or the tile's size in pixels with --tile-px"
            )
        return self.um / mpp


def square_mpp(sides: Sequence[float], path: Path) -> float | None:
    """Return µm per px from a px's width and height, None where neither is known.

    Raises SlideError where they differ by more than 5 %: tiles are square.
    """
    known = [side for side in sides if math.isfinite(side) and side > 0]
    if len(known) == 2 and not 1 - _SQUARE < known[0] / known[1] < 1 + _SQUARE:
        raise SlideError(
            f"{path} has px of {known[0]:g} × {known[1]:g} µm, and tiles are square: scale the image to square px"
        )
    return sum(known) / len(known) if known else None


def check_tile_options(tile_um: float | None, tile_px: float | None) -> None:
    """Raise UsageError where what was asked for is no size of a tile."""
    if tile_um is not None and tile_px is not None:
        raise UsageError("give the tile's size in µm or in px, not both")
    for name, value in (("--tile-um", tile_um), ("--tile-px", tile_px)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} takes a positive number, not {value}")
    if tile_px is not None and tile_px < LEAST_TILE_PX:
        raise UsageError(f"--tile-px takes {LEAST_TILE_PX:g} or more (level-0 px), not {tile_px:g}")


def plausible_mpp(mpp: float) -> bool:
    """Whether a slide scanner could have made px of `mpp` µm: 0.05 to 10."""
    return _LEAST_MPP <= mpp <= _MOST_MPP


def implausible_mpp(mpp: float) -> str:
    """Say what an implausible resolution may be instead."""
    bounds = f"{_LEAST_MPP:g} to {_MOST_MPP:g} are plausible"
    if plausible_mpp(mpp / 1000) and mpp >= 50:
        return f"{bounds}; in nm it would be {mpp / 1000:g} µm"
    if mpp in (20, 40, 60, 80, 100):
        return f"{bounds}; a magnification of {mpp:g}× is about {10 / mpp:g} µm per px"
    return bounds


@dataclass(frozen=True)
class SpotsSay:
    """A resolution that follows from spots."""

    mpp: float
    source: str
    """What it follows from, in words."""
    sure: bool
    """Whether it can hold another one against itself: not where other arrays look alike."""


@dataclass(frozen=True)
class Resolution:
    """A slide's resolution, and what should be known of it."""

    mpp: float | None
    source: str
    """manifest, file, spots, or unknown."""
    notes: tuple[str, ...] = ()
    """How it was found, where a person would not expect it."""
    doubts: tuple[str, ...] = ()
    """What contradicts it."""


def choose_mpp(in_manifest: float | None, in_file: float | None, of_spots: SpotsSay | None = None) -> Resolution:
    """Return the manifest's µm per px, else the file's, else what follows from the spots.

    What the file says is passed over, with a note, where no slide could have it; where nothing but the spots says it, a
    note says so, and a doubt where other arrays look like theirs. There are doubts where manifest and file differ by
    more than 5 %, and where spots say something else by more than 10 %.
    """
    notes, doubts = [], []
    if in_file is not None and not plausible_mpp(in_file):
        notes.append(f"the file says {in_file:g} µm per px, which is passed over: {implausible_mpp(in_file)}")
        in_file = None
    mpp, source = (in_manifest, "manifest") if in_manifest is not None else (in_file, "file")
    if mpp is None and of_spots is not None and plausible_mpp(of_spots.mpp):
        words = f"{of_spots.mpp:.4g} µm per px is estimated from {of_spots.source}; mpp in the manifest goes before"
        if of_spots.sure:
            return Resolution(of_spots.mpp, "spots", (*notes, words))
        return Resolution(of_spots.mpp, "spots", tuple(notes), (f"{words}: is it so?",))
    if mpp is None:
        return Resolution(None, "unknown", tuple(notes))
    if in_manifest is not None and in_file is not None and abs(in_manifest / in_file - 1) > _MPP_TOLERANCE:
        doubts.append(f"mpp is {in_manifest:g} in the manifest and {in_file:g} in the file; the manifest's is used")
    if of_spots is not None and of_spots.sure and abs(mpp / of_spots.mpp - 1) > SPOTS_TOLERANCE:
        doubts.append(
            f"mpp is {mpp:.4g} by the {source}, and {of_spots.mpp:.4g} by {of_spots.source}: is it that of this image?"
        )
    return Resolution(mpp, source, tuple(notes), tuple(doubts))
