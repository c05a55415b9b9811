"""Who does the work of `embed`: this process, a process for each device of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.embedding.work import Alone, Hands, Work

__all__ = ["Engine", "EngineName", "engine"]

EngineName = Literal["local", "ray"]


class Engine(Protocol):
    """Where the work is done."""

    kind: str
    """The kind of device it is done on: cpu, cuda or mps."""

    def hands(self, work: Work, slides: int) -> Hands:
        """Return who does `work` on so many slides."""


class _Local:
    def __init__(self, device: str) -> None:
        from nh2st_pipe.core.devices import every_device, pick_device

        self._devices = every_device(device)
        self.kind = pick_device(self._devices[0]).type

    def hands(self, work: Work, slides: int) -> Hands:
        devices = self._devices[:slides]
        if len(devices) == 1:
            return Alone(work, devices[0])
        from nh2st_pipe.embedding.processes import Processes

        return Processes(work, devices)


@contextmanager
def engine(name: EngineName, device: str, address: str | None, actors: int | None) -> Iterator[Engine]:
    """Yield the engine called `name`; `address` and `actors` are of Ray.

    Raises UsageError where it cannot be had, EncoderError where there is no such device.
    """
    if name == "local":
        if address is not None or actors is not None:
            raise UsageError("--address and --actors are of --engine ray")
        yield _Local(device)
    elif name == "ray":
        from nh2st_pipe.embedding.on_ray import on_ray

        with on_ray(device, address, actors) as cluster:
            yield cluster
    else:
        raise UsageError(f"--engine takes local or ray, not {name}")
