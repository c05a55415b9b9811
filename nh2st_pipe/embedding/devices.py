"""One encoder on several devices of this machine: a process for each, and batches go to whichever has least to do.

Slides, leases, readers and the writer are those of one process: so a slide is shared between GPUs, however large, and
the cores that read are shared too. Tiles go to the processes in shared memory, embeddings come back through a pipe. One
that is killed loses nothing: the others do its batches.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import TYPE_CHECKING, Any

import numpy as np

from nh2st_pipe.core.children import fresh_processes, how_it_ended, without_main
from nh2st_pipe.core.errors import EncoderError, sendable
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.shared import SharedArray
from nh2st_pipe.embedding.plan import recipe_of
from nh2st_pipe.embedding.work import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nh2st_pipe.encoders.encoder import Coming

__all__ = ["DeviceEncoders"]

_END_SECONDS = 60.0  # for a process to end by itself, with the batch that it is at


@dataclass(eq=False)
class _Order:
    """Something that any of the processes is to do."""

    what: str
    given: tuple[Any, ...]
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Seat:
    """A process with the encoder on its device."""

    device: str
    process: BaseProcess
    pipe: Connection
    under_way: dict[int, _Order] = field(default_factory=dict)
    ended: str | None = None
    """How, where it has."""
    sending: threading.Lock = field(default_factory=threading.Lock)
    began: float = field(default_factory=time.monotonic)
    worked: float = 0.0
    """Seconds that its processor worked."""


class DeviceEncoders:
    """The encoder of `work` on each of `devices`: a TileEncoder, whose batches the devices share.

    They load it when this is entered, which raises EncoderError where one cannot; leaving ends them. `say` tells a
    person of a process that is gone.
    """

    def __init__(self, work: Work, devices: Sequence[str], say: Callable[[str], None]) -> None:
        self.recipe = recipe_of(work.contract)
        self.devices = tuple(devices)
        self._work, self._say = work, say
        self._seats: list[_Seat] = []
        self._threads: list[threading.Thread] = []
        self._changing, self._ending = threading.Lock(), False
        self._number = 0
        self._memories: dict[int, SharedArray] = {}

    def __enter__(self) -> DeviceEncoders:
        context = fresh_processes(__name__)
        for device in self.devices:
            here, there = context.Pipe()
            given = self._work, device, max(1, cores() // len(self.devices)), there
            process = context.Process(target=serve, args=given, daemon=False)
            with without_main():
                process.start()
            there.close()
            self._seats.append(_Seat(device, process, here))
        try:
            ahead = [self._loaded(seat) for seat in self._seats]
        except BaseException:
            self.__exit__()
            raise
        # One more waits at each device, for it takes a while to be told of the next.
        self.batches_ahead = sum(each + 2 for each in ahead) - 1
        self._threads = [
            threading.Thread(target=self._receive, args=(seat,), name=f"encoder on {seat.device}", daemon=True)
            for seat in self._seats
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        for seat in self._seats:
            with suppress(OSError):
                self._send(seat, (0, "end", ()))
        for seat in self._seats:
            if self._threads:  # else it may have begun to load the encoder
                seat.process.join(_END_SECONDS)
            if seat.process.is_alive():
                seat.process.kill()
                seat.process.join()
        for thread in self._threads:
            thread.join()
        for seat in self._seats:
            seat.pipe.close()
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()

    @property
    def kind(self) -> str:
        """See TileEncoder."""
        return self.devices[0].partition(":")[0]

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """See TileEncoder."""
        try:
            memory = SharedArray(shape)
        except OSError:  # tiles are sent then
            return np.empty(shape, np.uint8)
        self._lend(memory)
        return memory.array

    @contextmanager
    def pinned(self, memory: SharedArray) -> Iterator[None]:
        """See TileEncoder."""
        number = self._lend(memory)
        try:
            yield
        finally:
            del self._memories[number]
            for seat in self._seats:
                with suppress(OSError):
                    self._send(seat, (0, "forget", (number,)))

    def busy(self) -> list[float]:
        """See TileEncoder."""
        now = time.monotonic()
        return [seat.worked / max(now - seat.began, 1e-9) for seat in self._seats]

    def fits(self, views: int) -> int:
        """See TileEncoder."""
        orders = [_Order("fits", (views,)) for _ in self._seats]
        for order, seat in zip(orders, self._seats, strict=True):
            self._give(order, seat)
        return min(int(order.future.result()) for order in orders)

    def start(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> Coming:
        """See TileEncoder. Raises EncoderError where no process is left."""
        order = _Order("start", (self._where(tiles_bhwc), views, view))
        self._give(order)
        return order.future

    def encode(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> NDArray[np.float16]:
        """See TileEncoder."""
        return self.start(tiles_bhwc, views, view).result()

    def _loaded(self, seat: _Seat) -> int:
        """Wait for a process to have its encoder; return how many batches that has under way besides one."""
        try:
            what, value = seat.pipe.recv()
        except (EOFError, OSError):
            seat.process.join()
            raise EncoderError(f"the process for {seat.device} {how_it_ended(seat.process)}") from None
        if what == "failed":
            raise value
        seat.began = time.monotonic()
        return int(value)

    def _lend(self, memory: SharedArray) -> int:
        """Have every process look into `memory`; return its number."""
        with self._changing:
            self._number += 1
            number = self._number
        self._memories[number] = memory
        for seat in self._seats:
            with suppress(OSError), seat.sending:  # of one that is gone, its thread says so
                seat.pipe.send((0, "memory", (number, memory.shape)))
                send_handle(seat.pipe, memory.file, seat.process.pid)
        return number

    def _where(self, tiles: NDArray[np.uint8]) -> tuple[int, int, tuple[int, ...]] | NDArray[np.uint8]:
        """Return where `tiles` lie in memory that the processes have: its number, the byte, the shape. Else itself."""
        address = tiles.ctypes.data
        if tiles.flags.c_contiguous:
            for number, memory in self._memories.items():
                at = address - memory.array.ctypes.data
                if at >= 0 and at + tiles.nbytes <= memory.array.nbytes:
                    return number, at, tiles.shape
        return tiles

    def _give(self, order: _Order, seat: _Seat | None = None) -> None:
        """Have an order done by a process, or by whichever has least to do."""
        with self._changing:
            at_work = [each for each in self._seats if each.ended is None]
            if not at_work:
                how = "; ".join(f"that for {each.device} {each.ended}" for each in self._seats)
                order.future.set_exception(EncoderError(f"no process with the encoder is left: {how}"))
                return
            if seat is None or seat.ended is not None:
                seat = min(at_work, key=lambda each: len(each.under_way))
            self._number += 1
            number = self._number
            seat.under_way[number] = order
        with suppress(OSError):  # then it is gone, and its thread gives the order to another
            self._send(seat, (number, order.what, order.given))

    def _send(self, seat: _Seat, message: tuple[Any, ...]) -> None:
        with seat.sending:
            seat.pipe.send(message)

    def _receive(self, seat: _Seat) -> None:
        """Take what a process has done, in a thread of its own, until it has ended."""
        while True:
            try:
                number, done, value, seat.worked = seat.pipe.recv()
            except (EOFError, OSError):
                break
            except Exception:  # what it said cannot be understood: it is not asked any more
                seat.process.kill()
                break
            with self._changing:
                order = seat.under_way.pop(number)
            if done:
                order.future.set_result(value)
            else:
                order.future.set_exception(value)
        seat.process.join()
        with self._changing:
            seat.ended = how_it_ended(seat.process)
            left = list(seat.under_way.values())
            seat.under_way.clear()
            others = any(each.ended is None for each in self._seats)
        if others and not self._ending:
            self._say(f"the process for {seat.device} {seat.ended}; the others take over")
        for order in left:
            self._give(order)


def serve(work: Work, device: str, threads: int, pipe: Connection) -> None:
    """Load the encoder, and encode what comes, until nobody is there to ask."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # they come to all processes; whoever asks decides
    with suppress(EOFError, ConnectionError):
        try:
            encoder = work.load(device, threads)
        except Exception as error:
            pipe.send(("failed", sendable(error)))
            return
        pipe.send(("ready", encoder.batches_ahead))
        began = time.process_time()
        memories = dict[int, tuple[SharedArray, ExitStack]]()
        under_way = deque[tuple[int, "Coming"]]()

        def tiles_at(where: Any) -> NDArray[np.uint8]:
            if isinstance(where, np.ndarray):
                return where
            number, at, shape = where
            flat = memories[number][0].array.reshape(-1)
            return flat[at : at + int(np.prod(shape))].reshape(shape)

        def answer(number: int, ask: Callable[[], Any]) -> None:
            try:
                done, value = True, ask()
            except Exception as error:
                done, value = False, sendable(error)
            pipe.send((number, done, value, time.process_time() - began))

        while True:
            while under_way and (len(under_way) > encoder.batches_ahead or not pipe.poll()):
                number, underway = under_way.popleft()
                answer(number, underway.result)
            number, what, given = pipe.recv()
            if what == "end":
                return
            if what == "memory":
                pinned, (name, shape) = ExitStack(), given
                memory = SharedArray.received(recv_handle(pipe), shape)
                pinned.callback(memory.close)
                pinned.enter_context(encoder.pinned(memory))
                memories[name] = memory, pinned
            elif what == "forget":
                memories.pop(given[0])[1].close()
            elif what == "fits":
                answer(number, partial(encoder.fits, *given))
            else:
                where, views, view = given
                try:
                    under_way.append((number, encoder.start(tiles_at(where), views, view)))
                except Exception as error:
                    pipe.send((number, False, sendable(error), time.process_time() - began))
