"""Regions that a person outlined in QuPath: where their spots are, and what is measured and predicted in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, UsageError, listed, nearest

__all__ = ["Region", "find_regions", "means_of", "read_regions"]

_ENDINGS = (".geojson", ".geojson.gz", ".json")
_MOST_RINGS = 2_000  # of a region's outlines, that are drawn


@dataclass(frozen=True)
class Region:
    """The outlines of one name."""

    name: str
    outlines: tuple[Any, ...]
    """Shapely geometries, level-0 px."""
    rows: NDArray[np.int64]
    """The spots whose centres lie within."""

    def rings(self, low: NDArray[np.float64], scale: float) -> list[list[list[float]]]:
        """Return its rings in px of a picture that begins at `low` (level-0 px), with `scale` px per level-0 px."""
        import shapely

        parts = shapely.get_parts(shapely.get_parts(np.array(self.outlines, dtype=object)))
        found = []
        for part in parts[:_MOST_RINGS]:
            if isinstance(part, shapely.Polygon) and not part.is_empty:
                simple = shapely.simplify(part, 0.5 / scale)
                for ring in (simple.exterior, *simple.interiors):
                    found.append(((np.asarray(ring.coords)[:, :2] - low) * scale).round(1).tolist())
        return found


def find_regions(where: str | Path, slides: Sequence[str]) -> dict[str, Path]:
    """Return the file of each slide's regions: one file, for one slide, or NAME.geojson of each in a folder.

    Raises UsageError where there is none, or a file is called like no slide.
    """
    where = Path(where)
    if where.is_file():
        if len(slides) != 1:
            raise UsageError(
                f"{where} is one file, and there are {len(slides):,} slides: give a folder with SLIDE.geojson for each"
            )
        return {slides[0]: where}
    if not where.is_dir():
        raise UsageError(f"there are no regions at {where}")
    files = {file.name.removesuffix(ending): file for ending in _ENDINGS for file in where.glob(f"*{ending}")}
    strange = sorted(files.keys() - set(slides))
    if strange:
        named = listed(f"{files[name].name}{nearest(name, slides)}" for name in strange)
        raise UsageError(
            f"{where} holds regions of no slide here: {named}; they are called as the slides: SLIDE.geojson"
        )
    if not files:
        raise UsageError(f"{where} holds no file SLIDE.geojson")
    return files


def read_regions(path: Path, xy: NDArray[np.float64], origin: tuple[int, int]) -> list[Region]:
    """Read outlines as QuPath exports them, which count from `origin` (level-0 px), and find the spots within (n × 2).

    Outlines of one class are one region; those without a class go by their name.
    Raises SlideError where the file holds no outline, RunError where no spot lies in any of them.
    """
    import shapely

    from nh2st_pipe.tiles.masks import outlines_in

    of: dict[str, list[Any]] = {}
    for name, outline in outlines_in(path, "regions", by_name=True):
        moved = shapely.transform(outline, lambda places: places[:, :2] + np.array(origin))
        of.setdefault(name or "without a name", []).append(moved)
    found = []
    for name, outlines in of.items():
        within = np.zeros(len(xy), np.bool_)
        for outline in outlines:
            within |= shapely.contains_xy(outline, xy[:, 0], xy[:, 1])
        found.append(Region(name, tuple(outlines), np.flatnonzero(within)))
    if not any(len(region.rows) for region in found):
        raise RunError(f"{path}: none of the slide's {len(xy):,} spots lies in its regions; are they of another slide?")
    return found


def means_of(values: NDArray[np.float32], regions: Sequence[Region]) -> list[dict[str, list[float | None]]]:
    """Return, of each region and each gene of n × G values, the mean over its spots and the quartiles."""
    found = []
    for region in regions:
        some = values[region.rows].astype(np.float64)
        known = np.isfinite(some).any(axis=0) if len(some) else np.zeros(values.shape[1], np.bool_)
        figures = np.full((3, values.shape[1]), np.nan)
        if known.any():
            figures[0, known] = np.nanmean(some[:, known], axis=0)
            figures[1:, known] = np.nanpercentile(some[:, known], (25, 75), axis=0)
        rows = [[float(f"{v:.5g}") if np.isfinite(v) else None for v in row] for row in figures]
        found.append(dict(zip(("mean", "low", "high"), rows, strict=True)))
    return found
