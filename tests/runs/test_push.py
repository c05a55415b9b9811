"""A head on the hub: one commit, that can be loaded again; no name of a patient and no embedding of a tile unasked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import HubError, RunError, UsageError
from nh2st_pipe.prediction import predict
from nh2st_pipe.runs.about import hidden
from nh2st_pipe.runs.push import push
from nh2st_pipe.training.run import train
from tests.conftest import Study
from tests.hub import COMMIT, Hub, standing_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    study = make_study(3, patients=["Miller", "Smith", "Jones"])
    study.stored(stain_shift="off")
    return study


def trained(study: Study, recipe: str = "ridge") -> Path:
    run = study.folder / f"run-{recipe}"
    train(study.folder / "store.zarr", recipe=recipe, out=run, genes=6)
    return run


def test_a_head_is_pushed_in_one_commit_and_loaded_again(study: Study, hub: Hub, tmp_path: Path) -> None:
    run = trained(study)
    done = push(run, "lab/her2", private=True)
    assert done.model == f"hf-hub:lab/her2@{COMMIT}"
    (commit,) = hub.commits
    files = hub.repos["lab/her2"]
    there = {"README.md", "SHA256SUMS", "config.json", "model.safetensors"}
    assert (set(files), set(commit["files"]), set(done.files)) == (there,) * 3
    assert hub.private == {"lab/her2"}
    assert commit["message"].startswith("ridge by nh2st-pipe")
    listed = dict(line.split("  ")[::-1] for line in files["SHA256SUMS"].decode().splitlines())
    assert listed == {name: hashlib.sha256(files[name]).hexdigest() for name in there - {"README.md", "SHA256SUMS"}}
    store = study.folder / "store.zarr"
    there_again = predict(done.model, embeddings=store, out=tmp_path / "hub")
    here = predict(run, embeddings=store, out=tmp_path / "here")
    for slide in ("s0", "s1", "s2"):
        a, b = (_values(summary.files[slide]) for summary in (there_again, here))
        np.testing.assert_array_equal(a, b)
    assert any("trained on this slide" in each for each in there_again.notices)


def _values(path: Path) -> Any:
    import anndata

    return anndata.read_h5ad(path).X


def test_no_name_of_a_slide_or_patient_goes_along_and_they_are_known_again(study: Study, hub: Hub) -> None:
    push(trained(study), "lab/her2")
    said = b"".join(hub.repos["lab/her2"].values())
    for name in ("Miller", "Smith", "Jones", '"s0"', '"s1"'):
        assert name.encode() not in said
    config = json.loads(hub.repos["lab/her2"]["config.json"])
    assert {slide["patient"] for slide in config["about"]["trained_on"]} == {
        hidden(n) for n in ("Miller", "Smith", "Jones")
    }
    from nh2st_pipe.runs.about import About

    seen = About.of(config["about"], "hub").seen()
    assert seen.words("", "Smith") == "trained on other slides of patient Smith"
    assert seen.words("", "Smithson") is None


def test_the_card_says_what_the_hub_and_people_ask(study: Study, hub: Hub) -> None:
    push(trained(study), "lab/her2", dataset="lab/benchmark", task="her2")
    card = hub.repos["lab/her2"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "nh2st-pipe"
    assert front["license"] == "apache-2.0"  # of the fake encoder
    assert front["datasets"] == ["lab/benchmark"]
    assert "hf-hub:lab/her2" in card
    assert "OWNER/NAME" not in card
    for part in ("| ridge |", "| mean |", "Licence of the encoder: Apache-2.0", "Intervals, by leaving out one of 3"):
        assert part in card
    (result,) = yaml.safe_load(hub.repos["lab/her2"][".eval_results/nh2st-pipe.yaml"])
    metrics = json.loads((study.folder / "run-ridge/metrics.json").read_text())
    assert result["dataset"] == {"id": "lab/benchmark", "task_id": "her2"}
    assert result["value"] == pytest.approx(metrics["summary"]["pcc"], abs=1e-4)


def test_a_card_that_is_there_stays_and_so_does_one_that_was_written_by_hand(study: Study, hub: Hub) -> None:
    run = trained(study)
    (run / "model/README.md").write_text("mine: OWNER/NAME")
    push(run, "lab/new")
    assert hub.repos["lab/new"]["README.md"] == b"mine: lab/new"
    hub.repos["lab/old"] = {"README.md": b"theirs"}
    done = push(run, "lab/old")
    assert hub.repos["lab/old"]["README.md"] == b"theirs"
    assert "README.md" not in done.files
    assert "has a card, which stays" in done.notices[0]


def test_embeddings_of_training_tiles_go_along_where_that_is_asked_for(study: Study, hub: Hub) -> None:
    ridge = trained(study)
    assert "reference.safetensors" not in push(ridge, "lab/ridge").files
    assert "reference.safetensors" in push(ridge, "lab/ridge", with_reference=True).files
    for recipe in ("knn", "nh2st-context"):
        run = study.folder / f"run-{recipe}"
        few = ["head.network.epochs=1"] if recipe == "nh2st-context" else []
        train(study.folder / "store.zarr", recipe=recipe, out=run, genes=6, folds="none", settings=few)
        with pytest.raises(RunError, match=r"hold embeddings of 75 training tiles.*--with-reference"):
            push(run, f"lab/{recipe}")
        assert f"lab/{recipe}" not in hub.repos
        assert "reference.safetensors" in push(run, f"lab/{recipe}", with_reference=True).files


def test_somebody_elses_repository_gets_a_proposal(study: Study, hub: Hub) -> None:
    hub.repos["others/head"] = {}
    run = trained(study)
    done = CliRunner().invoke(app, ["push", str(run), "others/head", "--create-pr", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"].endswith("/discussions/1")
    assert hub.commits[0]["proposed"]
    assert hub.repos["others/head"] == {}


def test_what_cannot_be_pushed_is_said_in_words(study: Study, hub: Hub, tmp_path: Path) -> None:
    run = trained(study)
    for name in ("her2", "a/b/c", "/x", "lab/her2@v1"):
        with pytest.raises(UsageError, match="owner/name is expected"):
            push(run, name)
    with pytest.raises(RunError, match="there is no run at"):
        push(tmp_path / "nothing", "lab/her2")
    hub.refuses = True
    with pytest.raises(HubError, match=r"could not be pushed"):
        push(run, "lab/her2")
    hub.refuses = False
    weights = run / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(RunError, match="has changed since it was written"):
        push(run, "lab/her2")
    assert not hub.commits


def test_a_run_that_was_not_judged_has_nothing_for_a_leaderboard(study: Study, hub: Hub) -> None:
    run = study.folder / "run"
    train(study.folder / "store.zarr", recipe="ridge", out=run, genes=6, folds="none")
    with pytest.raises(RunError, match="judged on nothing"):
        push(run, "lab/her2", dataset="lab/benchmark")
    push(run, "lab/her2")
    assert "Nothing was judged" in hub.repos["lab/her2"]["README.md"].decode()
