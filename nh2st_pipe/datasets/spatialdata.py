"""SpatialData stores (scverse), read as they lie on disk: the library itself is not needed.

    <name>.zarr/images/<image>/          OME-Zarr of three channels
    <name>.zarr/shapes/<region>/         shapes.parquet: circles or polygons, one a spot
    <name>.zarr/tables/<table>/          AnnData; uns["spatialdata_attrs"] names its columns of region and shape

A shape's centre goes through the transformation of its element into a coordinate system that it shares with an image,
and through the image's back to px. Where there are several images the finest is taken, and of several tables `table` or
that of 8 µm; `--where image=…`, `--where table=…` and `--where region=…` take others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray

from nh2st_pipe.core.codecs import check_codecs, texts_counted
from nh2st_pipe.core.errors import ExpressionError, fault_of, listed, reason_of
from nh2st_pipe.core.h5ad import checked
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.datasets.common import Found, Section, unreadable, whole_numbers

__all__ = ["find_spatialdata"]

_KEY = "spatialdata_attrs"


@dataclass(frozen=True)
class _Picture:
    name: str
    px: int
    to_world: dict[str, NDArray[np.float64]]
    """Coordinate system → 3 × 3: px (x, y, 1) of the finest level → there."""
    um: dict[str, float]
    """µm of a unit of those systems that say it."""


def find_spatialdata(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find the sections of `folder`, or of the stores in it. Raises ExpressionError where there is none."""
    stores = [folder] if _is_store(folder) else [path for path in sorted(folder.iterdir()) if _is_store(path)]
    found = list[Found]()
    for store in stores:
        name = store.resolve().stem
        try:
            with fault_of(ExpressionError, f"{store} cannot be read as SpatialData"):
                found += _readings(store, name)
        except ExpressionError as error:
            found.append(unreadable(name, error))
    if not found:
        raise ExpressionError(
            f"there is no SpatialData store with a table that annotates shapes in {folder}; expected is <name>.zarr "
            "with images/, shapes/ and tables/"
        )
    return found


def _readings(store: Path, stem: str) -> list[Found]:
    """Return every way in which a store can be read: its tables, regions and images."""
    check_codecs(store, below=True)
    with quiet_warnings(), texts_counted():
        root = zarr.open_group(store, mode="r", use_consolidated=False)
        pictures = _pictures(root)
        tables = sorted(name for name, _ in root["tables"].groups()) if "tables" in root else []  # type: ignore[union-attr]
    usual = min(tables, key=lambda name: (name != "table", "008um" not in name, name), default="")
    found = list[Found]()
    for table in tables:
        with quiet_warnings(), texts_counted():
            attributes = read_elem(root[f"tables/{table}/uns"]).get(_KEY, {})
        regions = np.atleast_1d(np.asarray(attributes.get("region", ()), object)).tolist()
        for region in regions:
            name = stem if len(regions) == 1 else f"{stem}_{region}"
            for number, picture in enumerate(pictures or [None]):
                about = {"table": table, "region": str(region), "image": picture.name if picture else ""}
                other = ("table",) * (table != usual) + ("image",) * (number > 0)
                read = partial(_read, store, table, str(region), attributes, picture, name)
                found.append(Found(name, read, about, only_where=other))
    return found


def _is_store(path: Path) -> bool:
    return (
        path.is_dir() and (path / "tables").is_dir() and ((path / "zarr.json").exists() or (path / ".zgroup").exists())
    )


def _pictures(root: zarr.Group) -> list[_Picture]:
    """Return the images of three channels, the finest first."""
    found = list[_Picture]()
    for name, element in root["images"].groups() if "images" in root else ():  # type: ignore[union-attr]
        attributes = dict(element.attrs)
        scales: Any = (attributes.get("ome") or attributes)["multiscales"][0]
        axes = [axis["name"] for axis in scales["axes"]]
        level = scales["datasets"][0]
        array: Any = element[level["path"]]
        if "c" not in axes or array.shape[axes.index("c")] not in (3, 4):
            continue
        own = _after([_matrix(each, axes) for each in level.get("coordinateTransformations", ())])
        to_world, um = dict[str, NDArray[np.float64]](), dict[str, float]()
        for each in scales.get("coordinateTransformations", ()):
            system = each.get("output", {})
            to_world[str(system.get("name"))] = _matrix(each, axes) @ own
            if any(axis.get("unit") == "micrometer" for axis in system.get("axes", ()) if axis.get("name") == "x"):
                um[str(system.get("name"))] = 1.0
        found.append(
            _Picture(name, int(array.shape[axes.index("x")]) * int(array.shape[axes.index("y")]), to_world, um)
        )
    return sorted(found, key=lambda picture: (-picture.px, picture.name))


