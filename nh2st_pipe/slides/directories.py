"""TIFF files opened, once their directories are known to come to an end.

A TIFF is a chain of directories, one for each picture, and a wrong offset makes it a circle, or leads it through
millions of places that are none: whoever follows it does so for ever.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import tifffile

from nh2st_pipe.core.errors import SlideError

__all__ = ["check_directories", "open_tiff"]

_MOST = 4096  # pictures; stacks have hundreds
_KINDS = {  # byte order and version → order, format of a count, of an entry's size, of an offset
    b"II*\0": ("<", "H", 12, "I"),
    b"MM\0*": (">", "H", 12, "I"),
    b"II+\0": ("<", "Q", 20, "Q"),
    b"MM\0+": (">", "Q", 20, "Q"),
}


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF with tifffile, which raises where it is none. Raises SlideError where its directories never end."""
    check_directories(path)
    return tifffile.TiffFile(path)


def check_directories(path: Path) -> None:
    """Raise SlideError where the directories of a TIFF never end; nothing where the file is none."""
    with path.open("rb") as file:
        kind = _KINDS.get(file.read(4))
        if kind is not None and path.suffix.lower() != ".ndpi":  # which counts offsets in a way of its own
            _follow(path, file, kind, path.stat().st_size)


def _follow(path: Path, file: BinaryIO, kind: tuple[str, str, int, str], size: int) -> None:
    order, count, entry, offset = kind
    seen = set[int]()
    file.seek(8 if offset == "Q" else 4)
    while True:
        data = file.read(struct.calcsize(offset))
        if len(data) < struct.calcsize(offset):
            return  # cut short, which whoever reads it says
        (at,) = struct.unpack(order + offset, data)
        if at == 0 or at >= size:
            return
        if at in seen or len(seen) >= _MOST:
            how = "go round in a circle" if at in seen else f"are more than {_MOST:,}"
            raise SlideError(f"{path} is damaged: its directories {how}, and each should be a picture of its own")
        seen.add(at)
        file.seek(at)
        data = file.read(struct.calcsize(count))
        if len(data) < struct.calcsize(count):
            return
        file.seek(at + len(data) + entry * struct.unpack(order + count, data)[0])
