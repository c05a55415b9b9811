"""Large files of one process on a local disk: named so that the next process knows whether their owner is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

__all__ = ["own_name", "sweep"]


def own_name(kind: str) -> str:
    """Return how the names of this process's files of a `kind` begin."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-"


def sweep(folder: Path, kind: str) -> None:
    """Delete what processes of this machine that were killed left of a `kind` in `folder`."""
    import psutil

    here = f"{kind}-{socket.gethostname()}-"
    for left in folder.glob(f"{here}*"):
        pid = left.name.removeprefix(here).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()
