"""An encoder on several devices, a process each: here two of the CPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nh2st_pipe.core.devices import every_device
from nh2st_pipe.core.errors import EncoderError, NH2STError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.embedding.devices import DeviceEncoders
from nh2st_pipe.embedding.summary import EmbedSummary, merge
from nh2st_pipe.store.read import open_store
from tests.conftest import Study
from tests.store.same import same


class Striking(Progress):
    """Calls `strike` with the processes that encode when a few tiles are done, once, and keeps what is said."""

    def __init__(self, strike: Callable[[list[int]], None]) -> None:
        self._strike, self.said, self.struck = strike, list[str](), False

    def advance(self, done: float, total: float, now: str = "") -> None:
        if done >= 10 and not self.struck:
            self.struck = True
            every = [each for each in gc.get_objects() if type(each) is DeviceEncoders and not each._ending]
            (encoders,) = every
            self._strike([seat.process.pid or 0 for seat in encoders._seats])

    def say(self, text: str) -> None:
        self.said.append(text)


def test_tiles_are_shared_and_every_one_is_encoded_once(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(5)
    study.embed(store=study.folder / "alone.zarr", views=8)
    (study.folder / "s3.png").write_text("no image")
    summary = study.embed(views=8, device="cpu,cpu")
    assert summary.encoded_tiles == 4 * 25
    assert sorted(summary.done) == ["s0", "s1", "s2", "s4"]
    assert summary.kept == []
    assert set(summary.failed) == {"s3"}
    assert summary.settings["device"] == "cpu,cpu"
    assert len(summary.busy["encoders"]) == 2
    assert min(summary.busy["encoders"]) > 0
    again = study.embed(views=8)
    assert (again.encoded_tiles, sorted(again.kept)) == (0, ["s0", "s1", "s2", "s4"])
    (study.folder / "s3.png").write_bytes((study.folder / "s2.png").read_bytes())
    monkeypatch.delattr(os, "memfd_create")  # without memory that processes share, tiles are sent
    assert study.embed(views=8, device="cpu,cpu").done == ["s3"]
    assert same(study.folder / "alone.zarr", study.folder / "store.zarr", but=("s3",))


def test_a_process_that_is_killed_is_taken_over_from_within_a_slide(make_study: Callable[..., Study]) -> None:
    study = make_study(1)
    study.embed(store=study.folder / "alone.zarr")
    progress = Striking(lambda pids: os.kill(pids[0], signal.SIGKILL))
    summary = study.embed(device="cpu,cpu", batch_size=1, readers="processes", progress=progress)
    assert progress.struck
    assert [words for words in progress.said if "was killed by signal 9" in words and "the others take over" in words]
    assert summary.failed == {}
    assert same(study.folder / "alone.zarr", study.folder / "store.zarr")


def test_when_the_end_is_asked_for_all_processes_keep_what_they_have(make_study: Callable[..., Study]) -> None:
    study = make_study(6)
    progress = Striking(lambda pids: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        study.embed(device="cpu,cpu", batch_size=1, progress=progress)
    store = open_store(study.folder / "store.zarr")
    kept = sum(
        record.state.rows + record.state.partial
        for record in (store.record(f"s{i}") for i in range(6))
        if record is not None
    )
    assert kept >= 10
    assert study.embed().encoded_tiles == 6 * 25 - kept
    assert multiprocessing.active_children() == []


def test_when_all_processes_are_gone_what_was_encoded_is_kept(make_study: Callable[..., Study]) -> None:
    study = make_study(1)

    def strike(pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EncoderError, match=r"no process with the encoder is left: that for cpu was killed by signal 9"):
        study.embed(device="cpu,cpu", batch_size=1, progress=Striking(strike))
    record = open_store(study.folder / "store.zarr").record("s0")
    assert record is not None
    kept = record.state.rows + record.state.partial
    assert kept >= 10
    assert study.embed().encoded_tiles == 25 - kept


def test_what_no_process_can_do_is_raised_before_there_is_a_store(study: Study, lite0_weights: Path) -> None:
    with pytest.raises(EncoderError, match="does not fit encoder resnet18"):
        study.embed(encoder="resnet18", weights=lite0_weights, device="cpu,cpu")
    assert not (study.folder / "store.zarr").exists()


def test_a_fault_of_more_than_one_slide_ends_all_processes(study: Study) -> None:
    from nh2st_pipe.recipes.encoder import load_encoder_recipe

    wrong = load_encoder_recipe("fake").model_copy(update={"dim": 7})
    with pytest.raises(NH2STError, match="its recipe says 7"):
        study.embed(encoder=wrong, device="cpu,cpu")


def test_a_script_needs_no_guard(study: Study) -> None:
    script = study.folder / "script.py"
    script.write_text(
        "import sys\nfrom nh2st_pipe.embedding.run import embed\n"
        "done = embed(sys.argv[1], encoder='fake', store=sys.argv[2], tile_px=48, device='cpu,cpu')\n"
        "print(done.encoded_tiles, sys.modules['__main__'].__file__)\n"
    )
    command = [sys.executable, str(script), str(study.manifest), str(study.folder / "store.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["75", str(script)], done.stderr


def test_auto_takes_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert every_device("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert every_device("cuda:2,cuda:0") == ["cuda:2", "cuda:0"]
    assert every_device("cuda") == ["cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert every_device("auto") == ["auto"]


def test_what_one_finished_the_others_did_not_keep() -> None:
    def part(**values: Any) -> EmbedSummary:
        made = EmbedSummary("s", **values)
        made.seconds = {"encoder": 4.0, "opening": 0.5, "reading": 0.5, "writing": 1.0}
        made.busy = {"main": [0.5], "readers": [0.9, 0.7]}
        return made

    whole = EmbedSummary("s", kept=["z"])
    merge(
        whole,
        [
            part(encoded_tiles=30, done=["a"], kept=["b", "c"], failed={"d": "no", "e": "gone"}),
            part(encoded_tiles=30, done=["b", "e"], kept=["a", "c"], failed={"d": "no"}, notices=["b: n"]),
        ],
    )
    assert (whole.done, whole.kept, whole.failed) == (["a", "b", "e"], ["z", "c"], {"d": "no"})
    assert whole.notices == ["b: n"]
    assert whole.busy == {"main": [0.5, 0.5], "readers": [0.9, 0.7, 0.9, 0.7]}
    assert whole.tiles_per_second == pytest.approx(10)
