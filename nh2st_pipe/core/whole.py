"""Files and folders that are there whole or not at all: written beside their place, and moved there."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nh2st_pipe.core.errors import written_to

__all__ = ["create_whole", "folder_whole", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is there at the end takes the place of `path`, and nothing is left of it otherwise.

    Makes the folder of `path`. Raises WriteError naming `path` where the disk refuses it.
    """
    part = path.with_name(f"{path.name}.part")
    with written_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which is not there yet; it takes the place of `path` at the end, or is gone."""
    part = path.with_name(f"{path.name}.part")
    with written_to(path):
        try:
            shutil.rmtree(part, ignore_errors=True)
            yield part
            if path.is_dir():
                shutil.rmtree(path)
            part.replace(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def create_whole(path: Path, data: bytes) -> bool:
    """Write a file if there is none, and say whether that was so. Makes the folder of `path`."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")  # of several at once
    with written_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            return _moved_if_new(part, path)
        finally:
            part.unlink(missing_ok=True)


def _moved_if_new(part: Path, path: Path) -> bool:
    try:
        path.hardlink_to(part)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: whoever calls this holds a lock
        if path.exists():
            return False
        part.replace(path)
    return True
