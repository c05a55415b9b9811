"""Folds as tasks of a Ray cluster: what comes out is what a local run makes, whatever happens to its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import anndata
import numpy as np
import pytest
import torch

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.study import Study as Data
from nh2st_pipe.prediction import predict
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.fits import Fits
from nh2st_pipe.training.fold import run_fold
from nh2st_pipe.training.on_ray import Trainer, TrainingOnRay
from nh2st_pipe.training.run import Run, train
from nh2st_pipe.training.sweep import sweep
from tests.conftest import Study

OPTIONS: dict[str, Any] = {"recipe": "ridge", "genes": 6, "settings": ["baselines=[mean]", "choose={}"]}


@pytest.fixture
def cluster() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as each of two actors has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """At one fold its process is killed, once."""

    def do(self, task: Any) -> Any:
        _, fold = task
        file = Path(fold.store).parent / "killed"
        if (fold.recipe.name, fold.fold.test) == ("ridge", ("s1",)) and not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().do(task)


# On a machine that is busy otherwise Ray takes minutes to start; one cluster at a time.
@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("ray")
def test_what_comes_out_is_what_a_local_run_makes(
    store: Path, tmp_path: Path, cluster: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, as each cluster and each process takes seconds to start."""
    local = train(store, out=tmp_path / "local", **OPTIONS)
    heard = Heard()
    with monkeypatch.context() as patch:
        patch.setattr("nh2st_pipe.training.on_ray.Trainer", Mortal)
        same(train(store, out=tmp_path / "ray", engine="ray", progress=heard, **OPTIONS), local)
    assert [words for words in heard.said if "is gone (killed, or out of memory?); another takes over" in words]
    here = predict(local.path, embeddings=store, out=tmp_path / "here")
    there = predict(local.path, embeddings=store, out=tmp_path / "there", engine="ray")
    assert list(here.files) == list(there.files) == ["s0", "s1", "s2"]
    for name, file in here.files.items():
        one, two = (anndata.read_h5ad(each) for each in (file, there.files[name]))
        assert np.allclose(one.X, two.X, atol=1e-6)
    assert there.notices == here.notices
    with pytest.raises(UsageError, match="the Ray cluster has no GPU"):
        train(store, out=tmp_path / "run", engine="ray", device="cuda", **OPTIONS)


class Odd:
    """Stands for the actors; one task fails, or what is written lies elsewhere."""

    resources: ClassVar = {"num_cpus": 1}

    def __init__(self, study: Study, elsewhere: bool = False, failing: int | None = 1) -> None:
        self._read = Data.load(open_store(study.folder / "store.zarr"), ["s0", "s1", "s2"])
        self._elsewhere, self._failing, self.done = elsewhere, failing, 0

    def do(self, tasks: Sequence[Any], ended: Any, tell: Any, say: Any) -> dict[int, str]:
        for number, (_, task) in enumerate(tasks):
            if number != self._failing:
                ended(number, run_fold(replace(task, write=None) if self._elsewhere else task, self._read))
                self.done += 1
        return {} if self._failing is None else {self._failing: "odd counts"}

    def __exit__(self, *_: object) -> None:
        pass


def test_what_fails_is_told_at_the_end_and_the_rest_is_kept(store: Path, study: Study, tmp_path: Path) -> None:
    cluster = TrainingOnRay(SimpleNamespace(kind="cpu"))  # type: ignore[arg-type]
    cluster._pool = Odd(study)  # type: ignore[assignment]
    with pytest.raises(TrainError, match=r"(?s)1 of 6 fits failed; the others are kept.*\nridge, .*: odd counts"):
        train(store, out=tmp_path / "run", engine=cluster, **OPTIONS)
    (part,) = tmp_path.glob("run.*.part")
    assert len(Fits(part / "fits")) == 5
    cluster._pool = Odd(study, elsewhere=True)  # type: ignore[assignment]
    with pytest.raises(TrainError, match=r"s0\.h5ad was written on another node and is not here"):
        train(store, out=tmp_path / "other", engine=cluster, **OPTIONS)
    assert cluster._pool is None  # what they do is of no use any more


def test_cells_of_a_sweep_share_the_actors(
    store: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = TrainingOnRay(SimpleNamespace(kind="cpu"))  # type: ignore[arg-type]
    actors = Odd(study, failing=None)
    cluster._pool = actors  # type: ignore[assignment]
    asked = list[tuple[Any, ...]]()

    @contextmanager
    def given(*of: Any) -> Iterator[Any]:
        asked.append(of)
        yield cluster if isinstance(of[0], str) else of[0]

    monkeypatch.setattr("nh2st_pipe.training.sweep.training_engine", given)
    options: dict[str, Any] = {"genes": 6, "settings": ["choose={}"]}
    there = sweep("ridge", store, {"head.alpha": [3.0, 3000.0]}, out=tmp_path / "ray", engine="ray", address="x:1",
                  actors=3, **options)  # fmt: skip
    assert asked == [("ray", "auto", "x:1", 3, 1)]
    assert actors.done == 2 * 3
    monkeypatch.undo()
    here = sweep("ridge", store, {"head.alpha": [3.0, 3000.0]}, out=tmp_path / "local", **options)
    figures = [[(row["cell"], row["pcc"]) for row in found.rows] for found in (there, here)]
    assert figures[0] == figures[1]


def test_predictions_that_are_there_are_kept(store: Path, tmp_path: Path) -> None:
    train(store, out=tmp_path / "run", **{**OPTIONS, "settings": ["baselines=[]", "choose={}"]})
    here = predict(tmp_path / "run", embeddings=store, out=tmp_path / "here")
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
    ):
        with pytest.raises(UsageError, match=match):
            train(store, out=tmp_path / "run", **options, **OPTIONS)
