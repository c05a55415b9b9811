"""Processes that open slides and read tiles, into memory that they share with the one that encodes.

One Python interpreter cuts about 2,400 tiles a second, however many cores there are; a GPU takes more. Each process has
slides open of its own, and does one thing at a time. One that ends before it has done that is replaced, and another
does it; a slide at the same tiles of which three have ended is passed over.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.children import fresh_processes, how_it_ended, without_main
from nh2st_pipe.core.errors import SlideError, sendable
from nh2st_pipe.core.shared import SharedArray
from nh2st_pipe.embedding.opener import Ask, Opened, OpenSlides, Overview
from nh2st_pipe.embedding.readers import Waited

__all__ = ["ProcessReaders"]

Shape = tuple[int, int, int, int, int]

_MOST_DEATHS = 3  # of processes at the same tiles, or of one after another before it can begin
_BEHIND = 2  # orders that may wait for a process before others take some of them, and decode once more
_END_SECONDS = 5.0  # for a process to end by itself
_one_at_a_time = threading.Lock()


@dataclass(eq=False)
class _Order:
    """Something that a process is to do."""

    key: str
    what: str
    given: tuple[Any, ...]
    of: Ask | None = None
    only: int | None = None
    """The one process that can do it; None: any."""
    deaths: int = 0
    """Of processes, while they did it."""
    best: int | None = None
    """The one that has what it takes at hand."""
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Seat:
    """A process, and the one in its place when it is gone."""

    number: int
    process: BaseProcess | None = None
    pipe: Connection | None = None
    slides: set[str] = field(default_factory=set)
    """Those that it has open."""
    began: float = 0.0
    worked: float = 0.0
    """Seconds that its processor worked."""


class ProcessReaders:
    """So many processes. `shape` is that of the memory they share with this one: batches of tiles h × w × 3.

    `pinned` page-locks that for a device, while it is entered; `say` tells a person of processes that are gone.
    Entering raises OSError where there cannot be such processes, or no such memory.
    """

    kind = "processes"
    apart = True

    def __init__(
        self,
        workers: int,
        shape: Shape,
        pinned: Callable[[SharedArray], AbstractContextManager[object]],
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.workers = workers
        self._shape, self._pinned, self._say = shape, pinned, say
        self._orders: deque[_Order] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._broken: BaseException | None = None
        self._waited = Waited()
        self._homes: dict[str, tuple[int, bool]] = {}
        """Which process opened a slide, and whether it alone can read from it: all of its px are in its memory."""
        self._seats = [_Seat(number) for number in range(workers)]
        self._threads = [
            threading.Thread(target=self._attend, args=(seat,), name=f"reader {seat.number}", daemon=True)
            for seat in self._seats
        ]

    def __enter__(self) -> ProcessReaders:
        self._tiles = SharedArray(self._shape)
        try:
            self._start(self._seats[0])
        except BaseException:
            self._end(self._seats[0])
            self._tiles.close()
            raise
        self._pin = self._pinned(self._tiles)
        self._pin.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending = True
            left = list(self._orders)
            self._orders.clear()
            self._changed.notify_all()
        for order in left:
            if not order.future.cancel():
                order.future.set_exception(EOFError("it was begun by a process that is gone"))
        for thread in self._threads:
            thread.join()
        self._pin.__exit__(None, None, None)
        self._tiles.close()

    def memory(self) -> list[NDArray[np.uint8]]:
        """See Readers."""
        return list(self._tiles.array)

    def open(self, ask: Ask) -> Future[Opened]:
        """See Readers."""
        return self._have_done(_Order(ask.key, "open", (ask,), ask))

    def overview(self, ask: Ask) -> Future[Overview]:
        """See Readers."""
        home = self._homes.get(ask.key)
        return self._have_done(_Order(ask.key, "overview", (ask,), ask, None if home is None else home[0]))

    def read(
        self, ask: Ask, size_level0_px: float, xy: NDArray[np.float64], batch: int, at: NDArray[np.int64], by: int
    ) -> Future[None]:
        """See Readers."""
        home, alone = self._homes.get(ask.key, (None, False))
        given = ask, size_level0_px, xy, batch, at
        return self._have_done(_Order(ask.key, "read", given, ask, home if alone else None, by % self.workers))

    def close(self, key: str) -> None:
        """See Readers."""
        self._waited.end(key)
        self._homes.pop(key, None)
        with self._changed:
            for seat in self._seats:
                if key in seat.slides:
                    self._orders.appendleft(_Order(key, "close", (key,), only=seat.number))
            self._changed.notify_all()

    def busy(self) -> list[float]:
        """See Readers."""
        now = time.monotonic()
        return [seat.worked / max(now - seat.began, 1e-9) for seat in self._seats if seat.began]

    def _have_done(self, order: _Order) -> Future[Any]:
        self._waited.add(order.key, order.future)
        with self._changed:
            if self._broken is not None:
                order.future.set_exception(self._broken)
            elif self._ending:
                order.future.cancel()
            else:
                self._orders.append(order)
                self._changed.notify_all()
        return order.future

    def _attend(self, seat: _Seat) -> None:
        """Attend to a process, in a thread of its own. What goes wrong here ends everything: nobody is left to wait."""
        try:
            self._hand_orders_to(seat)
        except BaseException as error:
            with self._changed:
                self._broken = error
                left = list(self._orders)
                self._orders.clear()
            for order in left:
                if not order.future.cancel():
                    order.future.set_exception(error)
        finally:
            self._end(seat)

    def _hand_orders_to(self, seat: _Seat) -> None:
        while (order := self._next(seat)) is not None:
            future = order.future
            if not future.running() and not future.set_running_or_notify_cancel():
                continue
            try:
                self._start(seat)
                assert seat.pipe is not None
                seat.pipe.send((order.what, order.given))
                done, value, seat.worked = seat.pipe.recv()
            except (EOFError, ConnectionError) as error:
                self._gone(seat, order, error)
                continue
            except BaseException as error:  # no process can be started, or what it said cannot be understood
                future.set_exception(error)
                continue
            if order.what == "close":
                seat.slides.discard(order.key)
            elif order.of is not None:
                seat.slides.add(order.key)
            if done and order.what == "open":
                self._homes[order.key] = seat.number, value.in_memory
            if done:
                future.set_result(value)
            else:
                future.set_exception(value)

    def _next(self, seat: _Seat) -> _Order | None:
        """Wait for what this process is to do: what it alone can do, or can do best, what anyone can do, and the work
        of one that is behind. None: nothing more will come.
        """
        with self._changed:
            while not self._ending:
                order = self._fitting(seat.number)
                if order is not None:
                    self._orders.remove(order)
                    return order
                self._changed.wait()
        return None

    def _fitting(self, number: int) -> _Order | None:
        can = [order for order in self._orders if order.only in (None, number)]
        for order in can:
            if number in (order.only, order.best) or order.best is None:
                return order
        waiting = Counter(order.best for order in can)
        return next((order for order in can if waiting[order.best] > _BEHIND), None)

    def _start(self, seat: _Seat) -> None:
        """Start a process, if there is none. Raises OSError where it ends before it can begin."""
        if seat.process is not None:
            return
        context = fresh_processes(__name__)
        how = "none"
        for _ in range(_MOST_DEATHS):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, self._tiles), daemon=True)
            with _one_at_a_time, without_main():
                process.start()
            there.close()
            seat.process, seat.pipe, seat.slides = process, here, set()
            seat.began, seat.worked = time.monotonic(), 0.0
            try:
                here.recv()
                return
            except (EOFError, ConnectionError):
                self._end(seat)
                how = how_it_ended(process)
        raise OSError(f"a process that reads tiles {how} before it had begun")

    def _gone(self, seat: _Seat, order: _Order, error: BaseException) -> None:
        """Have an order done again whose process is gone, or give it up."""
        process = seat.process
        self._end(seat)
        how = "is gone" if process is None else how_it_ended(process)
        with self._changed:
            order.deaths += 1
            if self._ending or order.of is None:
                order.future.set_exception(error)
                return
            if order.deaths < _MOST_DEATHS:
                self._orders.appendleft(order)
                self._changed.notify_all()
        if order.deaths < _MOST_DEATHS:
            self._say(f"a process that read {order.key} {how}; another goes on")
            return
        order.future.set_exception(
            SlideError(
                f"{order.of.image}: {_MOST_DEATHS} processes ended at the same place of it (the last {how}); is it "
                "damaged, or too little memory left? With --readers threads its decoder runs in the main process"
            )
        )

    def _end(self, seat: _Seat) -> None:
        if seat.pipe is not None:
            seat.pipe.close()  # it ends when it sees that
        if seat.process is not None:
            seat.process.join(_END_SECONDS)
            if seat.process.is_alive():
                seat.process.kill()
                seat.process.join()
        seat.process, seat.pipe, seat.slides = None, None, set()


def serve(pipe: Connection, tiles: SharedArray) -> None:
    """Do what is asked for, until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it comes to all; whoever asks decides
    import torch

    torch.set_num_threads(1)
    slides = OpenSlides()

    def read(ask: Ask, size: float, xy: NDArray[np.float64], batch: int, at: NDArray[np.int64]) -> None:
        slides.read(ask, size, xy, tiles.array[batch], at)

    verbs: dict[str, Callable[..., Any]] = {
        "open": slides.open,
        "overview": slides.overview,
        "close": slides.close,
        "read": read,
    }
    with suppress(EOFError, ConnectionError):
        pipe.send("ready")
        while True:
            what, given = pipe.recv()
            try:
                done, value = True, verbs[what](*given)
            except Exception as error:
                done, value = False, sendable(error)
            pipe.send((done, value, time.process_time()))
