"""Regions of an image that is stored in pieces (tiles, strips, chunks): decoded when asked for, the last ones kept."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.core.memory import require

__all__ = ["Grid", "Pieces"]

_BYTES = 12  # a px of a piece, while it is decoded: of up to four samples of 16 bits, and RGB
_LOOKED_AT = 64  # pieces, for the largest value
_KEPT_BYTES = 96 << 20  # of decoded pieces: several rows of tiles of the widest slides


@dataclass(frozen=True)
class Grid:
    """How one level is cut into pieces, all lengths px of that level."""

    width: int
    height: int
    piece: tuple[int, int]
    """Height and width; those at the right and lower edge may be cut off or filled up."""


class Pieces(ABC):
    """The pieces of all levels of an image. Safe to use from several threads, which decode side by side.

    A piece that one thread decodes is waited for by another that wants it: neighbouring tiles share pieces.
    """

    def __init__(self, grids: Sequence[Grid], where: object) -> None:
        """Raises SlideError naming `where` where a piece has no px, or more than there is memory for."""
        for grid in grids:
            if min(grid.width, grid.height, *grid.piece) < 1:
                raise SlideError(
                    f"{where}: a level of {grid.width:,} × {grid.height:,} px in pieces of {grid.piece[1]:,} × "
                    f"{grid.piece[0]:,} holds nothing; is the file damaged?"
                )
            require(
                _BYTES * grid.piece[0] * grid.piece[1], f"{where}: a piece of {grid.piece[1]:,} × {grid.piece[0]:,} px"
            )
        self._grids = grids
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._under_way: dict[tuple[int, int, int], Future[NDArray[np.uint8]]] = {}

    @abstractmethod
    def decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """Return a piece, h × w × 3. Raises SlideError where it cannot be decoded."""

    def decode_many(self, level: int, places: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8] | SlideError]:
        """Return pieces by row and column, or why one cannot be decoded; at once where that is faster."""
        found = list[NDArray[np.uint8] | SlideError]()
        for row, column in places:
            try:
                found.append(self.decode(level, row, column))
            except SlideError as error:
                found.append(error)
        return found

    def fetch(self, level: int, boxes: Iterable[tuple[int, int, int, int]]) -> None:
        """Decode together what regions (x, y, width, height) of a level take, as far as it is not there.

        One that cannot be decoded is left to whoever asks for its region.
        """
        grid = self._grids[level]
        wanted = {
            place for x, y, width, height in boxes for place in self._touched(grid, (x, x + width), (y, y + height))
        }
        mine = dict[tuple[int, int], Future[NDArray[np.uint8]]]()
        with self._lock:
            for place in sorted(wanted):
                key = (level, *place)
                if key not in self._kept and key not in self._under_way:
                    mine[place] = self._under_way[key] = Future()
        found: Sequence[NDArray[np.uint8] | BaseException]
        try:
            found = self.decode_many(level, list(mine))
        except BaseException as error:
            found = [error] * len(mine)
            raise
        finally:
            for (place, future), piece in zip(mine.items(), found, strict=True):
                self._settle((level, *place), future, piece)

    @staticmethod
    def _touched(grid: Grid, across: tuple[int, int], down: tuple[int, int]) -> Iterator[tuple[int, int]]:
        left, right = (min(max(v, 0), grid.width) for v in across)
        top, bottom = (min(max(v, 0), grid.height) for v in down)
        tall, wide = grid.piece
        for row in range(top // tall, -(-bottom // tall)) if right > left else ():
            for column in range(left // wide, -(-right // wide)):
                yield row, column

    def region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """Return height × width × 3, white outside the image; see `Slide.read_region`."""
        grid = self._grids[level]
        left, right = (min(max(v, 0), grid.width) for v in (x, x + width))
        top, bottom = (min(max(v, 0), grid.height) for v in (y, y + height))
        whole = (right - left, bottom - top) == (width, height)
        region = np.empty((height, width, 3), np.uint8) if whole else np.full((height, width, 3), 255, np.uint8)
        down, across = grid.piece
        for row, column in self._touched(grid, (x, x + width), (y, y + height)):
            piece = self._piece(level, row, column)
            y0, x0 = max(top, row * down), max(left, column * across)
            y1, x1 = min(bottom, (row + 1) * down), min(right, (column + 1) * across)
            part = piece[y0 - row * down : y1 - row * down, x0 - column * across : x1 - column * across]
            region[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return region

    def spread(self, level: int) -> list[tuple[int, int]]:
        """Return row and column of some pieces from all over a level."""
        grid = self._grids[level]
        n_across, n_down = -(-grid.width // grid.piece[1]), -(-grid.height // grid.piece[0])
        some = np.unique(np.linspace(0, n_across * n_down - 1, _LOOKED_AT).round().astype(int))
        return [divmod(int(index), n_across) for index in some]

    def piece(self, level: int) -> tuple[int, int]:
        """Return height and width of a level's pieces."""
        return self._grids[level].piece

    def close(self) -> None:
        """Free what was decoded."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _piece(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        key = level, row, column
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            other = self._under_way.get(key)
            if other is None:
                mine = self._under_way[key] = Future()
        if other is not None:
            return other.result()
        try:
            piece = self.decode(level, row, column)
        except BaseException as error:
            self._settle(key, mine, error)
            raise
        self._settle(key, mine, piece)
        return piece

    def _settle(
        self, key: tuple[int, int, int], future: Future[NDArray[np.uint8]], found: NDArray[np.uint8] | BaseException
    ) -> None:
        """Keep a piece that was under way, and hand it, or why there is none, to whoever waits for it."""
        with self._lock:
            del self._under_way[key]
            if not isinstance(found, BaseException):
                self._kept[key] = found
                self._bytes += found.nbytes
                while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        if isinstance(found, BaseException):
            future.set_exception(found)
        else:
            future.set_result(found)
