from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nh2st_pipe.core import errors
from nh2st_pipe.core.errors import DamageError, NH2STError, TrainError, UsageError
from nh2st_pipe.core.machine import cores
from nh2st_pipe.data import study as studies
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training import run as runs
from nh2st_pipe.training import side_by_side
from nh2st_pipe.training.fold import FoldTask
from nh2st_pipe.training.run import train
from nh2st_pipe.training.side_by_side import run_all
from tests.conftest import Study

SMALL = ("head.network.epochs=2", "baselines=[knn, ridge]")


class Fatal(FoldTask):
    """Ends the process that is to work on it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def shared(study: Study) -> studies.Study:
    study.stored(views=8)
    store = open_store(study.folder / "store.zarr")
    return studies.Study.load(store, store.slides(), shared=True)


def figures(metrics: dict[str, Any]) -> dict[str, list[Any]]:
    heads = {metrics["head"]: metrics, **metrics["baselines"]}
    return {name: [fold["pcc"] for fold in head["folds"]] for name, head in heads.items()}


def test_side_by_side_comes_to_what_one_after_another_does(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=8)
    store = study.folder / "store.zarr"
    one = train(store, genes=6, settings=SMALL, out=study.folder / "one").metrics
    seen: list[int] = []
    plain = side_by_side.run_all

    def watched(tasks: Any, loaded: studies.Study, jobs: int, tell: Any, keep: Any) -> Any:
        seen.append(jobs)
        assert loaded.cache.views.is_shared()  # type: ignore[attr-defined]
        return plain(tasks, loaded, jobs, tell, keep)

    monkeypatch.setattr(runs, "run_all", watched)
    two = train(store, genes=6, settings=SMALL, out=study.folder / "two", jobs=2).metrics
    assert seen == [2]
    assert figures(two).keys() == figures(one).keys()
    for head, values in figures(one).items():
        assert figures(two)[head] == pytest.approx(values, abs=1e-4), head


def test_a_killed_process_ends_the_run_and_says_why(study: Study) -> None:
    fold = Fold("s0", ("s1", "s2"), ("s0",))
    recipe = load_train_recipe("ridge", ["targets.genes=5"])
    told: list[str] = []
    with pytest.raises(TrainError, match=r"one of 2 training processes was killed, .* --jobs 1"):
        list(run_all([Fatal("", recipe, fold)] * 2, shared(study), 2, lambda done, words: told.append(words)))
    assert told == ["2 side by side"]


def test_what_a_process_raises_reaches_the_caller(study: Study) -> None:
    recipe = load_train_recipe("ridge", ["targets.genes=[none-such]"])
    tasks = [FoldTask("", recipe, Fold("s0", ("s1", "s2"), ("s0",)))] * 2
    with pytest.raises(TrainError, match="none-such"):
        list(run_all(tasks, shared(study), 2, lambda done, words: None))


def test_no_process_outlives_a_caller_that_gives_up(study: Study) -> None:
    """As it does when it is interrupted: what is under way, for hours perhaps, is ended."""
    fold = Fold("s0", ("s1", "s2"), ("s0",))
    quick, long = (
        load_train_recipe("mlp", ["targets.genes=5", f"head.network.epochs={epochs}"]) for epochs in (1, 1_000_000)
    )
    results = run_all([FoldTask("", each, fold) for each in (quick, long)], shared(study), 2, lambda done, words: None)
    assert next(results).head == "mlp"
    at_work = [child for child in multiprocessing.active_children() if child.is_alive()]
    assert len(at_work) == 2
    results.close()  # type: ignore[attr-defined]
    assert not any(child.is_alive() for child in at_work)


def test_no_more_processes_are_started_than_there_are_tasks(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "ProcessPoolExecutor", None)  # a single task needs none
    task = FoldTask("", load_train_recipe("ridge", ["targets.genes=5", "choose={}"]), Fold("s0", ("s1",), ("s0",)))
    assert [result.head for result in run_all([task], shared(study), 8, lambda done, words: None)] == ["ridge"]
    assert list(run_all([], shared(study), 8, lambda done, words: None)) == []


def test_every_error_survives_the_way_between_processes() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, NH2STError):
            error = kind("x.zarr", "s1", "cut") if kind is DamageError else kind("what went wrong")
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again)) == (kind, str(error))
    assert pickle.loads(pickle.dumps(DamageError("x.zarr", "s1", "cut"))).what == "cut"


def test_processes_are_started_where_it_pays(study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    study.stored(views=8)
    store = open_store(study.folder / "store.zarr")
    recipe = load_train_recipe("ridge")
    names, cpu = store.slides(), torch.device("cpu")
    assert runs._jobs(None, store, names, recipe, cpu) == 1
    assert runs._jobs(3, store, names, recipe, cpu) == 3
    assert runs._jobs(3, store, names, recipe, torch.device("cuda")) == 1
    assert runs._jobs(3, store, names, recipe.model_copy(update={"folds": "none"}), cpu) == 1
    monkeypatch.setattr(runs, "_WORTHWHILE", 75 * 8 * 96)
    assert runs._jobs(None, store, names, recipe, cpu) == cores()
    with pytest.raises(UsageError, match="--jobs takes a number from 1 on, not 0"):
        runs._jobs(0, store, names, recipe, cpu)


def test_too_little_shared_memory_is_said(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory")

    study.stored()
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(TrainError, match=r"do not fit into shared memory .* --jobs 1"):
        train(study.folder / "store.zarr", genes=5, settings=SMALL, out=study.folder / "run", jobs=2)
    assert not list(study.folder.glob("run*"))


def test_processes_start_where_the_folder_of_temporary_files_has_a_long_name(tmp_path: Path) -> None:
    long = tmp_path / ("t" * 90)
    long.mkdir()
    code = (
        "from nh2st_pipe.core.children import fresh_processes\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "context = fresh_processes()\n"
        "print(context.get_start_method(), ProcessPoolExecutor(1, mp_context=context).submit(len, 'abc').result())\n"
    )
    for where, how in ((long, "spawn"), (Path("/tmp"), "forkserver")):
        env = {**os.environ, "TMPDIR": str(where)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.stdout.split() == [how, "3"], done.stderr
