"""Who does the work of `embed`: this process, with the encoder on one or several devices, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.embedding.options import EngineName
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.work import Executor, Slides, Work

if TYPE_CHECKING:
    from nh2st_pipe.encoders.encoder import TileEncoder

__all__ = ["Engine", "OnThisMachine", "engine"]


class Engine(Protocol):
    """Where the work is done."""

    kind: str
    """The kind of device it is done on: cpu, cuda or mps."""

    def executor(self, work: Work, slides: int) -> Executor:
        """Return who does `work` on so many slides."""


class OnThisMachine:
    """This process, with the encoder on one device; on several, a process for each has it."""

    def __init__(self, work: Work, devices: Sequence[str]) -> None:
        self._work, self._devices = work, devices
        self._ending = ExitStack()
        self._encoder: TileEncoder | None = None
        self._say: Callable[[str], None] = lambda words: None

    def __enter__(self) -> OnThisMachine:
        if len(self._devices) == 1:
            self._encoder = self._work.load(self._devices[0])
        else:
            from nh2st_pipe.embedding.devices import DeviceEncoders

            several = DeviceEncoders(self._work, self._devices, lambda words: self._say(words))
            self._encoder = self._ending.enter_context(several)
        return self

    def __exit__(self, *_: object) -> None:
        self._encoder = None
        self._ending.close()

    def do(self, todo: Slides, summary: EmbedSummary, stop: Stop, progress: Progress) -> None:
        """See Executor."""
        assert self._encoder is not None
        self._say = progress.say
        self._work.do(todo, self._encoder, summary, stop, progress)


class _Local:
    def __init__(self, device: str) -> None:
        from nh2st_pipe.core.devices import every_device, pick_device

        self._devices = every_device(device)
        self.kind = pick_device(self._devices[0]).type

    def executor(self, work: Work, slides: int) -> Executor:
        """See Engine."""
        return OnThisMachine(work, self._devices)


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
