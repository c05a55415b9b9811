"""Heat maps: a tile's value where the tile lies, nothing where there is none, in µm, at every level."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.exporting import ome_zarr, rasters, view
from nh2st_pipe.exporting.rasters import halved, raster_of
from nh2st_pipe.exporting.run import export
from nh2st_pipe.exporting.view import read_view
from tests.exporting.made import ODD, genes_of, prediction


def hexagons(path: Path) -> NDArray[np.float32]:
    """Write a prediction whose tiles lie as Visium's spots do."""
    import anndata

    values = prediction(path, side=6)
    data = anndata.read_h5ad(path)
    row, column = np.divmod(np.arange(36), 6)
    data.obsm["spatial"] = np.column_stack((column * 50 + row % 2 * 25 + 100, row * 43.3 + 100))
    data.write_h5ad(path)
    return values


def test_a_px_is_a_tile_where_tiles_lie_on_a_grid(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad", unlike=(5, 15))
    raster = raster_of(read_view(tmp_path / "p.h5ad").chosen())
    assert (raster.px, raster.first, raster.levels) == (50.0, (100.0, 100.0), 1)
    assert (raster.tile == -1).sum() == 2
    assert raster.tile[1, 1] == -1
    assert raster.tile[0].tolist() == [0, 1, 2, 3]
    assert raster.tile[3, 2] == 13  # of those that are left, the last but none


def test_tiles_between_each_other_are_shown_by_smaller_px(tmp_path: Path) -> None:
    values = hexagons(tmp_path / "p.h5ad")
    chosen = read_view(tmp_path / "p.h5ad").chosen()
    raster = raster_of(chosen)
    assert raster.px == pytest.approx(25.0, rel=1e-3)
    picture = next(raster.pictures(chosen))
    for tile, (x, y) in enumerate(chosen.xy):
        column, row = (round((place - first) / raster.px) for place, first in zip((x, y), raster.first, strict=True))
        assert picture[row, column] == values[tile, 0]


def test_a_level_is_the_mean_of_what_is_there() -> None:
    nan = np.nan
    picture = np.array([[1, 3, nan], [nan, 2, nan], [4, nan, 8]], np.float32)
    expected = np.array([[2, nan], [4, 8]], np.float32)
    np.testing.assert_array_equal(halved(picture), expected)


def test_a_single_tile_is_a_px_as_large_as_it(tmp_path: Path) -> None:
    values = prediction(tmp_path / "p.h5ad", side=1, tile=40.0)
    chosen = read_view(tmp_path / "p.h5ad").chosen(everything=True)
    raster = raster_of(chosen)
    assert (raster.tile.tolist(), raster.px, raster.first) == ([[0]], 40.0, (100.0, 100.0))
    assert next(raster.pictures(chosen)).tolist() == [[values[0, 0]]]


@pytest.mark.parametrize("side", [4, 23], ids=["one level", "several"])
def test_an_ome_tiff_is_what_its_reader_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(rasters, "_SMALL_PX", 8)
    monkeypatch.setattr(view, "_BLOCK_VALUES", 2 * side * side)  # two genes at a time
    values = prediction(tmp_path / "p.h5ad", side=side, genes=ODD, unlike=(6,))
    summary = export(tmp_path / "p.h5ad", "ome-tiff", tmp_path / "out")
    assert not summary.failed
    with tifffile.TiffFile(tmp_path / "out/s1.ome.tif") as file:
        (series,) = file.series
        assert series.axes == "CYX"
        levels = [level.asarray() for level in series.levels]
        described = ElementTree.fromstring(file.ome_metadata or "")
    assert len(levels) == {4: 1, 23: 3}[side]
    expected = values.T.reshape(len(ODD), side, side).copy()
    expected[:, 6 // side, 6 % side] = np.nan
    np.testing.assert_array_equal(levels[0], expected)
    for finer, coarser in itertools.pairwise(levels):
        np.testing.assert_array_equal(coarser, np.stack([halved(gene) for gene in finer]))
    (pixels,) = (node for node in described.iter() if node.tag.endswith("}Pixels"))
    assert [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "XY"] == [25.0, 25.0]
    channels = [node.attrib["Name"] for node in described.iter() if node.tag.endswith("}Channel")]
    assert [" ".join(name.split()) for name in channels] == [" ".join(name.split()) for name in ODD]
    beside = json.loads((tmp_path / "out/s1.ome.json").read_text())
    assert (beside["first_px_centre_level0_px"], beside["px_level0_px"]) == ([100.0, 100.0], 50.0)
    assert beside["unit"] == "log1p(counts per 10,000), mean"


@pytest.mark.parametrize("ngff", ["0.5", "0.4"])
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_an_ome_zarr_is_as_ngff_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ngff: str, many: bool) -> None:
    monkeypatch.setattr(rasters, "_SMALL_PX", 4)
    if many:
        monkeypatch.setattr(ome_zarr, "_MANY", 3)
        monkeypatch.setattr(ome_zarr, "_SHARD_GENES", 2)
    values = prediction(tmp_path / "p.h5ad", side=6, genes=genes_of(5), nan=((3, 0),))
    export(tmp_path / "p.h5ad", "ome-zarr", tmp_path / "out", ngff=ngff)
    group: Any = zarr.open_group(tmp_path / "out/s1.ome.zarr", mode="r")
    assert group.metadata.zarr_format == {"0.5": 3, "0.4": 2}[ngff]
    said = group.attrs["ome"] if ngff == "0.5" else group.attrs
    (multiscale,) = said["multiscales"]
    assert (said if ngff == "0.5" else multiscale)["version"] == ngff
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert multiscale["axes"][1] == {"name": "y", "type": "space", "unit": "micrometer"}
    first, second = multiscale["datasets"]
    assert [each["type"] for each in first["coordinateTransformations"]] == ["scale", "translation"]
    assert first["coordinateTransformations"][0]["scale"] == [1.0, 25.0, 25.0]
    assert first["coordinateTransformations"][1]["translation"] == [0.0, 50.0, 50.0]  # centre of the first px, µm
    assert second["coordinateTransformations"][0]["scale"] == [1.0, 50.0, 50.0]
    assert second["coordinateTransformations"][1]["translation"] == [0.0, 62.5, 62.5]
    expected = values.T.reshape(5, 6, 6)
    np.testing.assert_array_equal(group[first["path"]][:], expected)
    np.testing.assert_array_equal(group[second["path"]][:], np.stack([halved(gene) for gene in expected]))
    channels = said["omero"]["channels"]
    assert [channel["label"] for channel in channels] == genes_of(5)
    assert channels[0]["window"]["max"] == float(np.nanmax(values[:, 0]))
    assert group.attrs["nh2st_pipe"]["unit"] == "log1p(counts per 10,000), mean"
    if ngff == "0.5":
        assert group["0"].metadata.dimension_names == ("c", "y", "x")


def test_without_mpp_a_picture_has_no_size_and_says_so(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad", mpp=None)
    summary = export(tmp_path / "p.h5ad", "ome-tiff,ome-zarr", tmp_path / "out")
    assert sum("µm per px is not known" in each for each in summary.notices) == 2
    group = zarr.open_group(tmp_path / "out/s1.ome.zarr", mode="r")
    assert "unit" not in str(group.attrs["ome"])
    with tifffile.TiffFile(tmp_path / "out/s1.ome.tif") as file:
        assert "PhysicalSize" not in str(file.ome_metadata)


def test_tiles_that_are_too_far_apart_for_a_picture_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prediction(tmp_path / "p.h5ad")
    monkeypatch.setattr(rasters, "_MOST_PX", 10)
    with pytest.raises(RunError, match="too few for a picture"):
        raster_of(read_view(tmp_path / "p.h5ad").chosen())
    assert "too few for a picture" in export(tmp_path / "p.h5ad", "ome-tiff", tmp_path / "out").failed["s1"]
    assert not list((tmp_path / "out").iterdir())
