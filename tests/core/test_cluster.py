"""A pool of actors, on a stand-in of Ray: what is lost is done again, and what fails is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nh2st_pipe.core import cluster
from nh2st_pipe.core.cluster import Pool, Reached
from nh2st_pipe.core.errors import StoreError, TrainError


class Lost(BaseException):
    """An actor is gone, which none of its own code hears of."""


class OutOfMemory(Lost):
    """Ray ended it."""


class InOurCode(Lost):
    """An error of a task."""


class Later:
    def __init__(self, call: Any, *of: Any) -> None:
        self.call, self.of = call, of


class Ray:
    """Does a task when its result is asked for."""

    exceptions = SimpleNamespace(
        RayError=Lost, RayActorError=Lost, OutOfMemoryError=OutOfMemory, RayTaskError=InOurCode
    )

    def __init__(self, placed: bool = True) -> None:
        self.placed, self.made, self.killed = placed, 0, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]

    def remote(self, **resources: Any) -> Any:
        assert resources == {"max_restarts": 0, "num_cpus": 2}

        def start(host: Any, make: Any) -> Any:
            self.made += 1
            actor = host(make)

            def method(name: str) -> Any:
                return SimpleNamespace(remote=lambda *of: Later(getattr(actor, name), *of))

            return SimpleNamespace(do=method("do"), there=method("there"))

        return lambda host: SimpleNamespace(remote=lambda make: start(host, make))

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return (refs[:1], refs[1:]) if self.placed else ([], refs)

    def get(self, ref: Any) -> Any:
        return ref.call(*ref.of)

    def kill(self, handle: Any) -> None:
        self.killed += 1


class Doer:
    """Counts how often each task was begun; some end their process, or say what is wrong."""

    def __init__(self) -> None:
        self.begun = dict[str, int]()

    def do(self, task: str) -> str:
        self.begun[task] = self.begun.get(task, 0) + 1
        if task == "once" and self.begun[task] == 1:
            raise OutOfMemory
        if task == "always":
            raise Lost
        if task == "odd":
            raise StoreError("odd counts")
        if task == "ours":
            raise KeyError("ours")
        return task.upper()


def pool(ray: Ray, doer: Doer, tasks: list[str]) -> Pool:
    return Pool(Reached(ray, "cpu", 2), lambda: doer, len(tasks), "fewer take less")


def test_what_is_lost_is_done_again_and_what_fails_is_told() -> None:
    ray, doer, tasks = Ray(), Doer(), ["a", "once", "always", "odd", "b"]
    found, said, told = dict[int, str](), list[str](), list[int]()
    with pool(ray, doer, tasks) as actors:
        failed = actors.do(tasks, found.__setitem__, lambda done, words: told.append(done), said.append)
    assert found == {0: "A", 1: "ONCE", 4: "B"}
    assert failed == {2: "3 processes ended while they were at it: killed, or out of memory?", 3: "odd counts"}
    assert doer.begun == {"a": 1, "once": 2, "always": 3, "odd": 1, "b": 1}
    assert (
        "the process that was at task 2 is gone (Ray ended it, as its node was out of memory: fewer take less); "
        "another takes over"
    ) in said
    assert (ray.made, told[-1]) == (2 + 4, 5)
    assert ray.killed == ray.made


def test_an_error_of_our_own_ends_it_at_once() -> None:
    with pytest.raises(KeyError, match="ours"), pool(Ray(), Doer(), ["ours", "a"]) as actors:
        actors.do(["ours", "a"], lambda number, result: None, lambda done, words: None)


def test_a_cluster_without_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PLACING_SECONDS", 0.0)
    asked = pytest.raises(TrainError, match=r"could not place an actor with 2 CPUs .*`ray status`")
    with asked, pool(Ray(placed=False), Doer(), ["a", "b"]) as actors:
        actors.do(["a", "b"], lambda number, result: None, lambda done, words: None)
