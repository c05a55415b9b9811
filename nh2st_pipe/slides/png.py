"""PNG of any size, some rows at a time.

No library here decodes a PNG in parts. Its rows are filtered against the row above, so that a strip of rows is itself a
PNG once the row above it, as decoded, is put in front unfiltered: strips are cut from the inflated stream, wrapped so,
and given to Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.memory import check_image
from nh2st_pipe.slides.raster import any_size

__all__ = ["png_in_strips"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STRIP_BYTES = 16 << 20  # of a strip in the stream, and as grey px
_READ_BYTES = 1 << 20
_BITS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples a px by colour type
_RAW = {  # bits a sample and colour type → how Pillow calls a row of bytes of it
    (1, 0): "1",
    (8, 0): "L",
    (8, 2): "RGB",
    (1, 3): "P;1",
    (2, 3): "P;2",
    (4, 3): "P;4",
    (8, 3): "P",
    (8, 4): "LA",
    (8, 6): "RGBA",
}


@dataclass(frozen=True)
class _Kind:
    width: int
    height: int
    depth: int
    colour: int

    @property
    def row_bytes(self) -> int:
        """Of the stream: the filter's number, and the px."""
        return 1 + -(-self.width * self.depth * _BITS[self.colour] // 8)


def png_in_strips(path: Path) -> tuple[tuple[int, int], Iterator[tuple[int, NDArray[np.uint8]]]] | None:
    """Return width and height, and an iterator of strips from top to bottom: first row, and grey px, h × w.

    None where the file at `path` is no PNG, or one of the rare kinds (interlaced, 16 bits) that are read whole. Raises
    SlideError where it declares more px than it can hold. The iterator raises ValueError where the file is cut short,
    zlib.error where it is damaged.
    """
    with path.open("rb") as file:
        head = file.read(33)
    if len(head) < 33 or not head.startswith(_SIGNATURE) or head[28]:
        return None
    kind = _Kind(*struct.unpack(">IIBB", head[16:26]))
    if (kind.depth, kind.colour) not in _RAW:
        return None
    check_image(path, (kind.width, kind.height))
    return (kind.width, kind.height), _strips(path, kind)


def _strips(path: Path, kind: _Kind) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    inflate, waiting = zlib.decompressobj(), bytearray()
    palette, above, row = b"", b"", 0
    most = max(1, _STRIP_BYTES // max(kind.row_bytes, kind.width))
    with path.open("rb") as file:
        file.seek(len(_SIGNATURE))
        for name, data in _chunks(file):
            if name == b"PLTE":
                palette = _chunk(name, data)
            while name == b"IDAT" and data and row < kind.height:
                waiting += inflate.decompress(data, _STRIP_BYTES)
                data = inflate.unconsumed_tail
                while row < kind.height and len(waiting) >= (n := min(most, kind.height - row)) * kind.row_bytes:
                    part = bytes(waiting[: n * kind.row_bytes])
                    del waiting[: n * kind.row_bytes]
                    grey, above = _decoded(kind, palette, above, part)
                    yield row, grey
                    row += n
    if row < kind.height:
        raise ValueError(f"it ends after {row:,} of {kind.height:,} rows")


def _decoded(kind: _Kind, palette: bytes, above: bytes, part: bytes) -> tuple[NDArray[np.uint8], bytes]:
    """Return a strip's grey px, and its last row as it would stand unfiltered in the stream."""
    rows = (len(above) + len(part)) // kind.row_bytes
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", kind.width, rows, kind.depth, kind.colour, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(above + part, 0))
    whole = io.BytesIO(b"".join((_SIGNATURE, header, palette, body, _chunk(b"IEND", b""))))
    with any_size(), Image.open(whole) as image:
        image.load()
        last = image.crop((0, rows - 1, kind.width, rows)).tobytes("raw", _RAW[kind.depth, kind.colour])
        grey = np.asarray(image.convert("L"))
    return grey[1:] if above else grey, b"\0" + last


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and data of each chunk, long ones in parts."""
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        whole = length if name == b"PLTE" else 0
        while length:
            data = file.read(whole or min(length, _READ_BYTES))
            if not data:
                return
            length -= len(data)
            yield name, data
        file.read(4)  # its checksum: what is damaged fails to inflate, which has one too


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
