"""Sweeps: every combination a run of its own, cut short and gone on with; and runs made again, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import polars as pl
import pytest
import yaml

import nh2st_pipe
from nh2st_pipe.core.errors import RecipeError, RunError, UsageError
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.runs.checksums import write_sums
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.training.repeat import _alike, repeat
from nh2st_pipe.training.run import train
from nh2st_pipe.training.sweep import _cells, parse_grid, sweep
from tests.cli.test_commands import call
from tests.conftest import Study


@pytest.fixture
def store(study: Study) -> Path:
    study.stored()
    return study.folder / "store.zarr"


GRID = {"head.alpha": [10, 1000], "targets.smooth": ["none", "grid8"]}


def test_a_grid_is_read_as_it_is_written() -> None:
    assert parse_grid(["head.alpha=1,2.5, 1e3", "head.sigmas=[1],[1, 2],[]", "targets.smooth=none,mean"]) == {
        "head.alpha": [1, 2.5, "1e3"],  # YAML's numbers have a point before an exponent
        "head.sigmas": [[1], [1, 2], []],
        "targets.smooth": ["none", "mean"],
    }
    for text, message in (
        ("head.alpha", "takes key=a,b,c"),
        ("=1", "takes key=a,b,c"),
        ("a=[1", "are not YAML values"),
        ("a=1,1", "a value is there twice"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_grid([text])
    with pytest.raises(UsageError, match="'a' is given twice"):
        parse_grid(["a=1", "a=2"])


def test_every_cell_is_a_run_and_the_table_holds_them_all(store: Path, tmp_path: Path) -> None:
    found = sweep("ridge", store, GRID, genes=6, out=tmp_path / "s", settings=["choose={}"])
    assert (len(found.done), found.kept, found.failed) == (4, [], {})
    names = {f"head.alpha={alpha},targets.smooth={smooth}" for alpha in (10, 1000) for smooth in ("none", "grid8")}
    assert set(found.done) == names
    for name in names:
        recipe = yaml.safe_load((tmp_path / "s" / name / "recipe.yaml").read_text())
        assert name == f"head.alpha={recipe['head']['alpha']:g},targets.smooth={recipe['targets']['smooth']}"
        assert recipe["baselines"] == []
    alone = train(
        store, recipe="ridge", genes=6, out=tmp_path / "a", settings=["choose={}", "head.alpha=10", "baselines=[]"]
    )
    assert (
        read_metrics(tmp_path / "s" / "head.alpha=10,targets.smooth=grid8")["summary"]["pcc"]
        == alone.metrics["summary"]["pcc"]
    )
    assert [row["pcc"] for row in found.rows] == sorted((row["pcc"] for row in found.rows), reverse=True)
    table = pl.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["cell"].to_list() == [row["cell"] for row in found.rows]
    assert set(table.columns) >= {"head.alpha", "targets.smooth", "pcc", "mse", "version", "failed"}
    assert {row["version"] for row in found.rows} == {nh2st_pipe.__version__}
    assert "cells differ in targets.smooth: their figures answer different questions" in found.notes[-2]
    assert "its figure is too good" in found.notes[-1]


def test_a_sweep_that_was_cut_short_goes_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = list[str]()

    def cut(*arguments: Any, out: Path, **options: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(out.name)
        return train(*arguments, out=out, **options)

    monkeypatch.setattr("nh2st_pipe.training.sweep.train", cut)
    options: dict[str, Any] = {"genes": 6, "out": tmp_path / "s", "settings": ["choose={}"]}
    with pytest.raises(KeyboardInterrupt):
        sweep("ridge", store, GRID, **options)
    monkeypatch.setattr("nh2st_pipe.training.sweep.train", train)
    again = sweep("ridge", store, GRID, **options)
    assert (again.kept, len(again.done), len(again.rows)) == (trained, 2, 4)
    more = sweep("ridge", store, {**GRID, "head.alpha": [10, 1000, 30]}, **options)
    assert (len(more.kept), len(more.done)) == (4, 2)


def test_cells_of_another_version_and_cells_that_failed_are_told(store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"genes": 6, "out": tmp_path / "s", "settings": ["choose={}"]}
    sweep("ridge", store, {"head.alpha": [10]}, **options)
    cell = tmp_path / "s" / "head.alpha=10"
    metrics = json.loads((cell / "metrics.json").read_text())
    metrics["software"]["nh2st_pipe"] = "0.0.1"
    (cell / "metrics.json").write_text(json.dumps(metrics))
    write_sums(cell)
    (tmp_path / "s" / "head.alpha=30").mkdir()  # no run: it cannot be read, nor made
    found = sweep("ridge", store, {"head.alpha": [10, 20, 30]}, **options)
    assert any("head.alpha=10 was made by version 0.0.1 of nh2st-pipe" in note for note in found.notes)
    assert [row["cell"] for row in found.rows if row["failed"]] == ["head.alpha=30"]
    table = pl.read_csv(tmp_path / "s" / "sweep.csv")
    assert dict(table.select("cell", "version").iter_rows())["head.alpha=10"] == "0.0.1"
    assert "is not a finished run" in table.filter(pl.col("cell") == "head.alpha=30")["failed"].item()


def test_cells_of_another_question_are_not_mixed_in(store: Path, study: Study, tmp_path: Path) -> None:
    options: dict[str, Any] = {"genes": 6, "out": tmp_path / "s"}
    grid = {"head.alpha": [10]}
    sweep("ridge", store, grid, settings=["choose={}"], **options)
    with pytest.raises(RunError, match="was made with other recipe; give another --out"):
        sweep("ridge", store, grid, settings=["choose={}", "seed=3"], **options)
    shutil.copy(study.folder / "s1.h5ad", study.folder / "s0.h5ad")
    study.stored()
    with pytest.raises(RunError, match="was made with other slides"):
        sweep("ridge", store, grid, settings=["choose={}"], **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(RunError, match="holds something that is no sweep"):
        sweep("ridge", store, grid, out=tmp_path / "mine")


@pytest.mark.parametrize(
    ("grid", "options", "kind", "message"),
    [
        ({"head.alfa": [1]}, {}, RecipeError, "cell head.alfa=1: .*did you mean 'head.alpha'"),
        ({"head.alpha": [1, "x"]}, {}, RecipeError, "cell head.alpha=x: .*alpha"),
        ({"head.alpha.x": [1]}, {}, UsageError, "'alpha' is a value, not a group of keys"),
        ({"head.alpha": [1, "1"]}, {}, UsageError, "a value is there twice, in head.alpha=1"),
        ({}, {}, UsageError, "a sweep varies something"),
        ({"head.alpha": []}, {}, UsageError, "a sweep varies something"),
        ({"head.alpha": [1]}, {"folds": "none"}, UsageError, "--folds none judges nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_cell(
    store: Path, tmp_path: Path, grid: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sweep("ridge", store, grid, out=tmp_path / "s", settings=["choose={}"], **options)
    assert not (tmp_path / "s").exists()


def test_cells_of_keys_that_end_alike_are_not_taken_for_each_other() -> None:
    """One folder may hold both: a cell that is there is kept by its name."""
    base = load_train_recipe("nh2st-context")
    names = [set(_cells(base, {f"head.{part}.low_count": [0, 0.4]})) for part in ("kernel", "network")]
    assert len(names[0] | names[1]) == 4


def test_a_cell_that_fails_is_named_and_the_others_are_trained(store: Path, tmp_path: Path) -> None:
    done = call(
        *("sweep", "ridge-context", "--embeddings", store, "--grid", "features.neighbours=4,99", "--genes", "6"),
        *("--out", tmp_path / "s", "--set", "choose={}"),
    )
    assert done.returncode == 1
    assert "failed: features.neighbours=99: features.neighbours is 99" in done.stderr
    assert "1 cells trained, 0 were there, 1 failed" in done.stdout
    assert "features.neighbours=4" in done.stdout


@pytest.mark.parametrize("recipe", ["ridge-context", "nh2st"])
def test_a_run_is_made_again_bit_for_bit(store: Path, tmp_path: Path, recipe: str) -> None:
    settings = ["fit.epochs=2", "baselines=[]"] if recipe == "nh2st" else ["baselines=[]"]
    train(store, recipe=recipe, genes=5, seed=7, out=tmp_path / "a", settings=settings)
    done = call("train", "--repeat", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert f"the same as {tmp_path / 'a'} bit for bit: model and 3 predictions" in done.stdout
    assert (tmp_path / "a-repeat" / "recipe.yaml").read_bytes() == (tmp_path / "a" / "recipe.yaml").read_bytes()


def test_predictions_are_the_same_only_if_every_layer_and_column_is(store: Path, tmp_path: Path) -> None:
    run = train(store, recipe="ridge", genes=5, out=tmp_path / "a", settings=["baselines=[]"])
    one, two = run.path / "predictions" / "s0.h5ad", tmp_path / "two.h5ad"
    for where in ("", "X", "layers", "obs", "var"):
        data = anndata.read_h5ad(one)
        if where == "X":
            data.X[3, 2] += 1e-4
        elif where == "layers":
            data.layers["target"][3, 2] += 1e-4
        elif where:
            getattr(data, where)["more"] = 1.0
        data.write_h5ad(two)
        assert _alike(one, two) is (where == "")


def test_what_an_earlier_version_scaled_over_is_scaled_over_again(store: Path, tmp_path: Path) -> None:
    train(store, recipe="ridge", genes=5, out=tmp_path / "a", settings=["baselines=[]", "targets.scale_over=panel"])
    kept = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    del kept["targets"]["scale_over"]  # as that version kept it
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump(kept))
    write_sums(tmp_path / "a")
    assert repeat(tmp_path / "a").other == []


def test_a_sweep_says_what_holds_for_all_of_its_cells(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(2, patients=["P", "P"])
    study.stored()
    options: dict[str, Any] = {"genes": 5, "out": tmp_path / "s", "settings": ["choose={}"]}
    found = sweep("ridge", study.folder / "store.zarr", {"head.alpha": [10, 20]}, **options)
    assert "all 2 slides are of one patient" in found.notes[0]


def test_a_run_that_comes_out_otherwise_is_said_to_and_why(store: Path, study: Study, tmp_path: Path) -> None:
    train(store, recipe="ridge", genes=5, out=tmp_path / "a", settings=["baselines=[]"])
    shutil.copy(study.folder / "s1.h5ad", study.folder / "s0.h5ad")
    study.stored()
    found = repeat(tmp_path / "a", out=tmp_path / "b")
    assert "model/model.safetensors" in found.other
    assert found.reasons == ["versions, device and slides are the same: the numbers in the store may be others"]
    study.manifest.write_text("\n".join(study.manifest.read_text().splitlines()[:-1]) + "\n")
    study.embed(store=study.folder / "less.zarr")
    done = call(
        "train", "--repeat", tmp_path / "a", "--embeddings", study.folder / "less.zarr", "--out", tmp_path / "c"
    )
    assert done.returncode == 1
    assert "not the same as" in done.stdout
    assert "note: slides were 3, and are 2" in done.stdout
    refused = call("train", "--repeat", tmp_path / "a", "--seed", "3")
    assert refused.returncode == 2
    assert "leave them out" in refused.stderr
    assert call("train").returncode == 2
    record = json.loads(call("train", "--repeat", tmp_path / "b", "--out", tmp_path / "d", "--json").stdout)
    assert record["repeat"]["other"] == []
