"""A Ray cluster of one machine, with two processors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nh2st_pipe.core.errors import EncoderError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.store.read import open_store
from tests.conftest import Study
from tests.remote import s3_server
from tests.store.same import same

# On a machine that is busy otherwise Ray takes minutes to start; one cluster at a time.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster whose processes find a stand-in of S3; what finds it, too."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    with s3_server() as found:
        ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100 << 20)
        yield found
        ray.shutdown()


def actors() -> list[psutil.Process]:
    """Those of this process's own cluster: other tests may have one, beside it."""
    every = psutil.Process().children(recursive=True)
    return [each for each in every if each.name().startswith(("ray::Slow", "ray::Embedder"))]


class Striking(Progress):
    """Calls `strike` when slides are under way, until it says that it struck, and keeps what is said."""

    def __init__(self, strike: Callable[[], bool]) -> None:
        self._strike = strike
        self.said, self.struck = list[str](), False

    def advance(self, done: float, total: float, now: str = "") -> None:
        if done >= 5 and not self.struck:
            self.struck = self._strike()

    def say(self, text: str) -> None:
        self.said.append(text)


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.embedding.on_ray.Embedder", Slow)
    monkeypatch.setattr("nh2st_pipe.embedding.on_ray._ASK_SECONDS", 0.1)


class _Slow:
    """Stands for an encoder that takes its time, in an actor."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def start(self, *arguments: Any) -> Any:
        time.sleep(0.1)
        return self._encoder.start(*arguments)


def _embedder() -> Any:
    from nh2st_pipe.embedding.on_ray import Embedder

    return Embedder


class Slow(_embedder()):  # type: ignore[misc]
    def embed(self, row: Any) -> Any:
        """Says beside the slide who is at it."""
        at_it = Path(row.slide).with_suffix(".pid")
        at_it.write_text(str(os.getpid()))
        try:
            return super().embed(row)
        finally:
            at_it.unlink(missing_ok=True)

    def load(self) -> BaseException | None:
        fault: BaseException | None = super().load()
        self._encoder: Any = _Slow(self._encoder)
        return fault


def test_a_killed_actors_slides_go_to_another(
    make_study: Callable[..., Study], cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(6, side=4)
    study.embed(store=study.folder / "alone.zarr", stain_shift="off")
    store = "s3://bucket/ray/store.zarr"  # a folder's leases go with the process; these have to be taken over
    slow(monkeypatch)

    def kill() -> bool:
        """One that is at a slide: an actor may have none yet."""
        pids = [int(file.read_text() or 0) for file in study.folder.glob("*.pid")]
        for actor in actors():
            if actor.pid in pids:
                actor.kill()
                return True
        return False

    progress = Striking(kill)
    summary = study.embed(store=store, engine="ray", batch_size=2, stain_shift="off", progress=progress)
    assert progress.struck
    assert [
        words
        for words in progress.said
        if "the process that was at it is gone (killed, or out of memory?); another takes over" in words
    ]
    assert sorted(summary.done) == [f"s{i}" for i in range(6)]
    assert summary.failed == {}
    assert same(study.folder / "alone.zarr", store)
    again = study.embed(store=store, stain_shift="off")
    assert (again.encoded_tiles, len(again.kept)) == (0, 6)


def test_a_slide_that_kills_its_process_is_passed_over(
    make_study: Callable[..., Study], cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(4, side=3)
    monkeypatch.setattr("nh2st_pipe.embedding.on_ray.Embedder", Deadly)
    summary = study.embed(engine="ray", actors=1, stain_shift="off")  # two slides at a time are with it
    assert sorted(summary.done) == ["s0", "s2", "s3"]  # those that were beside it are not blamed
    why = "3 processes ended while they were at it, the last one alone with it: killed, or out of memory?"
    assert summary.failed == {"s1": why}


class Deadly(_embedder()):  # type: ignore[misc]
    def embed(self, row: Any) -> Any:
        if row.slide_id == "s1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(row)


def test_when_the_end_is_asked_for_the_actors_keep_what_they_have(
    make_study: Callable[..., Study], cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(4)
    slow(monkeypatch)

    def end() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    progress = Striking(end)
    with pytest.raises(KeyboardInterrupt):
        study.embed(engine="ray", batch_size=1, progress=progress)
    records = [open_store(study.folder / "store.zarr").record(f"s{i}") for i in range(4)]
    kept = sum(record.state.rows + record.state.partial for record in records if record is not None)
    assert kept >= 5
    assert study.embed().encoded_tiles == 4 * 25 - kept


def test_faults_are_those_of_a_local_run(study: Study, cluster: dict[str, str], lite0_weights: Path) -> None:
    with pytest.raises(EncoderError, match="does not fit encoder resnet18"):
        study.embed(encoder="resnet18", weights=lite0_weights, engine="ray", actors=1)
    assert not (study.folder / "store.zarr").exists()
    (study.folder / "s1.png").write_text("no image")
    summary = study.embed(engine="ray", actors=1)
    assert sorted(summary.done) == ["s0", "s2"]
    assert "not an image" in summary.failed["s1"]
    with pytest.raises(UsageError, match=r"on Ray, --store takes a shared folder or s3://"):
        study.embed(store="memory://store.zarr", engine="ray")
    with pytest.raises(UsageError, match="the Ray cluster has no GPU"):
        study.embed(engine="ray", device="cuda")
    with pytest.raises(UsageError, match="--device takes auto, cuda or cpu, not cuda:1"):
        study.embed(engine="ray", device="cuda:1")


def test_what_is_missing_for_ray_is_said(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--address and --actors are of --engine ray"):
        study.embed(address="auto")
    with pytest.raises(UsageError, match="--engine takes local or ray, not slurm"):
        study.embed(engine="slurm")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs Ray: pip install 'nh2st-pipe\[ray\]'"):
        study.embed(engine="ray")


def test_a_cluster_that_is_not_there_is_named(study: Study) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "nh2st_pipe.cli", "embed", "--slides", str(study.manifest), "--encoder", "fake"]
    command += ["--store", str(study.folder / "store.zarr"), "--engine", "ray", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no Ray cluster can be reached at {address}" in done.stderr
    assert "Traceback" not in done.stderr


class _OutOfMemory:
    """Stands for `ray`; what the actor at s1 says is that its node was out of memory, every time."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def get(self, ref: Any) -> Any:
        found = self._ray.get(ref)
        if isinstance(found, tuple) and "s1" in [*found[0].done, *found[0].kept]:
            raise self._ray.exceptions.OutOfMemoryError("Task was killed")
        return found


