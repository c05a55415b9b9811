"""A training that was stopped goes on with the fits that it has, and comes to the same to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from nh2st_pipe.core.children import without_main
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.evaluation.judged import judge
from nh2st_pipe.heads.base import Distribution, Prediction
from nh2st_pipe.heads.carry import Carried, Strength
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.training import side_by_side
from nh2st_pipe.training.fits import Fits
from nh2st_pipe.training.fold import FoldResult, run_fold
from nh2st_pipe.training.run import Run, train
from tests.conftest import Study
from tests.reporting.test_page import page_data

OPTIONS: dict[str, Any] = {"recipe": "ridge", "genes": 6, "settings": ["baselines=[mean]", "choose={}"]}


@pytest.fixture
def store(study: Study) -> Path:
    study.stored(views=1)
    return study.folder / "store.zarr"


def counted(monkeypatch: pytest.MonkeyPatch, on: Callable[[int], None] = lambda n: None) -> list[str]:
    """Heads and folds as they are fitted; `on(n)` before the nth."""
    fitted: list[str] = []
    real = run_fold

    def fit(task: Any, *rest: Any) -> FoldResult:
        on(len(fitted) + 1)
        result = real(task, *rest)
        fitted.append(f"{task.recipe.name} {task.fold.name}")
        return result

    monkeypatch.setattr(side_by_side, "run_fold", fit)
    return fitted


def interrupt(at: int) -> Callable[[int], None]:
    def on(number: int) -> None:
        if number == at:
            raise KeyboardInterrupt

    return on


def same(one: Run, two: Run) -> None:
    for name in ("s0", "s1", "s2"):
        a, b = (anndata.read_h5ad(run.path / "predictions" / f"{name}.h5ad") for run in (one, two))
        assert np.array_equal(a.X, b.X)
        assert np.array_equal(a.layers["target"], b.layers["target"])
    assert (one.path / "per_gene.csv").read_bytes() == (two.path / "per_gene.csv").read_bytes()
    weights = "model/model.safetensors"
    assert (one.path / weights).read_bytes() == (two.path / weights).read_bytes()
    names = [sorted(path.name for path in run.path.iterdir() if path.name != ".lock") for run in (one, two)]
    assert names[0] == names[1]  # the lock goes after the run has its name: killed between the two, it stays


def test_the_same_command_goes_on_with_what_is_finished(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(store, out=tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        counted(patch, interrupt(5))
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(store, out=tmp_path / "run", **OPTIONS)
    assert stopped.value.__notes__ == ["4 finished fits are kept, and the same command goes on"]
    warning = page_data(report(tmp_path / "run"))["warnings"][0]
    assert "This run was interrupted" in warning
    assert "the same command goes on with it" in warning
    assert "still to be trained: mean 2" in warning
    with monkeypatch.context() as patch:
        fitted = counted(patch)
        again = train(store, out=tmp_path / "run", **OPTIONS)
    assert fitted == ["mean P1", "mean P2"]
    same(again, whole)
    assert again.metrics["summary"]["pcc"] == whole.metrics["summary"]["pcc"]
    assert not list(tmp_path.glob("*.part"))


def test_killed_after_a_fit_it_goes_on(store: Path, tmp_path: Path) -> None:
    small = ["head.network.epochs=1", "head.network.members=1", "carry.rank=2"]
    options = {**OPTIONS, "recipe": "nh2st-context", "settings": ["baselines=[mean]", *small]}
    code = (
        "import os, sys\n"
        "from nh2st_pipe.training import run, side_by_side\n"
        "real, kept = side_by_side.run_fold, []\n"
        "def fit(task, *rest):\n"
        "    if kept: os._exit(9)\n"
        "    kept.append(task)\n"
        "    return real(task, *rest)\n"
        "side_by_side.run_fold = fit\n"
        f"run.train(sys.argv[1], out=sys.argv[2], **{options!r})\n"
    )
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", code, str(store), str(out)], capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr
    (part,) = tmp_path.glob("run.*.part")
    assert len(Fits(part / "fits")) == 1
    whole = train(store, out=tmp_path / "whole", **options)
    same(train(store, out=out, **options), whole)


STEP = int(os.environ.get("NH2ST_PIPE_FAULT_STEP", "79"))
"""Every so many writes of `train` are the last of a process that is killed; 0 tries all of them."""

KILLED = """
import os, sys
store, out, at, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
from nh2st_pipe.training.run import train
seen = 0
def hook(event, of):
    global seen
    if event == "open":
        flags = of[2] if isinstance(of[2], int) else 0
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    if writes and str(of[0]).startswith(os.path.dirname(out)):
        seen += 1
        if seen == at:
            os._exit(9)
