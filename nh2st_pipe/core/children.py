"""Processes that are started from a caller's script without running it once more."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

__all__ = ["fresh_processes", "how_it_ended", "without_main"]

_SOCKET, _LONGEST_SOCKET = "listener-12345678", 100  # a few bytes less than any system takes


def fresh_processes(*modules: str) -> Any:
    """Return the way to start processes that have nothing of this one: a fork of a process with threads may hang.

    From a server that is started once, with torch and `modules` loaded for all of them, where the system has such and
    the folder for temporary files (TMPDIR) has a name that is short enough for the server's socket; its environment is
    that of its start.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    if not has_server or len(f"{get_temp_dir()}/{_SOCKET}") > _LONGEST_SOCKET:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *modules])
    return context


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
