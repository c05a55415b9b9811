"""What is exported: the genes and tiles that may be believed, unless more is asked for; whole or not at all."""

from __future__ import annotations

import csv
import gzip
import json
import re
import uuid
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import RunError, UsageError
from nh2st_pipe.exporting import qupath, tables, view
from nh2st_pipe.exporting.run import export
from tests.conftest import Study
from tests.exporting.made import ODD, genes_of, prediction

UNIT = "log1p(counts per 10,000), mean"


def geojson(path: Path) -> list[dict[str, Any]]:
    """Return the features of an exported file, each held against QuPath's rules, field by field."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    collection = json.loads(gzip.decompress(path.read_bytes()), parse_constant=refuse)
    assert collection["type"] == "FeatureCollection"
    names = {tuple(feature["properties"]["measurements"]) for feature in collection["features"]}
    assert len(names) == 1  # the same in each: QuPath lists them flat
    for feature in collection["features"]:
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon"
        assert (len(ring), ring[0]) == (5, ring[-1])
        assert all(isinstance(value, int) for corner in ring for value in corner)
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert properties["isLocked"] is True
        assert set(properties["classification"]) == {"name", "color"}
        assert ":" not in properties["classification"]["name"]  # which would derive a class
        assert len(properties["classification"]["color"]) == 3
        assert all(isinstance(value, int) and 0 <= value <= 255 for value in properties["classification"]["color"])
        assert all(isinstance(text, str) for text in properties["metadata"].values())
        for value in properties["measurements"].values():
            assert value == "NaN" or (isinstance(value, int | float) and not isinstance(value, bool))
    assert len({feature["id"] for feature in collection["features"]}) == len(collection["features"])
    features: list[dict[str, Any]] = collection["features"]
    return features


@pytest.mark.parametrize("everything", [False, True], ids=["trusted", "all"])
def test_qupath_gets_tiles_where_it_counts_from(tmp_path: Path, everything: bool) -> None:
    values = prediction(
        tmp_path / "p.h5ad", origin=(60, 30), trusted={"G0": True, "G1": False, "G2": True}, unlike=(3,)
    )
    summary = export(tmp_path / "p.h5ad", "qupath", tmp_path / "out", everything=everything)
    (path,) = summary.files["s1"]
    features = geojson(path)
    assert len(features) == (16 if everything else 15)
    assert features[1]["geometry"]["coordinates"] == [[[70, 50], [110, 50], [110, 90], [70, 90], [70, 50]]]
    names = {
        "G0": 0,
        "G2": 2,
        **({"G1 (untrusted)": 1, "G3 (not judged)": 3, "G4 (not judged)": 4} if everything else {}),
    }
    for feature in features:
        row = int(feature["properties"]["name"].removeprefix("AA-"))
        said = feature["properties"]["measurements"]
        assert set(said) == {f"{gene}{end}" for gene in names for end in ("", " low", " high")} | {"unlike %"}
        for gene, column in names.items():
            found = [said[f"{gene}{end}"] for end in ("", " low", " high")]
            np.testing.assert_allclose(found, values[row, column] + np.array([0, -0.25, 0.25]), rtol=1e-4, atol=1e-5)
        kind = "Unlike training tiles" if row == 3 else "Predicted"
        assert feature["properties"]["classification"]["name"] == kind
        assert feature["properties"]["metadata"]["unit"] == UNIT
    again = export(tmp_path / "p.h5ad", "qupath", tmp_path / "again", everything=everything).files["s1"][0]
    assert [feature["id"] for feature in geojson(again)] == [feature["id"] for feature in features]
    words = " ".join(summary.notices)
    assert ("3 of 5 genes are not trusted" in words) == (not everything)
    assert ("1 of 16 tiles are unlike" in words) == (not everything)


def test_where_qupath_counts_from_is_asked_for_where_it_matters(tmp_path: Path) -> None:
    for name, said in (("a.svs", 0), ("a.mrxs", 1)):
        prediction(tmp_path / "p.h5ad", origin=None, image=name)
        summary = export(tmp_path / "p.h5ad", "qupath", tmp_path / name)
        assert len([each for each in summary.notices if "where QuPath counts from" in each]) == said


def test_odd_names_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad", genes=ODD, nan=((2, 0), (2, 3), (9, 7)))
    summary = export(tmp_path / "p.h5ad", "qupath,csv,anndata", tmp_path / "out")
    assert not summary.failed
    features = geojson(tmp_path / "out/s1.geojson.gz")
    for gene in ODD:
        assert gene in features[0]["properties"]["measurements"]
    nan = [
        (row, ODD.index(name))
        for row, feature in enumerate(features)
        for name, value in feature["properties"]["measurements"].items()
        if value == "NaN" and name in ODD
    ]
    assert nan == [(2, 0), (2, 3), (9, 7)]
    wide = pd.read_csv(tmp_path / "out/s1.csv")
    assert [f"{gene} [{UNIT}]" in wide.columns for gene in ODD] == [True] * len(ODD)
    assert wide[f"ERBB2 [{UNIT}]"].isna().sum() == 1
    assert list(anndata.read_h5ad(tmp_path / "out/s1.h5ad").var_names) == ODD


def test_very_many_tiles_are_a_table_and_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qupath, "MOST_TILES", 16)
    values = prediction(tmp_path / "p.h5ad", genes=[*genes_of(2), *ODD[2:]], nan=((2, 0),), unlike=(4,))
    summary = export(tmp_path / "p.h5ad", "qupath", tmp_path / "out", everything=True)
    assert sorted(path.name for path in summary.files["s1"]) == ["s1.groovy", "s1.tsv.gz"]
    label, header, *lines = gzip.decompress((tmp_path / "out/s1.tsv.gz").read_bytes()).decode().splitlines()
    assert UNIT in label
    rows = [line.split("\t") for line in (header, *lines)]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[0][:7] == ["name", "class", "x", "y", "width", "height", "G0"]
    assert [row[1] for row in rows[1:]].index("Unlike training tiles") == 4
    assert [int(cell) for cell in rows[2][2:6]] == [130, 80, 40, 40]
    found = np.array([[float(cell) for cell in row[6::3]] for row in rows[1:]])[:, : values.shape[1]]
    np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)
    script = (tmp_path / "out/s1.groovy").read_text()
    assert 'def table = "s1.tsv.gz"' in script
    assert not re.search("@@", script)
    assert all(f'"{name}": getColorRGB{colour}' in script for name, colour in qupath.CLASSES.items())


def test_what_an_earlier_export_had_beside_is_gone_and_what_fails_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prediction(tmp_path / "p.h5ad")
    monkeypatch.setattr(qupath, "MOST_TILES", 16)
    export(tmp_path / "p.h5ad", "qupath", tmp_path / "out")
    monkeypatch.setattr(qupath, "MOST_TILES", 17)
    export(tmp_path / "p.h5ad", "qupath,spatialdata", tmp_path / "out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["s1.geojson.gz", "s1.sdata.zarr"]
    before = (tmp_path / "out/s1.geojson.gz").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qupath, "_features", full)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "p.h5ad", "qupath", tmp_path / "out", force=True)
    assert (tmp_path / "out/s1.geojson.gz").read_bytes() == before


def test_tables_name_their_units_and_hold_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_PART_VALUES", 9)  # so that tables are written part by part
    values = prediction(tmp_path / "p.h5ad", trusted={"G0": True, "G1": False}, unlike=(0,))
    export(tmp_path / "p.h5ad", "csv", tmp_path / "out")
    wide, long = (pd.read_csv(tmp_path / "out" / name) for name in ("s1.csv", "s1.long.csv"))
    assert wide["tile"].tolist() == [f"AA-{i}" for i in range(1, 16)]
    np.testing.assert_allclose(wide[f"G0 [{UNIT}]"], values[1:, 0], rtol=1e-6)
    np.testing.assert_allclose(wide[f"G0 low [{UNIT}]"], values[1:, 0] - 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wide[f"G0 measured [{UNIT}]"], values[1:, 0] + 1, rtol=1e-6)
    assert wide[["x [level-0 px]", "y [level-0 px]"]].iloc[0].tolist() == [150.0, 100.0]
    assert not [name for name in wide if "G1" in name or "trusted" in name]
    np.testing.assert_allclose(long[f"value [{UNIT}]"], values[1:, 0], rtol=1e-6)
    export(tmp_path / "p.h5ad", "csv", tmp_path / "all", everything=True, genes=["G1", "G4"])
    long = pd.read_csv(tmp_path / "all/s1.long.csv")
    assert set(zip(long["gene"], long["gene trusted"], strict=True)) == {("G1", "no"), ("G4", "not judged")}
    assert (long["tile unlike training"] == "yes").sum() == 2
    with (tmp_path / "all/s1.csv").open() as file:
        assert f"G1 (untrusted) [{UNIT}]" in next(csv.reader(file))
    monkeypatch.setattr(tables, "_MOST_LONG", 5)
    said = export(tmp_path / "p.h5ad", "csv", tmp_path / "short").notices
    assert any("the long table would have 15 rows" in each for each in said)


def test_anndata_is_the_chosen_part(tmp_path: Path) -> None:
    values = prediction(tmp_path / "p.h5ad", unlike=(5,), trusted={"G3": True, "G1": True})
    export(tmp_path / "p.h5ad", "anndata", tmp_path / "out")
    data = anndata.read_h5ad(tmp_path / "out/s1.h5ad")
    rows = [i for i in range(16) if i != 5]
    assert list(data.var_names) == ["G1", "G3"]
    assert np.array_equal(data.X, values[rows][:, [1, 3]])
    np.testing.assert_allclose(data.layers["high"], values[rows][:, [1, 3]] + 0.25, rtol=1e-6)
    assert data.uns["nh2st_pipe"]["unit"] == UNIT
    assert data.uns["spatial"]["s1"]["images"]["hires"].ndim == 3
    for name, of in (("one", tmp_path / "p.h5ad"), ("two", tmp_path / "out/s1.h5ad")):  # it is a prediction itself
        export(of, "csv,qupath", tmp_path / name)
    assert (tmp_path / "one/s1.csv").read_bytes() == (tmp_path / "two/s1.csv").read_bytes()
    assert geojson(tmp_path / "one/s1.geojson.gz") == geojson(tmp_path / "two/s1.geojson.gz")


def test_the_likeliest_genes_come_first_and_the_others_are_counted(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad", genes=genes_of(9)[::-1])
    few = view.read_view(tmp_path / "p.h5ad").chosen(most=4)
    assert few.genes == ["G8", "G7", "G6", "G5"]
    assert "5 more genes are left out" in few.left_out[0]
    named = view.read_view(tmp_path / "p.h5ad").chosen(["G0", "G8", "G0"], most=1)
    assert (named.genes, named.left_out) == (["G0", "G8"], ())  # who names them gets them


def test_nothing_is_exported_that_may_not_be_believed(tmp_path: Path) -> None:
    prediction(tmp_path / "none.h5ad", trusted={"G0": False})
    prediction(tmp_path / "far.h5ad", slide_id="s2", unlike=tuple(range(16)))
    prediction(tmp_path / "empty.h5ad", slide_id="s3", side=0)
    summary = export(tmp_path, "csv", tmp_path / "out")
    assert "none of 5 genes is trusted (4 were not judged)" in summary.failed["s1"]
    assert "all of its tiles are unlike" in summary.failed["s2"]
    assert "no tiles" in summary.failed["s3"]
    assert not summary.files
    assert set(export(tmp_path, "csv", tmp_path / "out", everything=True).files) == {"s1", "s2"}


def test_what_is_there_stays_unless_it_is_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction(tmp_path / "a.h5ad")
    prediction(tmp_path / "b.h5ad", slide_id="s 2")
    export(tmp_path, "qupath", tmp_path / "out")
    before = (tmp_path / "out/s1.geojson.gz").read_bytes()
    (tmp_path / "out/s1.geojson.gz").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"s1\.geojson\.gz is there already; --force"):
        export(tmp_path, "csv,qupath", tmp_path / "out")
    assert not (tmp_path / "out/s1.csv").exists()
    assert (tmp_path / "out/s1.geojson.gz").read_bytes() == b"mine"
    export(tmp_path, "csv,qupath", tmp_path / "out", force=True)
    assert geojson(tmp_path / "out/s1.geojson.gz")
    assert gzip.decompress((tmp_path / "out/s1.geojson.gz").read_bytes()) == gzip.decompress(before)
    assert (tmp_path / "out/s 2.geojson.gz").exists()
    prediction(tmp_path / "c.h5ad")
    with pytest.raises(RunError, match="both of slide s1"):
        export(tmp_path, "csv", tmp_path / "twice")
    (tmp_path / "c.h5ad").unlink()
    before = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").rename(tmp_path / "s1.h5ad")
    with pytest.raises(RunError, match="is a prediction that is to be exported"):
        export(tmp_path, "csv,anndata", tmp_path, force=True)  # it would be gone before it is read
    assert (tmp_path / "s1.h5ad").read_bytes() == before
    (tmp_path / "s1.h5ad").rename(tmp_path / "a.h5ad")
    prediction(tmp_path / "c.h5ad", slide_id="S1")
    with pytest.raises(RunError, match=r"slides s1 and S1 would both be written to"):
        export(tmp_path, "csv", tmp_path / "upper")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        export(tmp_path / "a.h5ad", "csv", tmp_path / "file")


def test_what_cannot_be_is_said_before_anything_is_written(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"to": "qupth"}, "no target qupth"),
        ({"to": " , "}, "names no target"),
        ({"to": "csv", "genes": "G0,G77"}, "does not hold G77"),
        ({"to": "csv", "genes": " , "}, "names no gene"),
        ({"to": "csv", "genes": "panel.txt"}, "there is no gene file panel.txt"),
        ({"to": "csv", "ngff": "0.3"}, "--ngff takes"),
    ]
    for arguments, words in wrong:
        with pytest.raises(UsageError, match=re.escape(words)):
            export(tmp_path / "p.h5ad", out=tmp_path / "out", **arguments)
    with pytest.raises(RunError, match="neither a prediction"):
        export(tmp_path / "nothing", "csv", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    said = anndata.read_h5ad(tmp_path / "p.h5ad").uns["nh2st_pipe"]["image"]
    without = {
        "p": None,
        "null": "null",
        "empty": "{}",
        "side": said.replace("tile_level0_px", "tile"),
        "size": '{"height": 9}',
    }
    strange = {"json": "{", "words": said.replace('"mpp": 0.5', '"mpp": "half"'), "list": "[1, 2]"}
    for name, image in {**without, **strange}.items():
        prediction(tmp_path / f"{name}.h5ad", slide_id=name)
        data = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
        if image is None:
            del data.uns["nh2st_pipe"]["image"]
        else:
            assert image != said
            data.uns["nh2st_pipe"]["image"] = image
        data.write_h5ad(tmp_path / f"{name}.h5ad")
    (tmp_path / "broken.h5ad").write_bytes(b"\x89HDF\r\n\x1a\nand so on")
    failed = export(tmp_path, "csv", tmp_path / "out").failed
    for name in without:
        assert "does not say how large its tiles are" in failed[name]
    for name in (*strange, "broken"):
        assert f"the predictions {tmp_path / name}.h5ad cannot be read" in failed[name]


def test_a_run_lends_its_verdicts_to_what_it_held_out(make_study: Any, tmp_path: Path) -> None:
    study: Study = make_study(3)
    study.stored(stain_shift="off")
    runner = CliRunner()
    run = [
        "train",
        "--embeddings",
        str(study.folder / "store.zarr"),
        "--recipe",
        "mean",
        "--out",
        str(tmp_path / "run"),
    ]
    assert runner.invoke(app, [*run, "--genes", "4"]).exit_code == 0
    done = runner.invoke(app, ["export", str(tmp_path / "run"), "--to", "csv", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1  # a mean follows nothing: no gene is trusted
    assert "none of 4 genes is trusted (0 were not judged)" in done.stderr
    every = ["export", str(tmp_path / "run"), "--to", "csv,qupath", "--out", str(tmp_path / "out"), "--all", "--json"]
    done = runner.invoke(app, every)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert sorted(said["files"]) == ["s0", "s1", "s2"]
    held: NDArray[np.float32] = anndata.read_h5ad(tmp_path / "run/predictions/s1.h5ad").X
    wide = pd.read_csv(tmp_path / "out/s1.csv")
    columns = [name for name in wide if "(untrusted) [" in name]
    assert len(columns) == 4
    assert np.isclose(np.sort(wide[columns].iloc[0]), np.sort(held[0]), rtol=1e-5).all()
