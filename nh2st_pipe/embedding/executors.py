"""Who does the work of `embed`: this process, a process for each device of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.embedding.options import EngineName
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.work import Executor, Slides, Work

__all__ = ["Engine", "SingleDevice", "engine"]


class Engine(Protocol):
    """Where the work is done."""

    kind: str
    """The kind of device it is done on: cpu, cuda or mps."""

    def executor(self, work: Work, slides: int) -> Executor:
        """Return who does `work` on so many slides."""


class SingleDevice:
    """This process, on one device."""

    def __init__(self, work: Work, device: str) -> None:
        self._work, self._device = work, device

    def __enter__(self) -> SingleDevice:
        self._encoder = self._work.load(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        del self._encoder

    def do(self, todo: Slides, summary: EmbedSummary, stop: Stop, progress: Progress) -> None:
        """See Executor."""
        self._work.do(todo, self._encoder, summary, stop, progress)


class _Local:
    def __init__(self, device: str) -> None:
        from nh2st_pipe.core.devices import every_device, pick_device

        self._devices = every_device(device)
        self.kind = pick_device(self._devices[0]).type

    def executor(self, work: Work, slides: int) -> Executor:
        """See Engine."""
        devices = self._devices[:slides]
        if len(devices) == 1:
            return SingleDevice(work, devices[0])
        from nh2st_pipe.embedding.devices import Devices

        return Devices(work, devices)


@contextmanager
def engine(name: EngineName, device: str, address: str | None, actors: int | None) -> Iterator[Engine]:
    """Yield the engine called `name`; `address` and `actors` are of Ray.

    Raises UsageError where it cannot be had, EncoderError where there is no such device.
    """
    if name == "local":
        if address is not None or actors is not None:
            raise UsageError("--address and --actors are of --engine ray")
        yield _Local(device)
    else:
        from nh2st_pipe.embedding.on_ray import on_ray

        with on_ray(device, address, actors) as cluster:
            yield cluster
