"""Large files of one process on a local disk, which the next process deletes where this one was killed.

Whoever uses one holds a lock on it, which the kernel ends with the process, in whichever container that is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

__all__ = ["Held", "new_file", "new_folder", "sweep"]

_MARK = ".held"  # in a folder, what is locked of it
_SURELY_LOCKED_SECONDS = 60.0  # after it was made


class Held:
    """A lock on a file, held until it is let go or the process ends. Where there are no locks it holds nothing."""

    def __init__(self, file: Path) -> None:
        self._handle: int | None = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        _lock(self._handle)

    def let_go(self) -> None:
        """End it; nothing where it has ended."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def new_folder(where: Path, kind: str) -> tuple[Path, Held]:
    """Make a folder of this process in `where`, and hold it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=where))
    return folder, Held(folder / _MARK)


def new_file(where: Path, kind: str) -> tuple[Path, Held]:
    """Make an empty file of this process in `where`, and hold it."""
    handle, name = tempfile.mkstemp(prefix=f"{kind}-", dir=where)
    os.close(handle)
    return Path(name), Held(Path(name))


def sweep(folder: Path, kind: str) -> None:
    """Delete what processes that are at an end left of a `kind` in `folder`.

    What cannot be told, where the file system keeps no locks, stays.
    """
    for left in folder.glob(f"{kind}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < _SURELY_LOCKED_SECONDS or not _is_free(left):
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _is_free(left: Path) -> bool:
    handle = os.open(left / _MARK if left.is_dir() else left, os.O_RDWR)
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file, and say whether it is; where another holds it, or there are no locks, it is not."""
    try:
        import fcntl
    except ImportError:  # Windows: what is open there cannot be deleted
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
