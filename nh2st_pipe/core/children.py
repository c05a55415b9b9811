"""Processes that are started from a caller's script without running it once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_main"]


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
