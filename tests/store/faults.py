"""Stops the process at a chosen write to a store: killed, signalled, or with an error of the disk."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from zarr.storage import _local

from nh2st_pipe.core.location import Location

Kind = Literal["killed", "killed in it", "full disk", "one I/O error", "SIGTERM"]
KINDS: tuple[Kind, ...] = ("killed", "killed in it", "full disk", "one I/O error", "SIGTERM")


class Killed(BaseException):
    """The process is gone: nothing it would do afterwards happens, so every later write raises this too."""


class Faults:
    """Counts writes; at number `at` (from 1) it strikes, before anything is written; "killed in it" when half is."""

    def __init__(self, at: int = 0, kind: Kind = "killed") -> None:
        self.at, self.kind, self.writes = at, kind, 0
        self._lock = threading.Lock()

    def before_a_write(self, path: Path | None = None) -> None:
        with self._lock:
            self.writes += 1
            number = self.writes
        if self.at == 0 or number < self.at:
            return
        if self.kind == "killed in it" and number == self.at and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".0a1b2c3d4e5f.partial").write_bytes(b"half of i")
        if self.kind in ("killed", "killed in it"):
            raise Killed
        if self.kind == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if number == self.at:
            if self.kind == "one I/O error":
                raise OSError(errno.EIO, "Input/output error")
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def struck(faults: Faults) -> Iterator[Faults]:
    """Put `faults` before every way in which a local store is written to or deleted from."""
    put, delete, rmtree = _local._put, Location.delete, _local.LocalStore.delete_dir
    create, write = Location.create, Location.write
    remove = _local.LocalStore.delete

    def counted_put(path: Path, *arguments: Any, **options: Any) -> Any:
        faults.before_a_write(path)
        return put(path, *arguments, **options)

    def counted_delete(self: Location, name: str) -> None:
        faults.before_a_write()
        delete(self, name)

    def counted_create(self: Location, name: str, data: bytes) -> Any:
        faults.before_a_write(self.path and self.path / name)
        return create(self, name, data)

    def counted_write(self: Location, name: str, data: bytes) -> None:
        faults.before_a_write(self.path and self.path / name)
        write(self, name, data)

    async def counted_rmtree(self: Any, prefix: str) -> None:
        faults.before_a_write()
        await rmtree(self, prefix)

    async def counted_remove(self: Any, key: str) -> None:
        faults.before_a_write()
        await remove(self, key)

    with (
        mock.patch.object(_local, "_put", counted_put),
        mock.patch.object(Location, "delete", counted_delete),
        mock.patch.object(Location, "create", counted_create),
        mock.patch.object(Location, "write", counted_write),
        mock.patch.object(_local.LocalStore, "delete_dir", counted_rmtree),
        mock.patch.object(_local.LocalStore, "delete", counted_remove),
    ):
        yield faults
