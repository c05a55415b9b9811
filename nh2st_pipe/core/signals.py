"""Ctrl-C and a batch system's SIGTERM as a flag, so that they strike between two steps and never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stop", "signals_as_flag"]


class Stop:
    """Whether the end was asked for."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise KeyboardInterrupt where the end was asked for."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def signals_as_flag() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a flag while inside; who works there calls `check` where it may stop.

    A second signal is not waited for: it raises KeyboardInterrupt at once. Outside the main thread, where Python
    takes no signals, the flag is never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
