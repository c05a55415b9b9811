"""Vitessce and TissUUmaps: what their readers look for is where they look for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.exporting import view
from nh2st_pipe.exporting.run import export
from tests.conftest import Study
from tests.exporting.made import ODD, prediction


def test_vitessce_gets_what_its_viewer_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_BLOCK_VALUES", 3 * 16)
    values = prediction(
        tmp_path / "p.h5ad", slide_id="s 1", genes=ODD, trusted={**dict.fromkeys(ODD, True), "<&>": False}
    )
    summary = export(
        tmp_path / "p.h5ad", "vitessce", tmp_path / "out", everything=True, base_url="https://data.example/x/"
    )
    (folder,) = summary.files["s 1"]
    config = json.loads((folder / "vitessce.json").read_text())
    values_file, picture_file = config["datasets"][0]["files"]
    base = "https://data.example/x/s%201.vitessce"
    assert (values_file["url"], picture_file["url"]) == (f"{base}/predicted.zarr", f"{base}/picture.ome.zarr")
    assert "https://data.example/x/SLIDE.vitessce/vitessce.json" in summary.notices[0]
    assert config["coordinationSpace"]["featureSelection"] == {"A": [ODD[0]]}
    assert "log1p(counts per 10,000), mean" in config["description"]
    group: Any = zarr.open_group(folder / "predicted.zarr", mode="r", zarr_format=2)
    assert (group["X"].dtype, group["X"].chunks) == (np.float32, (16, 1))
    with quiet_warnings():
        data = anndata.read_zarr(folder / "predicted.zarr")
    np.testing.assert_array_equal(data.X, values)
    assert list(data.var_names) == [f"{gene} (untrusted)" if gene == "<&>" else gene for gene in ODD]
    assert data.var["trusted"].tolist() == [gene != "<&>" for gene in ODD]
    options = values_file["options"]
    for path in (options["obsLocations"]["path"], options["obsSegmentations"]["path"], options["obsSets"][0]["path"]):
        kind, name = path.split("/")
        assert name in getattr(data, kind)
    picture: Any = zarr.open_group(folder / "picture.ome.zarr", mode="r", zarr_format=2)
    height, width = picture["0"].shape[1:]
    assert (height, width) == (185, 175)
    np.testing.assert_allclose(data.obsm["spatial"][0], (50, 50))  # in the picture's px, half as many
    np.testing.assert_allclose(data.obsm["segmentations"][0], [(40, 40), (60, 40), (60, 60), (40, 60)])
    scopes = {name for each in config["layout"] for name in each["coordinationScopes"]}
    assert scopes <= set(config["coordinationSpace"])


@pytest.mark.parametrize("on_slide", [True, False], ids=["slide", "thumbnail"])
def test_tissuumaps_shows_values_on_the_slide(tmp_path: Path, on_slide: bool) -> None:
    values = prediction(tmp_path / "p.h5ad", unlike=(1,), trusted={"G3": True, "G1": True})
    (tmp_path / "slides").mkdir()
    Image.new("RGB", (400, 400)).save(tmp_path / "slides/a.png")
    (tmp_path / "slides/m.csv").write_text("slide_id,slide\ns1,a.png\n")
    manifest = tmp_path / "slides/m.csv" if on_slide else None
    summary = export(tmp_path / "p.h5ad", "tissuumaps", tmp_path / "out", slides=manifest)
    project = json.loads((tmp_path / "out/s1.tmap").read_text())
    (layer,), (markers,) = project["layers"], project["markerFiles"]
    shown = tmp_path / "out" / layer["tileSource"].removesuffix(".dzi")
    assert shown.resolve() == (tmp_path / ("slides/a.png" if on_slide else "out/s1.tissuumaps.png")).resolve()
    with Image.open(shown) as picture:
        assert picture.size == ((400, 400) if on_slide else (175, 185))
    assert markers["expectedHeader"]["coord_factor"] == (1.0 if on_slide else 0.5)
    assert any("--slides" in each for each in summary.notices) != on_slide
    data = anndata.read_h5ad(tmp_path / "out" / markers["path"])
    rows = [i for i in range(16) if i != 1]
    for option, column in zip(markers["dropdownOptions"], (1, 3), strict=True):
        assert option["name"] == f"G{column}"
        place = int(option["expectedHeader.cb_col"].removeprefix("/X;"))
        np.testing.assert_array_equal(data.X[:, place], values[rows, column])
    assert "log1p(counts per 10,000), mean" in markers["title"]


def test_predict_exports_what_it_predicted(make_study: Any, tmp_path: Path) -> None:
    study: Study = make_study(3)
    study.stored(stain_shift="off")
    runner, store = CliRunner(), str(study.folder / "store.zarr")
    run = ["train", "--embeddings", store, "--recipe", "ridge", "--genes", "4", "--folds", "none"]
    assert runner.invoke(app, [*run, "--out", str(tmp_path / "run")]).exit_code == 0
    wrong = ["predict", "--model", str(tmp_path / "run"), "--embeddings", store, "--out", str(tmp_path / "out")]
    done = runner.invoke(app, [*wrong, "--export", "qpath"])
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, [*wrong, "--export", "qupath,csv"])
    assert done.exit_code == 1  # a head that was not judged has no gene to be trusted
    assert "none of 4 genes is trusted (4 were not judged)" in done.stderr
    assert len(list((tmp_path / "out").glob("*.h5ad"))) == 3  # what was predicted is there all the same
