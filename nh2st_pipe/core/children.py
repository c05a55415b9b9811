"""Processes that are started from a caller's script without running it once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

__all__ = ["how_it_ended", "without_main"]


def how_it_ended(process: BaseProcess) -> str:
    """Return in words how a process ended."""
    code = process.exitcode
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"


@contextmanager
def without_main() -> Iterator[None]:
    """Keep processes that are started inside from running the caller's script once more: they need nothing of it.

    Or every script that asks for several would need a guard (`if __name__ == "__main__":`), and one read from a pipe
    could not have any; without it a child ends before it has read what it is sent, which may hang its parent.
    """
    main = sys.modules["__main__"]
    kept = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    try:
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
