"""Embeddings compressed and written in a thread of their own, while the next batch is encoded."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import OF_ONE_SLIDE, NH2STError
from nh2st_pipe.embedding.tiles import End, Faults, Ready
from nh2st_pipe.store.format import Picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Writer", "fault_of_slide"]

_LOOK_SECONDS = 0.2  # between looks at whether the thread has failed
_MOST_WAITING = 16  # batches and ends of slides
_PARKED_SECONDS = 0.05  # between looks at pictures that ends of slides wait for


class Writer:
    """One thread that writes what is handed to it, in that order; leaving waits for all of it.

    The end of a slide waits for its picture without holding up the tiles of the next. A fault of one slide is noted,
    and whatever is handed over for it later is left alone but for its end. Any other fault ends everything: from then
    on nothing is taken, and the next call raises it. `closed` is called with each slide's end, when it has its
    completion mark or will have none.
    """

    def __init__(self, faults: Faults, closed: Callable[[End], None]) -> None:
        self._faults, self._closed_slide = faults, closed
        self._waiting: queue.Queue[tuple[str, Callable[[], None] | End] | None] = queue.Queue(_MOST_WAITING)
        self._ends: deque[End] = deque()
        self._fatal: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        self.close()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what went wrong, if it was more than one slide."""
        if self._fatal is not None:
            raise self._fatal

    def append(self, slide: Ready, embeddings: NDArray[np.float16]) -> None:
        """Have the embeddings of a slide's next tiles written; waits where the disk is far behind."""
        self._hand_over(slide.key, lambda: slide.writer.append(embeddings))

    def end(self, end: End) -> None:
        """Have a slide finished, after all that was handed over for it."""
        self._hand_over(end.held.key, end)

    def wait(self) -> None:
        """Wait until all that was handed over is written."""
        done = threading.Event()
        self._hand_over("", done.set)
        while not done.wait(_LOOK_SECONDS):
            self.check()
        self.check()

    def close(self) -> None:
        """Do what is left, and end the thread."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _hand_over(self, key: str, what: Callable[[], None] | End) -> None:
        self.check()
        self._waiting.put((key, what))

    def _work(self) -> None:
        while True:
            try:
                item = self._waiting.get(timeout=_PARKED_SECONDS if self._ends else None)
            except queue.Empty:
                self._finish_those_with_pictures()
                continue
            if item is None:
                break
            key, what = item
            if self._fatal is not None:
                continue
            if isinstance(what, End):
                self._ends.append(what)
            elif self._faults.of(key) is None:
                self._do(key, what)
            self._finish_those_with_pictures()
        while self._ends:  # all of their tiles are written, whatever came up after them
            self._finish(self._ends.popleft())

    def _finish_those_with_pictures(self) -> None:
        while self._ends and self._fatal is None:
            ready = self._ends[0].ready
            if ready is not None and not ready.overview.done() and self._faults.of(ready.key) is None:
                return
            self._finish(self._ends.popleft())

    def _finish(self, end: End) -> None:
        ready = end.ready
        if ready is not None and self._faults.of(ready.key) is None:
            self._do(ready.key, lambda: finish(ready))
        self._do(end.held.key, lambda: self._closed_slide(end))

    def _do(self, key: str, what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:
            cause = fault_of_slide(error)
            if cause is None:
                self._fatal = self._fatal or error
            else:
                self._faults.put(key, cause)


def finish(ready: Ready) -> None:
    """Write what needs the whole slide: neighbours, thumbnail, completion mark."""
    seen = ready.overview.result()
    picture = Picture(scale=seen.scale, spot_px=ready.spot_px)
    ready.writer.finish(*seen.neighbours, seen.picture, picture, seen.tissue)


def fault_of_slide(error: BaseException) -> str | None:
    """Return a fault of one slide in words; None for one that concerns all of them, as a disk that is full does."""
    if isinstance(error, NH2STError):
        one = isinstance(error, OF_ONE_SLIDE)
    else:
        one = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is None)
    return (str(error) or type(error).__name__) if one else None
