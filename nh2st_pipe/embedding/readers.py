"""Who opens slides and reads tiles: threads of this process."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.embedding.opener import Ask, Opened, OpenSlides, Overview

__all__ = ["Readers", "ThreadReaders", "Waited", "slides_open"]


class Readers(Protocol):
    """Who opens slides and reads their tiles, side by side.

    Entering starts them, and raises OSError where that cannot be done; leaving ends them, with what is not begun left
    undone. Any thread may ask.
    """

    workers: int
    """How many read at once."""
    kind: str
    """threads or processes."""
    apart: bool
    """Whether each decodes for itself: then parts of a slide are best read by the same one, from top to bottom."""

    def __enter__(self) -> Readers: ...

    def __exit__(self, *_: object) -> None: ...

    def memory(self) -> list[NDArray[np.uint8]]:
        """Return the batches of tiles (b × h × w × 3) that they can read into."""

    def open(self, ask: Ask) -> Future[Opened]:
        """Have a slide opened."""

    def overview(self, ask: Ask) -> Future[Overview]:
        """Have a slide that is open looked at as a whole."""

    def read(
        self, ask: Ask, size_level0_px: float, xy: NDArray[np.float64], batch: int, at: NDArray[np.int64], by: int
    ) -> Future[None]:
        """Have the tiles around n × 2 `xy` read into the places `at` of a batch of the memory, best by reader `by`."""

    def close(self, key: str) -> None:
        """Close a slide when nothing reads from it any more; what has not begun to is left out."""

    def busy(self) -> list[float]:
        """Return for each process that reads which share of its time its processor worked; none of threads."""


def slides_open(workers: int) -> int:
    """Return how many slides may be open beside so many readers: what is read, and what is prepared meanwhile. A plain
    image is in memory while it is open.
    """
    return 1 + min(max(workers // 4, 1), 3)


class Waited:
    """What is under way for each slide, so that none is closed under it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: defaultdict[str, list[Future[Any]]] = defaultdict(list)

    def add(self, key: str, future: Future[Any]) -> None:
        """Note what is under way for a slide."""
        with self._lock:
            left = [each for each in self._under_way[key] if not each.done()]
            self._under_way[key] = [*left, future]

    def end(self, key: str) -> None:
        """Wait until nothing is under way for a slide any more; what was not begun is cancelled."""
        with self._lock:
            left = self._under_way.pop(key, [])
        # What was cancelled before it began is never waited for: a pool that has been shut down does not say so.
        wait([each for each in left if not each.cancel()])


class ThreadReaders:
    """Threads of this process. `turn` is entered while tiles are read, where several share a process."""

    kind = "threads"
    apart = False

    def __init__(
        self,
        workers: int,
        memory: Callable[[], list[NDArray[np.uint8]]],
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self.workers = workers
        self._make, self._turn = memory, turn or nullcontext()
        self._slides, self._waited = OpenSlides(), Waited()
        self._openers = ThreadPoolExecutor(slides_open(workers), thread_name_prefix="opener")
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")

    def __enter__(self) -> ThreadReaders:
        self._memory = self._make()
        return self

    def __exit__(self, *_: object) -> None:
        self._openers.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._slides.close_all()

    def memory(self) -> list[NDArray[np.uint8]]:
        """See Readers."""
        return self._memory

    def open(self, ask: Ask) -> Future[Opened]:
        """See Readers."""
        future = self._openers.submit(self._slides.open, ask)
        self._waited.add(ask.key, future)
        return future

    def overview(self, ask: Ask) -> Future[Overview]:
        """See Readers."""
        future = self._pool.submit(self._slides.overview, ask)
        self._waited.add(ask.key, future)
        return future

    def read(
        self, ask: Ask, size_level0_px: float, xy: NDArray[np.float64], batch: int, at: NDArray[np.int64], by: int
    ) -> Future[None]:
        """See Readers."""
        future = self._pool.submit(self._read, ask, size_level0_px, xy, self._memory[batch], at)
        self._waited.add(ask.key, future)
        return future

    def _read(
        self, ask: Ask, size: float, xy: NDArray[np.float64], tiles: NDArray[np.uint8], at: NDArray[np.int64]
    ) -> None:
        with self._turn:
            self._slides.read(ask, size, xy, tiles, at)

    def close(self, key: str) -> None:
        """See Readers."""
        self._waited.end(key)
        self._slides.close(key)

    def busy(self) -> list[float]:
        """See Readers."""
        return []
