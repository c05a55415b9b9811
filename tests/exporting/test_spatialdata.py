"""SpatialData: read back by itself, each tile where it lies, with its values."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.exporting.run import export
from tests.exporting.made import ODD, prediction


def test_spatialdata_reads_what_was_written(tmp_path: Path) -> None:
    sd = pytest.importorskip("spatialdata")
    values = prediction(tmp_path / "p.h5ad", slide_id="slide 1", genes=ODD, unlike=(2,), nan=((7, 3),))
    summary = export(tmp_path / "p.h5ad", "spatialdata", tmp_path / "out")
    assert not summary.failed
    (path,) = summary.files["slide 1"]
    with quiet_warnings():
        study = sd.read_zarr(path)
        assert set(study.coordinate_systems) == {"slide_1", "slide_1_downscaled_hires"}
        table, tiles = study["slide_1_predicted"], study["slide_1_tiles"]
        joined, _ = sd.join_spatialelement_table(
            sdata=study, spatial_element_names="slide_1_tiles", table_name="slide_1_predicted", how="inner"
        )
        extent = sd.get_extent(study["slide_1_hires_image"], coordinate_system="slide_1")
    assert len(joined["slide_1_tiles"]) == len(table) == 15
    rows = [i for i in range(16) if i != 2]
    np.testing.assert_array_equal(table.X, values[rows])
    np.testing.assert_allclose(table.layers["low"], values[rows] - 0.25, rtol=1e-6)
    assert list(table.var_names) == ODD
    assert table.uns["nh2st_pipe"]["unit"] == "log1p(counts per 10,000), mean"
    for row in (0, 4, 14):
        tile = tiles.loc[table.obs["tile_id"].iloc[row]]
        assert tile.geometry.bounds == pytest.approx(
            (*(table.obsm["spatial"][row] - 20), *(table.obsm["spatial"][row] + 20))
        )
        assert (tile.x, tile.y) == tile.geometry.bounds[:2]
    assert extent["x"] == pytest.approx((0, 350), abs=2)  # the thumbnail lies over the whole slide
    assert study.attrs["slide_properties"]["shape"] == [370, 350]
    assert study.attrs["slide_properties"]["bounds"] == [0, 0, 350, 370]
    assert study.attrs["tile_spec"]["slide_1_tiles"]["width"] == 40
    assert study.attrs["tile_spec"]["slide_1_tiles"]["stride_width"] == 50


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction(tmp_path / "p.h5ad")
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    monkeypatch.delitem(sys.modules, "nh2st_pipe.exporting.spatial_data", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'nh2st-pipe\[spatialdata\]'"):
        export(tmp_path / "p.h5ad", "csv,spatialdata", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd = pytest.importorskip("spatialdata")
    prediction(tmp_path / "p.h5ad")

    def full(self: object, place: Path) -> None:
        place.mkdir()
        (place / "some").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd.SpatialData, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "p.h5ad", "spatialdata", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
