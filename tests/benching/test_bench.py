"""Encoders side by side on a pilot: the same spots for each, the figures of train, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import yaml

from nh2st_pipe.benching.pilot import _patches, _spread, make_pilot
from nh2st_pipe.benching.run import bench
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.evaluation.compare import compare
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.encoder import EncoderRecipe, load_encoder_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest
from nh2st_pipe.tiles.spots import Spots
from tests.cli.test_commands import call
from tests.conftest import Study, grid_positions


def another(name: str, **changes: Any) -> EncoderRecipe:
    return load_encoder_recipe("fake").model_copy(update={"name": name, **changes})


def rows(patients: list[str]) -> list[SlideRow]:
    return [SlideRow(f"s{i}", Path("s.png"), Path("e.h5ad"), patient) for i, patient in enumerate(patients)]


def test_slides_are_drawn_patient_after_patient() -> None:
    drawn = _spread(rows(["A"] * 6 + ["B", "C"]), 4, np.random.default_rng(0))
    assert [row.patient for row in drawn] == ["A", "A", "B", "C"]
    assert _spread(rows(["A", "A", "B"]), 3, np.random.default_rng(0)) == rows(["A", "A", "B"])


def test_spots_are_drawn_in_patches_far_apart() -> None:
    xy, grid = grid_positions(40, 10.0)
    spots = Spots([f"b{i}" for i in range(1600)], xy, grid[:, 0], grid[:, 1])
    kept = _patches(spots, 250, np.random.default_rng(3))
    assert len(set(kept.tolist())) == 250
    near = (np.linalg.norm(xy[kept][:, None] - xy[kept][None], axis=2) < 10.1).sum(1) - 1
    assert near.mean() > 3  # of four; spots drawn alone would have 0.6
    assert np.ptp(xy[kept], axis=0).min() > 200
    assert _patches(spots, 1600, np.random.default_rng(3)).tolist() == list(range(1600))


def test_encoders_are_compared_on_the_same_spots(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(n_slides=4, side=6, patients=["A", "A", "B", "C"])
    encoders = [load_encoder_recipe("fake"), another("small", dim=24)]
    found = bench(study.manifest, encoders, pilot=25, genes=6, out=tmp_path / "b", tile_px=48)
    assert found.left_out == {}
    assert "returned (96,) values per tile and its recipe says 24" in found.failed["small"]
    assert (found.spots, found.slides, found.unit) == (100, 4, "patient")
    assert found.rows[0]["encoder"] == "fake"
    (folder,) = (tmp_path / "b").glob("pilot-*")
    spots = [open_store(folder / f"{name}.zarr").read("s1").barcodes for name in ("fake",)]
    assert len(spots[0]) == 25
    of = anndata.read_h5ad(study.folder / "s1.h5ad")
    counts = open_store(folder / "fake.zarr").read("s1").counts
    assert counts is not None
    assert np.array_equal(counts.toarray(), of[spots[0]].X.toarray())
    row = found.rows[0]
    assert row["pcc"] == compare([folder / "fake.run"]).rows[0]["pcc"]
    assert row["low"] <= row["pcc"] <= row["high"]
    assert row["tiles"] == 4 * 36
    assert row["hours"] == pytest.approx(144 / row["tiles_per_second"] / 3600)
    assert json.loads((tmp_path / "b" / "bench.json").read_text())["rows"] == found.rows


def test_the_best_encoder_is_first_and_one_without_a_figure_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nh2st_pipe.benching import run
    from nh2st_pipe.evaluation.compare import Comparison

    pcc: dict[str, float | None] = {"worse": 0.1, "none": None, "best": 0.3}

    def compared(paths: list[Path]) -> Comparison:
        rows = [{"head": p.name, "pcc": pcc[p.name], "interval": None, "verdict": ""} for p in paths]
        return Comparison("", "slide", 3, 5, rows)

    monkeypatch.setattr(run, "compare", compared)
    found = run.Benched(tmp_path)
    assert (found.spots, found.slides, found.rows) == (0, 0, [])
    run._compare(found, {name: Path(name) for name in pcc})
    assert [row["encoder"] for row in found.rows] == ["best", "worse", "none"]


def test_an_interval_is_said_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nh2st_pipe.benching.run import Benched
    from nh2st_pipe.cli.benching import _say

    row = {"encoder": "a", "dim": 8, "pcc": 0.25, "low": 0.2, "high": 0.3, "behind": 0.0, "verdict": "best"}
    row |= {"behind_low": None, "behind_high": None, "tiles_per_second": None, "hours": None, "commercial": True}
    other = {**row, "encoder": "b", "low": None, "high": None}
    _say(Benched(tmp_path, rows=[row, other]))
    one, two = capsys.readouterr().out.splitlines()[2:4]
    assert one.split()[:5] == ["a", "8", "0.2500", "0.2000", "to"]
    assert two.split()[:4] == ["b", "8", "0.2500", "–"]


def test_what_is_there_is_not_done_again_and_a_failure_is_named(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    study = make_study(n_slides=3, side=5)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**yaml.safe_load(files.find("stages/embed", "fake").read_text()), "name": "mine"}))
    (study.folder / "s2.h5ad").write_bytes(b"nothing")
    arguments = ["bench", "--slides", str(study.manifest), "--encoders", f"{mine}, uni2-h,fake", "--pilot", "16"]
    arguments += ["--out", str(tmp_path / "b"), "--tile-px", "48", "--genes", "5"]
    first = call(*arguments)
    assert first.returncode == 1
    assert "failed: uni2-h: pytorch_model.bin of MahmoodLab/UNI2-h is not in the local cache" in first.stderr
    assert "failed: s2: " in first.stderr
    assert "32 spots of 2 slides; PCC: mean over patients" in first.stdout
    assert "too few to rule out chance" in first.stdout
    speeds = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*.zarr/log.jsonl")}
    assert len(speeds) == 2
    again = json.loads(call(*arguments, "--json").stdout)
    assert set(again["failed"]) == {"uni2-h"}, again["failed"]
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*.zarr/log.jsonl")} == speeds
    assert set(again["left_out"]) == {"s2"}
    both = {row["encoder"]: row for row in again["rows"]}
    assert set(both) == {"mine", "fake"}
    assert both["mine"]["pcc"] == both["fake"]["pcc"]  # the same encoder under two names
    assert again["rows"][1]["verdict"] == "ahead on 0 of 2 patients; too few to rule out chance"
    assert again["rows"][1]["behind"] == 0


def test_tiles_of_the_whole_study_are_counted_for_each_encoders_own_tile(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study(n_slides=3, side=6)
    lines = study.manifest.read_text().splitlines()
    lines[3] = lines[3].replace("s2.h5ad", "")  # a slide without expression: a grid
    lines = [lines[0] + ",mpp"] + [line + ",1" for line in lines[1:]]
    study.manifest.write_text("\n".join(lines) + "\n")
    found = bench(
        study.manifest,
        [another("coarse", mpp=2.0), another("fine", mpp=0.5)],
        pilot=20,
        genes=5,
        out=tmp_path / "b",
    )
    tiles = {row["encoder"]: row["tiles"] for row in found.rows}
    assert tiles["fine"] - 72 > 4 * (tiles["coarse"] - 72) > 0
    assert found.slides == 2
    assert not [note for note in found.notes if note.startswith("tiles of the whole manifest")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": []}, "give encoders to compare"),
        ({"encoders": ["fake", "fake"]}, "each once"),
        ({"weights": {"faek": "x"}}, "there are weights for faek, and the encoders are fake"),
        ({"pilot": 0}, "at least one spot"),
        ({"tile_px": 2.0}, "--tile-px takes"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(
    study: Study, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench(study.manifest, **{"encoders": ["fake"], "out": tmp_path / "b", **changes})
    assert not (tmp_path / "b").exists()


def test_weights_are_given_by_name(study: Study) -> None:
    asked = call("bench", "--slides", str(study.manifest), "--encoders", "fake", "--weights", "w.safetensors")
    assert asked.returncode == 2
    assert "--weights takes NAME=FILE here" in asked.stderr


def test_a_study_without_expression_has_nothing_to_judge_by(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(expression=False)
    with pytest.raises(UsageError, match="none of the slides has expression"):
        make_pilot(read_manifest(study.manifest), tmp_path, 10, 5, 0)
