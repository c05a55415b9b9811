"""Embeddings compressed and written in a thread of their own, while the next batch is encoded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import OF_ONE_SLIDE, NH2STError
from nh2st_pipe.embedding.readers import Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Writing", "fault_of_slide"]

_LOOK_SECONDS = 0.2  # between looks at whether the thread has failed
_MOST_WAITING = 4  # batches and ends of slides


class Writing:
    """One thread that does what is handed to it, in that order; leaving waits for all of it.

    A fault of one slide is put down with its job, and whatever is handed over for that job later is left alone but for
    its end. Any other fault ends everything: from then on nothing is written, and the next call raises it.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[Job, Callable[[], None], bool] | None] = queue.Queue(_MOST_WAITING)
        self._fatal: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)

    def __enter__(self) -> Writing:
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

    def append(self, job: Job, embeddings: NDArray[np.float16]) -> None:
        """Have the embeddings of a slide's next tiles written; waits where the disk is far behind."""

        def write() -> None:
            assert job.writer is not None
            job.writer.append(embeddings)

        self._hand_over(job, write, False)

    def end(self, job: Job, last: Callable[[], None]) -> None:
        """Have `last` called after all that was handed over for this slide, whether it failed or not."""
        self._hand_over(job, last, True)

    def wait(self, job: Job) -> None:
        """Wait until all that was handed over is done."""
        done = threading.Event()
        self._hand_over(job, done.set, True)
        while not done.wait(_LOOK_SECONDS):
            self.check()
        self.check()

    def close(self) -> None:
        """Do what is left, and end the thread."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _hand_over(self, job: Job, what: Callable[[], None], always: bool) -> None:
        self.check()
        self._waiting.put((job, what, always))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            job, what, always = item
            if self._fatal is not None or (job.failed is not None and not always):
                continue
            try:
                what()
            except BaseException as error:
                job.failed = fault_of_slide(error)
                if job.failed is None:
                    self._fatal = error


def fault_of_slide(error: BaseException) -> str | None:
    """Return a fault of one slide in words; None for one that concerns all of them, as a disk that is full does."""
    if isinstance(error, NH2STError):
        one = isinstance(error, OF_ONE_SLIDE)
    else:
        one = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is None)
    return (str(error) or type(error).__name__) if one else None
