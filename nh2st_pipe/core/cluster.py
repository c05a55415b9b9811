"""A Ray cluster: reaching one, and a pool of actors that do tasks which know nothing of each other.

Ray places the actors and says when one is lost; its task goes to another then. A task at which three were lost has
failed, as has one that says why; the others go on.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from nh2st_pipe.core.errors import NH2STError, TrainError, UsageError, sendable
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.machine import cores

__all__ = ["Doer", "Pool", "Reached", "end_of_a_process", "reached", "resources_in_words", "seen_everywhere"]

_OBJECTS = 100 << 20  # bytes of Ray's own store, of a cluster made here; nothing large lies in it
_KNOCK_SECONDS = 10.0
_LOOK_SECONDS = 0.2
_PLACING_SECONDS = 900.0  # a cluster may have to start a node first
_MOST_DEATHS = 3  # of actors with the same task


@contextmanager
def reached(device: str, address: str | None, actors: int | None) -> Iterator[Reached]:
    """Connect to the Ray cluster at `address`, to the one that RAY_ADDRESS names, or to one made on this machine.

    Raises UsageError where Ray is not installed, the cluster cannot be reached, or has no such `device`.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of what it will do one day
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'nh2st-pipe[ray]'") from error
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"on Ray, --device takes auto, cuda or cpu, not {device}: Ray says which GPU is whose")
    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None and "RAY_ADDRESS" not in os.environ:
            options |= {"address": "local", "num_cpus": cores(), "object_store_memory": _OBJECTS}
            options |= {"include_dashboard": False}
        else:
            options |= {"address": address}
        where = address or os.environ.get("RAY_ADDRESS", "this machine")
        try:
            _knock(where)
            ray.init(**options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"no Ray cluster can be reached at {where}: {str(error).splitlines()[0]}; "
                "`ray start --head` starts one, and --address says where it is"
            ) from error
    try:
        yield Reached(ray, device, actors)
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself ends the process then, without a word of why."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


