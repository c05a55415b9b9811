"""Folds as tasks of a Ray cluster: what comes out is what a local run makes, whatever happens to its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.prediction import predict
from nh2st_pipe.training.on_ray import Trainer
from nh2st_pipe.training.run import Run, train
from nh2st_pipe.training.sweep import sweep
from tests.conftest import Study

pytestmark = pytest.mark.timeout(1200)  # on a machine that is busy otherwise Ray takes minutes to start

OPTIONS: dict[str, Any] = {"recipe": "ridge", "genes": 6, "settings": ["baselines=[mean]", "choose={}"]}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def store(study: Study) -> Path:
    study.stored(views=1)
    return study.folder / "store.zarr"


class Heard(Progress):
    def __init__(self) -> None:
        self.said = list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)


def same(one: Run, two: Run) -> None:
    for name in ("s0", "s1", "s2"):
        a, b = (anndata.read_h5ad(run.path / "predictions" / f"{name}.h5ad") for run in (one, two))
        assert np.array_equal(a.X, b.X)
    for file in ("model/model.safetensors", "per_gene.csv"):
        assert (one.path / file).read_bytes() == (two.path / file).read_bytes()


class Mortal(Trainer):
    """At one fold its process is killed, once, or something is wrong: as a file says."""

    def do(self, task: Any) -> Any:
        _, fold = task
        if (fold.recipe.name, fold.fold.test) == ("ridge", ("s1",)):
            file = Path(fold.store).parent / "what"
            what = file.read_text()
            if what == "killed":
                file.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            if what:
                raise TrainError(what)
        return super().do(task)


def test_a_killed_worker_changes_nothing_and_what_fails_is_told_at_the_end(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = train(store, out=tmp_path / "local", jobs=2, **OPTIONS)
    monkeypatch.setattr("nh2st_pipe.training.on_ray.Trainer", Mortal)
    what, heard = store.parent / "what", Heard()
    what.write_text("killed")
    same(train(store, out=tmp_path / "ray", engine="ray", progress=heard, **OPTIONS), local)
    assert [words for words in heard.said if "is gone (killed, or out of memory?); another takes over" in words]

    what.write_text("odd counts")
    with pytest.raises(TrainError, match=r"(?s)1 of 6 fits failed; the others are kept.*\nridge, .*: odd counts"):
        train(store, out=tmp_path / "again", engine="ray", **OPTIONS)
    what.write_text("")
    heard = Heard()
    same(train(store, out=tmp_path / "again", engine="ray", progress=heard, **OPTIONS), local)
    assert "5 of 7 fits are kept from before" in heard.said


def test_cells_of_a_sweep_share_the_actors(store: Path, tmp_path: Path) -> None:
    grid = {"head.alpha": [3, 3000]}
    settings = ["choose={}"]
    made = [
        sweep("ridge", store, grid, genes=6, out=tmp_path / name, settings=settings, **how)
        for name, how in (("local", {"jobs": 2}), ("ray", {"engine": "ray"}))
    ]
    figures = [[{k: v for k, v in row.items() if k != "train_seconds"} for row in found.rows] for found in made]
    assert figures[0] == figures[1]


def test_slides_are_predicted_on_ray_and_those_that_are_there_are_kept(store: Path, tmp_path: Path) -> None:
    train(store, out=tmp_path / "run", **{**OPTIONS, "settings": ["baselines=[]", "choose={}"]})
    here = predict(tmp_path / "run", embeddings=store, out=tmp_path / "here")
    there = predict(tmp_path / "run", embeddings=store, out=tmp_path / "there", engine="ray")
    assert list(here.files) == list(there.files) == ["s0", "s1", "s2"]
    for name, file in here.files.items():
        one, two = (anndata.read_h5ad(each) for each in (file, there.files[name]))
        assert np.allclose(one.X, two.X, atol=1e-6)
    assert there.notices == here.notices
    assert any("s0: " in words for words in here.notices)

    before = {name: file.stat().st_mtime_ns for name, file in here.files.items()}
    here.files["s1"].write_bytes(b"cut short")
    heard = Heard()
    again = predict(tmp_path / "run", embeddings=store, out=tmp_path / "here", progress=heard)
    assert [words for words in heard.said if "2 slides were predicted before" in words]
    assert [name for name, file in again.files.items() if file.stat().st_mtime_ns == before[name]] == ["s0", "s2"]
    assert again.notices == here.notices
    anew = predict(tmp_path / "run", embeddings=store, out=tmp_path / "here", level=0.5).files
    assert [name for name, file in anew.items() if file.stat().st_mtime_ns == before[name]] == []


def test_what_cannot_be_done_on_ray_is_said(store: Path, tmp_path: Path) -> None:
    for options, match in (
        ({"engine": "slurm"}, "--engine takes local or ray, not slurm"),
        ({"address": "auto"}, "--address and --actors are of --engine ray"),
        ({"engine": "ray", "jobs": 2}, "--jobs is of --engine local"),
        ({"engine": "ray", "device": "cuda"}, "the Ray cluster has no GPU"),
    ):
        with pytest.raises(UsageError, match=match):
            train(store, out=tmp_path / "run", **options, **OPTIONS)