def _matrix(transformation: Mapping[str, Any], axes: Sequence[str]) -> NDArray[np.float64]:
    """Return an NGFF transformation as 3 × 3 of (x, y, 1); `axes` are those of its input where it does not say them."""
    names = [axis["name"] for axis in transformation.get("input", {}).get("axes", ())] or list(axes)
    after = [axis["name"] for axis in transformation.get("output", {}).get("axes", ())] or names
    kind, out = transformation["type"], np.eye(3)
    if kind == "scale":
        for i, axis in enumerate("xy"):
            out[i, i] = transformation["scale"][names.index(axis)]
    elif kind == "translation":
        for i, axis in enumerate("xy"):
            out[i, 2] = transformation["translation"][names.index(axis)]
    elif kind == "affine":
        matrix = np.asarray(transformation["affine"], np.float64)
        for i, to in enumerate("xy"):
            row = matrix[after.index(to)]
            out[i] = [row[names.index("x")], row[names.index("y")], row[-1]]
    elif kind == "sequence":
        return _after([_matrix(each, names) for each in transformation["transformations"]])
    elif kind == "mapAxis":
        pairs: Mapping[str, str] = transformation["mapAxis"]
        for i, to in enumerate("xy"):
            out[i] = [pairs.get(to, to) == "x", pairs.get(to, to) == "y", 0]
    elif kind != "identity":
        raise ExpressionError(f"a transformation of kind {kind!r} is not known here")
    return out


def _after(matrices: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return one matrix that does what `matrices` do, one after another."""
    out = np.eye(3)
    for matrix in matrices:
        out = matrix @ out
    return out


def _read(
    store: Path, table: str, region: str, attributes: Mapping[str, Any], picture: _Picture | None, name: str
) -> Section:
    if picture is None:
        raise ExpressionError(f"{store} has no image of three channels in images/")
    with quiet_warnings(), texts_counted():
        root = zarr.open_group(store, mode="r", use_consolidated=False)
        data = checked(read_elem(root[f"tables/{table}"]))
    key, instance = str(attributes.get("region_key")), str(attributes.get("instance_key"))
    lacking = [column for column in (key, instance) if column not in data.obs]
    if lacking:
        raise ExpressionError(f"{store}: obs of the table {table} lacks {listed(lacking)}")
    data = data[np.asarray(data.obs[key].astype(str)) == region]
    ids, centres, to_world = _shapes(store, root, region, data.obs[instance])
    shared = [system for system in to_world if system in picture.to_world]
    if not shared:
        of = f"{listed(to_world)} of the one, {listed(picture.to_world)} of the other"
        raise ExpressionError(f"{store}: shapes {region} and image {picture.name} share no coordinate system ({of})")
    system = "global" if "global" in shared else shared[0]
    to_px = np.linalg.inv(picture.to_world[system]) @ to_world[system]
    at = {value: row for row, value in enumerate(ids)}
    pairs = [(row, at[value]) for row, value in enumerate(data.obs[instance].astype(str)) if value in at]
    if not pairs:
        of = f"{listed(list(data.obs[instance].astype(str)), 3)} in the one, {listed(ids, 3)} in the other"
        raise ExpressionError(f"{store}: table {table} and shapes {region} have no spot in common: {of}")
    rows, places = np.array(pairs).T
    data = data[rows]
    mpp = picture.um.get(system)
    scale = float(np.sqrt(abs(np.linalg.det(picture.to_world[system][:2, :2]))))
    left = len(ids) + len(data.obs) - 2 * len(pairs)
    patient = data.obs["patient"].astype(str).iloc[0] if "patient" in data.obs else name
    return Section(
        image=store / "images" / picture.name,
        counts=sp.csr_matrix(data.layers["counts"] if "counts" in data.layers else data.X),  # noqa: SIM401
        barcodes=[str(each) for each in data.obs_names],
        genes=[str(each) for each in data.var_names],
        xy=(np.column_stack((centres[places], np.ones(len(places)))) @ to_px.T)[:, :2],
        array_row=whole_numbers(data.obs["array_row"]) if "array_row" in data.obs else None,
        array_col=whole_numbers(data.obs["array_col"]) if "array_col" in data.obs else None,
        patient=str(patient),
        mpp=None if mpp is None else mpp * scale,
        mpp_source="" if mpp is None else f"coordinate system {system} of the store",
        notes=[f"image {picture.name}", *([f"{left} in only one of table and shapes left out"] if left else [])],
    )


def _shapes(
    store: Path, root: zarr.Group, region: str, wanted: Any
) -> tuple[list[str], NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return the names of a region's shapes, their centres n × 2 (x, y), and the ways to coordinate systems."""
    import shapely

    file = store / "shapes" / region / "shapes.parquet"
    if not file.is_file():
        labels = "; it is a raster of labels, which has no spots" if (store / "labels" / region).is_dir() else ""
        raise ExpressionError(f"there is no {file}{labels}")
    try:
        frame = pl.read_parquet(file)
        geometry = shapely.from_wkb(frame["geometry"].to_numpy())
    except (pl.exceptions.PolarsError, shapely.errors.GEOSException, OSError) as error:
        raise ExpressionError(f"{file} is no table of shapes: {reason_of(error)}") from error
    centre = shapely.centroid(geometry)
    names = [column for column in frame.columns if column not in ("geometry", "radius")]
    columns = [frame[column].cast(pl.String).to_list() for column in names] or [[str(i) for i in range(len(frame))]]
    known = set(wanted.astype(str))
    ids = max(columns, key=lambda values: len(known.intersection(values)))
    attributes: Any = dict(root[f"shapes/{region}"].attrs)
    to_world = {
        str(each.get("output", {}).get("name")): _matrix(each, ("x", "y"))
        for each in attributes.get("coordinateTransformations", ())
    }
    return ids, np.column_stack((shapely.get_x(centre), shapely.get_y(centre))), to_world