def test_an_actor_that_ray_ends_for_memory_is_replaced_and_its_slide_tried_alone(
    study: Study, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.embedding import on_ray

    plain = on_ray.OnRay.__init__

    def short_of_memory(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        self._ray = _OutOfMemory(self._ray)

    monkeypatch.setattr(on_ray.OnRay, "__init__", short_of_memory)
    said = Striking(lambda: True)
    summary = study.embed(engine="ray", actors=1, progress=said)
    assert any("s1: the process that was at it is gone (Ray ended it, as its node was" in words for words in said.said)
    assert set(summary.failed) == {"s1"}
    assert "3 processes ended while they were at it, the last one alone" in summary.failed["s1"]
    assert open_store(study.folder / "store.zarr").slides() == ["s0", "s1", "s2"]


def test_why_an_actor_is_gone_is_said_and_a_fault_of_our_own_code_is_no_death() -> None:
    import ray

    from nh2st_pipe.embedding.on_ray import OnRay

    known: Any = ray.exceptions
    engine = object.__new__(OnRay)
    engine._ray = ray
    for error, words in (
        (known.OutOfMemoryError("it"), "out of memory: fewer --actors, or a smaller --batch-size"),
        (known.ActorDiedError(), "killed, or out of memory?"),
        (known.NodeDiedError("the node is gone"), "the node is gone"),
    ):
        assert words in engine._end_of_a_process(error)
    with pytest.raises(known.RayTaskError):
        engine._end_of_a_process(known.RayTaskError("embed", "a trace", KeyError("x")))
