"""The skeleton of an HDF5 file, walked before HDF5 does: superblock, object headers, groups.

HDF5 follows what is written there wherever it leads: a header that goes on in itself, or a length of gigabytes, keeps
it at work until the memory is gone. Files of version 2 and later carry checksums over this part; those of version 0
and 1, which h5py writes where nobody asks for anything else, do not.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

__all__ = ["check_skeleton", "opened_h5"]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NOWHERE = (1 << 64) - 1
_MOST_OBJECTS = 1 << 20
_CONTINUED, _GROUP, _LINK = 0x10, 0x11, 0x06
_HEADER = struct.Struct("<BxHII4x")
_MESSAGE = struct.Struct("<HHB3x")
_PAIR = struct.Struct("<QQ")
_NODE = struct.Struct("<4sBBHQQ")
_SYMBOLS = struct.Struct("<4sBxH")
_ENTRY = 40
_LINK_HARD, _LEAST_LINK = 0, 11  # bytes before a name of one letter, and its address


@contextmanager
def opened_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of somebody else for reading. Raises ValueError where `check_skeleton` does, OSError where it
    cannot be opened.
    """
    import h5py

    check_skeleton(path)
    with h5py.File(path, "r") as file:
        yield file


def check_skeleton(path: Path) -> None:
    """Raise ValueError, in words, where an HDF5 file of version 0 or 1 leads outside of itself, in a circle, or to what
    is not there. Of other files nothing is said.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError):  # empty, or no file
            return
        with data:
            if data[:8] == _SIGNATURE and len(data) >= 96 and data[8] < 2 and data[13] == data[14] == 8:
                _Skeleton(data).check()


class _Skeleton:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._seen = data, set[int]()

    def check(self) -> None:
        """Walk from the root on."""
        at = 24 if self._data[8] == 0 else 28
        base = struct.unpack_from("<Q", self._data, at)[0]
        if base:
            return  # something stands before it; HDF5 counts from there
        waiting = [struct.unpack_from("<Q", self._data, at + 32 + 8)[0]]
        while waiting:
            address = waiting.pop()
            if address in self._seen:
                continue
            self._seen.add(address)
            if len(self._seen) > _MOST_OBJECTS:
                raise ValueError("it has more parts than it can hold")
            waiting += self._of_header(address)

    def _at(self, what: str, address: int, length: int) -> int:
        """Return an address. Raises ValueError where so many bytes from it on are not in the file."""
        if address > len(self._data) or length > len(self._data) - address:
            raise ValueError(f"{what} leads beyond the end of the file")
        return address

    def _of_header(self, address: int) -> Iterator[int]:
        """Yield the objects that the one with a header at `address` leads to."""
        self._at("a group", address, _HEADER.size)
        version, count, _, size = _HEADER.unpack_from(self._data, address)
        if version != 1:
            if self._data[address : address + 4] == b"OHDR":
                return  # with a checksum
            raise ValueError("a group leads to what is no object")
        chunks, parts, left = [(address + _HEADER.size, size)], set[int](), count
        while chunks:
            start, length = chunks.pop()
            if start in parts:
                raise ValueError("an object's header goes on in itself")
            parts.add(start)
            at, end = self._at("an object's header", start, length), start + length
            while left and at + _MESSAGE.size <= end:
                kind, held, _ = _MESSAGE.unpack_from(self._data, at)
                at += _MESSAGE.size
                if at + held > end:
                    raise ValueError("a part of an object's header is longer than that")
                left -= 1
                if kind == _CONTINUED and held >= _PAIR.size:
                    chunks.append(_PAIR.unpack_from(self._data, at))
                elif kind == _GROUP and held >= _PAIR.size:
                    yield from self._of_tree(_PAIR.unpack_from(self._data, at)[0])
                elif kind == _LINK and held > _LEAST_LINK:
                    yield from self._of_link(at, held)
                at += held

    def _of_link(self, at: int, length: int) -> Iterator[int]:
        """Yield where a link message leads, if it is a hard link."""
        flags = self._data[at + 1]
        place = at + 2
        kind = self._data[place] if flags & 8 else _LINK_HARD
        place += bool(flags & 8) + 8 * bool(flags & 4) + bool(flags & 16)
        width = 1 << (flags & 3)
        name = int.from_bytes(self._data[place : place + width], "little")
        place += width + name
        if kind == _LINK_HARD and place + 8 <= at + length:
            yield struct.unpack_from("<Q", self._data, place)[0]

    def _of_tree(self, address: int) -> Iterator[int]:
        """Yield the objects in a group's tree."""
        waiting, nodes = [address], set[int]()
        while waiting:
            node = waiting.pop()
            if node in nodes:
                raise ValueError("a group's tree leads in a circle")
            nodes.add(node)
            at = self._at("a group's tree", node, _NODE.size)
            if self._data[at : at + 4] == b"SNOD":
                yield from self._of_symbols(at)
                continue
            signature, kind, _, used, left, right = _NODE.unpack_from(self._data, at)
            if signature != b"TREE" or kind != 0:
                raise ValueError("a group's tree is not where it should be")
            self._at("a group's tree", at, _NODE.size + 16 * used + 8)
            for number in range(used):
                waiting.append(struct.unpack_from("<Q", self._data, at + _NODE.size + 8 + 16 * number)[0])
            for beside in (left, right):
                if beside != _NOWHERE:
                    self._at("a group's tree", beside, _NODE.size)

    def _of_symbols(self, at: int) -> Iterator[int]:
        self._at("a group's names", at, _SYMBOLS.size)
        _, _, used = _SYMBOLS.unpack_from(self._data, at)
        self._at("a group's names", at, _SYMBOLS.size + _ENTRY * used)
        for number in range(used):
            entry = at + _SYMBOLS.size + _ENTRY * number
            _, address = _PAIR.unpack_from(self._data, entry)
            if struct.unpack_from("<I", self._data, entry + 16)[0] != 2:  # of a soft link it is none
                yield address
