"""Stores of Zarr: LazySlide's (SpatialData, with tiles as outlines and features as tables), and TIAToolbox's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of, listed
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import table_xy

__all__ = ["LazySlide", "TIAToolbox"]


def _stores(folder: Path) -> list[Path]:
    """Return the Zarr stores in a folder, or it itself where it is one."""
    return [folder] if _is_store(folder) else sorted(each for each in folder.glob("*.zarr") if _is_store(each))


def _is_store(path: Path) -> bool:
    return (path / "zarr.json").is_file() or (path / ".zgroup").is_file()


@contextmanager
def _group(path: Path) -> Iterator[Any]:
    with fault_of(SlideError, f"{path} cannot be used"), quiet_warnings():
        yield zarr.open_group(path, mode="r")


class LazySlide:
    """See Layout."""

    name = "lazyslide"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        for path in _stores(look.folder)[:1]:
            with _group(path) as root:
                return "spatialdata_attrs" in root.attrs or "tile_spec" in root.attrs
        return False

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        sections, vectors = list[Section](), dict[str, dict[str, Callable[[], NDArray[np.float32]]]]()
        for path in _stores(folder):
            with _group(path) as root:
                tables = root.get("tables")
                for key in sorted(tables.group_keys()) if tables is not None else ():
                    tiles = _region(tables[key])
                    model = str(key).removesuffix(f"_{tiles}")
                    if tiles is None or str(key).endswith("_dense") or "tile_id" not in tables[key].get("obs", ()):
                        continue
                    opened = partial(_opened_lazyslide, path, str(key), tiles)
                    sections.append(Section(path.stem, path, model, opened))
                    for name, read in _aggregates(path, str(key), tables[key]):
                        vectors.setdefault(path.stem, {})[name] = read
        return Found("LazySlide", tuple(sections), vectors)


def _region(table: Any) -> str | None:
    """Return which shapes the rows of a table are of."""
    region = table.attrs.get("region")
    if isinstance(region, list) and len(region) == 1:
        region = region[0]
    return region if isinstance(region, str) else None


@contextmanager
def _opened_lazyslide(path: Path, key: str, tiles: str) -> Iterator[Features]:
    from anndata.io import read_elem

    with _group(path) as root:
        table = root[f"tables/{key}"]
        obs = read_elem(table["obs"])
        spec = (root.attrs.get("tile_spec") or {}).get(tiles, {})
        properties = root.attrs.get("slide_properties") or {}
        ids, xy, side = _outlines(path / "shapes" / tiles, spec)
        place = {each: row for row, each in enumerate(ids)}
        rows = [place.get(int(each), -1) for each in obs["tile_id"]]
        if min(rows, default=0) < 0:
            raise SlideError(f"{path}: tables/{key} has rows of tiles that shapes/{tiles} does not have")
        shape = properties.get("shape")
        size = (int(shape[1]), int(shape[0])) if isinstance(shape, list) and len(shape) == 2 else None
        mpp = properties.get("mpp")
        values: Any = table["X"]
        if isinstance(values, zarr.Group):
            raise SlideError(f"{path}: tables/{key}/X is sparse; features are expected")
        yield Features(values, Places(xy[rows], side), mpp=None if mpp is None else float(mpp), size=size)


def _outlines(folder: Path, spec: dict[str, Any]) -> tuple[list[int], NDArray[np.float64], float | None]:
    """Return the tiles' ids, their top-left corners, and the side of one, level-0 px."""
    file = folder / "shapes.parquet"
    table = pl.read_parquet(file)
    ids = [int(each) for each in (table["tile_id"] if "tile_id" in table.columns else range(len(table)))]
    base = spec.get("base_width") or (
        spec["width"] * spec["base_downsample"] if {"width", "base_downsample"} <= spec.keys() else None
    )
    if {"x", "y"} <= set(table.columns) and base is not None:
        return ids, table.select("x", "y").to_numpy().astype(np.float64), float(base)
    if "geometry" not in table.columns:
        raise SlideError(f"{file} has columns {listed(table.columns)}; x, y or geometry are expected")
    import shapely

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bounds = shapely.bounds(shapely.from_wkb(table["geometry"].to_list()))
    sides = np.unique((bounds[:, 2:] - bounds[:, :2]).round(3))
    if len(sides) != 1:
        raise SlideError(f"{file}: tiles should be squares of one size, and have sides of {listed(sides)} px")
    return ids, bounds[:, :2], float(sides[0])


def _aggregates(path: Path, key: str, table: Any) -> Iterator[tuple[str, Callable[[], NDArray[np.float32]]]]:
    """Yield the vectors of whole slides that were made of a table's features."""
    operations = table.get("uns/agg_ops")
    if operations is None or "agg_slide" not in operations:
        return
    group = operations["agg_slide"]
    if not isinstance(group.get("features"), zarr.Array):
        return
    encoder = group.get("encoder")
    name = str(encoder[()]) if isinstance(encoder, zarr.Array) else str(key)

    def read() -> NDArray[np.float32]:
        with _group(path) as root:
            values = np.asarray(root[f"tables/{key}/uns/agg_ops/agg_slide/features"][:], np.float32)
        if values.ndim > 1 and values.shape[0] != 1:
            raise SlideError(f"{path}: tables/{key} has {values.shape[0]} vectors of the slide; one is expected")
        return values.ravel()

    yield name, read


class TIAToolbox:
    """See Layout."""

    name = "tiatoolbox"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        for path in _stores(look.folder)[:1]:
            with _group(path) as root:
                return "features" in root and "coordinates" in root
        return False

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        sections = [Section(path.stem, path, None, partial(_opened_tiatoolbox, path)) for path in _stores(folder)]
        return Found("TIAToolbox", tuple(sections))


@contextmanager
def _opened_tiatoolbox(path: Path) -> Iterator[Features]:
    with _group(path) as root:
        boxes = table_xy(root["coordinates"], path)
        if boxes.shape[1] != 4:
            raise SlideError(f"{path}: coordinates should be tiles × 4 (x0, y0, x1, y1), and are {boxes.shape}")
        sides = np.unique(boxes[:, 2:] - boxes[:, :2])
        if len(sides) > 1:
            raise SlideError(f"{path}: tiles should be squares of one size, and have sides of {listed(sides)} px")
        yield Features(root["features"], Places(boxes, float(sides[0]) if len(sides) else None, "px as read"))