class Reached:
    """A Ray cluster that was reached."""

    def __init__(self, ray: Any, device: str, actors: int | None) -> None:
        self.ray, self.actors = ray, actors
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if device == "cuda" and not gpus:
            raise UsageError("--device cuda: the Ray cluster has no GPU")
        self.kind = "cuda" if gpus and device != "cpu" else "cpu"
        self.slots = gpus if self.kind == "cuda" else max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.most_of_a_node = int(max((resources.get("GPU", 0) for resources in self.nodes), default=0))
        """GPUs of the node that has the most."""

    def share(self, wanted: int) -> tuple[int, dict[str, int]]:
        """Return how many actors there are for so many tasks, and what each of them is given."""
        number = max(1, min(self.actors or self.slots, wanted))
        cpus = 1 if self.kind == "cuda" else max(1, self.slots // number)
        return number, {"num_cpus": cpus, **({"num_gpus": 1} if self.kind == "cuda" else {})}


def seen_everywhere(store: Location, option: str) -> str:
    """Return a store's place as every node knows it. Raises UsageError for one in memory, which `option` names."""
    if store.path is not None:
        return str(store.path.absolute())
    if str(store).startswith("memory://"):
        raise UsageError(f"a store in memory is in one process: on Ray, {option} takes a shared folder or s3://…")
    return str(store)


def end_of_a_process(ray: Any, error: Exception, less: str) -> str:
    """Return in words why an actor is gone; `less` is what takes less memory. Raises `error` where it is our own."""
    known = ray.exceptions
    if isinstance(error, known.RayTaskError):
        raise error
    if isinstance(error, known.OutOfMemoryError):
        return f"Ray ended it, as its node was out of memory: {less}"
    if isinstance(error, known.RayActorError):
        return "killed, or out of memory?"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def resources_in_words(resources: dict[str, int]) -> str:
    """Say what an actor is given."""
    gpus, cpus = resources.get("num_gpus", 0), resources["num_cpus"]
    return "one GPU" if gpus else f"{cpus} CPU{'s' if cpus != 1 else ''}"


class Doer(Protocol):
    """What does tasks in an actor; made there, so that what it holds is read there."""

    def do(self, task: Any) -> Any:
        """Do one."""
        ...


@dataclass
class _Actor:
    handle: Any
    task: int | None = None


class _Host:
    """An actor: makes its doer at the first task, and says what went wrong with one."""

    def __init__(self, make: Callable[[], Doer]) -> None:
        self._make = make
        self._doer: Doer | None = None

    def there(self) -> bool:
        return True

    def do(self, task: Any) -> tuple[Any, BaseException | None]:
        try:
            if self._doer is None:
                self._doer = self._make()
            return self._doer.do(task), None
        except Exception as error:
            return None, sendable(error)


class Pool:
    """Actors that do tasks, one at a time each."""

    def __init__(self, cluster: Reached, make: Callable[[], Doer], tasks: int, less: str) -> None:
        """Have as many as the cluster has room for and there are `tasks`; `less` is what takes less memory."""
        self._ray, self._make, self._less = cluster.ray, make, less
        self.number, self.resources = cluster.share(tasks)
        self._actors: list[_Actor] = []

    def __enter__(self) -> Pool:
        self._actors = [self._new() for _ in range(self.number)]
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []

    def do(
        self,
        tasks: Sequence[Any],
        ended: Callable[[int, Any], None],
        tell: Callable[[int, str], None],
        say: Callable[[str], None] = lambda words: None,
    ) -> dict[int, str]:
        """Do `tasks`; `ended` gets the place of each with its result as soon as it is there. Return why others failed.

        `tell` hears several times a second how many have ended, and may raise to end it. Raises what is no NH2STError.
        """
        waiting, deaths = deque(range(len(tasks))), Counter[int]()
        running, failed, done = dict[Any, _Actor](), dict[int, str](), 0
        self._wait_for_one(tell)
        while waiting or running:
            tell(done, f"{len(running)} at work on Ray")
            for actor in self._actors:
                if actor.task is None and waiting:
                    actor.task = waiting.popleft()
                    running[actor.handle.do.remote(tasks[actor.task])] = actor
            over, _ = self._ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
            for ref in over:
                actor = running.pop(ref)
                number, actor.task = actor.task, None
                assert number is not None
                try:
                    result, fault = self._ray.get(ref)
                except self._ray.exceptions.RayError as error:
                    why = end_of_a_process(self._ray, error, self._less)
                    deaths[number] += 1
                    self._replace(actor)
                    if deaths[number] < _MOST_DEATHS:
                        waiting.appendleft(number)
                        say(f"the process that was at task {number + 1} is gone ({why}); another takes over")
                        continue
                    failed[number] = f"{_MOST_DEATHS} processes ended while they were at it: {why}"
                    done += 1
                    continue
                done += 1
                if fault is None:
                    ended(number, result)
                elif isinstance(fault, NH2STError):
                    failed[number] = str(fault)
                else:
                    raise fault
        tell(done, "")
        return failed

    def _wait_for_one(self, tell: Callable[[int, str], None]) -> None:
        """Wait until an actor is there. Raises TrainError where Ray cannot place any."""
        there, until = [actor.handle.there.remote() for actor in self._actors], time.monotonic() + _PLACING_SECONDS
        while not self._ray.wait(there, num_returns=1, timeout=_LOOK_SECONDS)[0]:
            tell(0, "waiting for a place on Ray")
            if time.monotonic() > until:
                raise TrainError(
                    f"Ray could not place an actor with {resources_in_words(self.resources)} in "
                    f"{_PLACING_SECONDS / 60:.0f} minutes; `ray status` says what is free, and who has the rest"
                )

    def _new(self) -> _Actor:
        remote = self._ray.remote(max_restarts=0, **self.resources)(_Host)
        return _Actor(remote.remote(self._make))

    def _replace(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)  # one that cannot be reached may still be there
        self._actors[self._actors.index(actor)] = self._new()