sys.addaudithook(hook)
train(store, out=out, **options)
print(seen)
"""
"""Trains in a process that ends at its nth write below a folder: what opens a file to write, makes, moves, deletes."""


@pytest.mark.timeout(3600)
def test_any_write_of_train_may_be_the_last(store: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "settings": ["baselines=[]", "choose={}"]}
    whole = train(store, out=tmp_path / "whole", **options)
    runs = tmp_path / "runs"

    def killed_at(write: int) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(runs, ignore_errors=True)
        command = [sys.executable, "-c", KILLED, str(store), str(runs / "run"), str(write), repr(options)]
        return subprocess.run(command, stdout=-1, text=True)

    writes = int(killed_at(0).stdout.split()[-1])
    assert writes > 40
    for at in range(2, writes + 1, STEP or 1):
        assert killed_at(at).returncode == 9, f"write {at} of {writes} was not reached"
        if not (runs / "run").exists():  # its name is its last word: what comes after it is no part of it
            train(store, out=runs / "run", **options)
        same(Run(runs / "run", read_metrics(runs / "run")), whole)
        assert [path.name for path in runs.iterdir()] == ["run"], f"write {at} of {writes}"


def test_another_question_begins_anew(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        counted(patch, interrupt(3))
        with pytest.raises(KeyboardInterrupt):
            train(store, out=tmp_path / "run", **OPTIONS)
    fitted = counted(monkeypatch)
    train(store, out=tmp_path / "run", **{**OPTIONS, "genes": 5})
    assert len(fitted) == 6
    assert not list(tmp_path.glob("*.part"))


def test_a_kept_fit_that_cannot_be_read_is_made_anew(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counted(patch, interrupt(4))
        with pytest.raises(KeyboardInterrupt):
            train(store, out=tmp_path / "run", **OPTIONS)
    (part,) = tmp_path.glob("run.*.part")
    kept = part / "fits" / "ridge-1.safetensors"
    kept.write_bytes(kept.read_bytes()[:-20])
    with (part / "log.jsonl").open("a") as log:
        log.write('{"event": "fo')
    fitted = counted(monkeypatch)
    again = train(store, out=tmp_path / "run", **OPTIONS)
    assert fitted == ["ridge P1", "mean P0", "mean P1", "mean P2"]
    monkeypatch.undo()
    same(again, train(store, out=tmp_path / "whole", **OPTIONS))


def test_what_had_no_finished_fit_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, interrupt(1))
    with pytest.raises(KeyboardInterrupt):
        train(store, out=tmp_path / "run", **OPTIONS)
    assert list(tmp_path.glob("run*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_strikes_between_two_steps(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Wherever it comes it is heard at the next step, and the fit that was at work is no half of one."""
    before = signal.getsignal(number)
    fitted = counted(monkeypatch, lambda n: signal.raise_signal(number) if n == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        train(store, out=tmp_path / "run", **OPTIONS)
    assert len(fitted) == 3
    (part,) = tmp_path.glob("run.*.part")
    assert len(Fits(part / "fits")) == 3
    assert signal.getsignal(number) is before


def test_blocks_are_joined_from_kept_fits_too(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "folds": "block"}
    with monkeypatch.context() as patch:
        counted(patch, interrupt(4))
        with pytest.raises(KeyboardInterrupt):
            train(store, out=tmp_path / "run", **options)
    same(train(store, out=tmp_path / "run", **options), train(store, out=tmp_path / "whole", **options))


def test_a_fit_is_kept_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, truth = rng.standard_normal((2, 9, 3)).astype(np.float32)
    truth[:, 1] = np.nan
    xy = np.column_stack((np.arange(9.0) % 3, np.arange(9) // 3))
    carried = Carried(Strength(1, 0.5, 0, 1), *(rng.random(n).astype(np.float32) for n in ((2,), 2, 2, (3, 2), 3)))
    said = Prediction(values, values[:, 0], None, carried, Distribution("d", {"rate": values, "k": values[0]}))
    judged = judge(values, truth, xy, slide_id="s", patient="p", genes=["a", "b", "c"], picked=np.array([0, 2]))
    result = FoldResult(
        "ridge", Fold("f", ("t",), ("s",)), ["a", "b", "c"], {"s": said}, {"s": truth}, [judged], 1.5, 3,
        [{"epoch": 1.0, "loss": float("nan")}], {"head.alpha": 3}, {"s": "careful"}, "note",
    )  # fmt: skip
    kept = Fits(tmp_path / "fits")
    kept.keep(result, 0)
    found = kept.find("ridge", 0)
    assert found is not None
    assert repr(found) == repr(result)
    assert found.judged[0].off is not None
    assert judged.off is not None
    assert np.array_equal(found.judged[0].off, judged.off, equal_nan=True)
    assert kept.find("ridge", 2) is None
    with pytest.raises(TypeError, match="holds a set, which cannot be kept"):
        kept.keep(replace(result, chosen={"a": {1}}), 3)
    assert not list((tmp_path / "fits").glob("*3*"))


def test_a_script_needs_no_guard(store: Path, tmp_path: Path) -> None:
    """Side by side, no process runs the caller's script once more, which would never end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import nh2st_pipe\n"
        f"run = nh2st_pipe.train({str(store)!r}, out={str(tmp_path / 'run')!r}, jobs=2, **{OPTIONS!r})\n"
        "print('done once')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, str(script)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, "done once\n"), done.stderr


def test_what_a_script_is_called_is_as_it_was_once_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "script.py", raising=False)
    with without_main():
        assert main.__file__ is None
    assert main.__file__ == "script.py"
    monkeypatch.delattr(main, "__file__")  # read from a pipe
    with without_main():
        pass
    assert not hasattr(main, "__file__")


def test_the_end_is_heard_while_processes_work(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    class Asked(Stop):
        def check(self) -> None:
            heard.append(1)
            if len(heard) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("nh2st_pipe.core.signals.Stop", Asked)
    monkeypatch.setattr(side_by_side, "_LISTEN", 0.01)
    with pytest.raises(KeyboardInterrupt):
        train(store, out=tmp_path / "run", jobs=2, **OPTIONS)
    assert len(heard) == 3
