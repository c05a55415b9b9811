"""Tiles of another tool on the slide: to centres in level-0 px, inside it, and on tissue as they are.

Coordinates go wrong in few ways: x and y swapped, corners taken for centres, µm or px of another level taken for px of
level 0. Each leaves a trace, for the tool laid its tiles on tissue: read rightly, they cover more of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, UsageError
from nh2st_pipe.importing.found import Asked, Places
from nh2st_pipe.tiles.geometry import CLEARLY_BETTER, WAYS

__all__ = ["check_inside", "check_on_tissue", "on_level0"]

_LEAST_AT_EDGES = 10  # tiles whose share of tissue another reading changes
_CLEAR = 4.0  # such changes, summed, in their own spread: all in one direction
_LEAST_GAIN = 0.005  # of the mean share of tissue under a tile


def on_level0(places: Places, mpp: float | None, asked: Asked, at: str) -> tuple[NDArray[np.float64], float]:
    """Return the tiles' centres (n × 2) and their side, level-0 px.

    `mpp` is the slide's. Raises SlideError naming `at` where that is needed and not known, UsageError where nobody says
    how large tiles are, or at which resolution their coordinates are.
    """
    scale = 1.0
    if places.unit != "level-0 px":
        if mpp is None:
            raise SlideError(f"{at}: its coordinates are in {places.unit}; the manifest has to say the slide's mpp")
        if places.unit == "px as read" and asked.mpp_read is None:
            raise UsageError(
                f"{at}: its coordinates are in px of the resolution at which tiles were read, and no file says which: "
                "give --mpp-read (µm per px, mostly 0.5)"
            )
        scale = 1 / mpp if places.unit == "µm" else float(asked.mpp_read or 0) / mpp
    side = None if places.side is None else places.side * scale
    if side is None and asked.tile_px is not None:
        side = asked.tile_px
    if side is None and (um := asked.tile_um or places.side_um) is not None:
        if mpp is None:
            raise SlideError(f"{at}: its tiles have a size in µm; the manifest has to say the slide's mpp")
        side = um / mpp
    if side is None:
        raise UsageError(
            f"{at}: no file says how large its tiles are: give --coords (the folder of the files with the coordinates "
            "that were made first), --tile-px (level-0 px) or --tile-um"
        )
    return places.xy[:, :2] * scale + (side / 2 if places.of == "corner" else 0.0), side


def check_inside(xy: NDArray[np.float64], side: float, size: tuple[int, int], mpp: float | None, at: str) -> None:
    """Raise SlideError where tiles (n × 2 centres) lie outside a slide of `size`, naming what would lay them inside."""
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(bad):
        raise SlideError(f"{at}: coordinates are not numbers in {len(bad):,} rows, the first {bad[0]}")

    def beyond(places: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.flatnonzero(((places < -side) | (places > np.array(size) + side)).any(axis=1))

    outside = beyond(xy)
    if not len(outside):
        return
    meant = [way for way, laid in _other_readings(xy, side, size, mpp).items() if not len(beyond(laid))]
    x, y = xy[outside[0]]
    raise SlideError(
        f"{at}: {len(outside):,} of {len(xy):,} tiles lie outside the slide of {size[0]:,} × {size[1]:,} px, the first "
        f"(row {outside[0]}) at {x:,.0f}, {y:,.0f}" + (f"; they would not if {meant[0]}" if meant else "")
    )


def check_on_tissue(
    xy: NDArray[np.float64], side: float, mask: NDArray[np.bool_], size: tuple[int, int], mpp: float | None, at: str
) -> list[str]:
    """Return what is unlikely about tiles (n × 2 centres) on a slide's tissue (h × w, the whole slide).

    Raises SlideError where they cover clearly more of it when they are read in another way, and names that.
    """
    if not mask.any():
        return []
    under = _Tissue(mask, size)
    own = under(xy, side)
    best, meant, gain = 0.0, "", np.zeros(1)
    for way, laid in _other_readings(xy, side, size, mpp).items():
        apart = under(laid, side) - own
        if apart.mean() > max(best, _LEAST_GAIN) and _clear(apart, "corner" in way):
            best, meant, gain = float(apart.mean()), way, apart
    if meant:
        raise SlideError(
            f"{at}: tissue covers {own.mean():.0%} of its tiles, and {own.mean() + gain.mean():.0%} if {meant}. Mend "
            "the files; or say --trust-places, if they are right as they are"
        )
    few = float((own > 0).mean())
    return [f"only {few:.0%} of its tiles lie on what looks like tissue"] if few < CLEARLY_BETTER * 5 else []


def _clear(apart: NDArray[np.float64], by_half_a_tile: bool) -> bool:
    """Whether another reading is clearly better. Of one that moves all tiles by half of their side the edges tell."""
    if not by_half_a_tile:
        return float(apart.mean()) > CLEARLY_BETTER
    changed = apart[apart != 0]
    return len(changed) >= _LEAST_AT_EDGES and float(changed.sum()) > _CLEAR * float(np.sqrt((changed**2).sum()))


def _other_readings(
    xy: NDArray[np.float64], side: float, size: tuple[int, int], mpp: float | None
) -> dict[str, NDArray[np.float64]]:
    """Return what the tiles' centres would be if they had been meant otherwise, by what that is."""
    found = {f"they were {way}": lay(xy, size) for way, lay in WAYS.items()}
    found["coordinates were of centres, not of corners"] = xy - side / 2
    found["coordinates were of corners, not of centres"] = xy + side / 2
    if mpp is not None and abs(mpp - 1) > 0.01:
        corner = xy - side / 2
        found["µm were taken for px of level 0"] = corner / mpp + side / 2
        found["px of level 0 were taken for µm"] = corner * mpp + side / 2
    return found


class _Tissue:
    """How much of each tile is tissue."""

    def __init__(self, mask: NDArray[np.bool_], size: tuple[int, int]) -> None:
        self._sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
        self._sums[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
        self._scale = np.array(mask.shape[::-1]) / np.array(size)

    def __call__(self, xy: NDArray[np.float64], side: float) -> NDArray[np.float64]:
        """Return the share of tissue under each tile (n × 2 centres, level-0 px)."""
        most = np.array(self._sums.shape[::-1]) - 1
        low, high = ((xy + sign * side / 2) * self._scale for sign in (-1, 1))
        area = np.prod(high - low, axis=1)
        (x0, y0), (x1, y1) = (self._between(corner.T, most) for corner in (low, high))
        at = self._at
        return np.asarray((at(x1, y1) - at(x0, y1) - at(x1, y0) + at(x0, y0)) / np.maximum(area, 1e-9))

    @staticmethod
    def _between(corner: NDArray[np.float64], most: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
        return tuple(np.clip(side, 0, top) for side, top in zip(corner, most, strict=True))

    def _at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the tissue above and left of places in px of the mask, fractions of px included."""
        height, width = self._sums.shape
        column, row = np.minimum(x.astype(np.int64), width - 2), np.minimum(y.astype(np.int64), height - 2)
        right, down = x - column, y - row
        sums = self._sums
        top = sums[row, column] * (1 - right) + sums[row, column + 1] * right
        bottom = sums[row + 1, column] * (1 - right) + sums[row + 1, column + 1] * right
        return np.asarray(top * (1 - down) + bottom * down)
