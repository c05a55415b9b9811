"""One call for each of many things, several at a time, the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

_AHEAD = 2  # results that may wait for each thread: many things are not all held at once

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], things: Iterable[T], at_once: int) -> Generator[R, None, None]:
    """Yield what `work` makes of each thing, in their order, with `at_once` threads at work.

    What it raises is raised in its place. Where nobody asks for more, what was not begun is left out.
    """
    pool = ThreadPoolExecutor(max(1, at_once), thread_name_prefix="pool")
    begun: deque[Future[R]] = deque()
    try:
        for thing in things:
            begun.append(pool.submit(work, thing))
            if len(begun) > _AHEAD * at_once:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
