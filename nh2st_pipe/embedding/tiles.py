"""Slides opened and their tiles read ahead of the encoder, across slide borders."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import OF_ONE_SLIDE
from nh2st_pipe.embedding.opener import Ask, Opened, Overview
from nh2st_pipe.embedding.plan import Asked, Todo, Wanted, check_tiles, decide, recipe_of
from nh2st_pipe.embedding.planner import Held, Planner
from nh2st_pipe.embedding.readers import Readers, slides_open
from nh2st_pipe.embedding.staging import ahead
from nh2st_pipe.encoders.stains import tiles_for_shift
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.store.write import SlideWriter, StoreWriter
from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["End", "Faults", "Ready", "TileBatch", "TileReader", "batches_of_memory", "stripes"]

_TILES_AHEAD = 256

_LEAST_STRIPE = 128  # tiles; opening a slide once more takes as long as reading about so many

_PART = 32  # tiles of a batch that one thread or process reads

_LOOK_SECONDS = 0.2  # between looks at whether the end was asked for


def batches_of_memory(batch_size: int, batches_ahead: int) -> int:
    """Return how many batches there are to be memory for: those that are read, and those that are encoded."""
    return max(3, _TILES_AHEAD // batch_size) + batches_ahead + 1


class Faults:
    """What went wrong with slides, by slide_id: the first cause of each, wherever it came up."""

    def __init__(self) -> None:
        self._causes: dict[str, str] = {}
        self._lock = threading.Lock()

    def put(self, key: str, cause: str) -> None:
        """Note what went wrong with a slide."""
        with self._lock:
            self._causes.setdefault(key, cause)

    def of(self, key: str) -> str | None:
        """Return what went wrong with a slide, None where nothing did."""
        return self._causes.get(key)


@dataclass(frozen=True)
class Ready:
    """A slide that is open and has its place in the store."""

    held: Held
    ask: Ask
    xy: NDArray[np.float64]
    """Centres of its n tiles, n × 2, level-0 px."""
    by: NDArray[np.int64]
    """Which reader each tile is best read by."""
    tile_level0_px: float
    spot_px: float
    """How wide a spot is drawn, level-0 px."""
    writer: SlideWriter
    overview: Future[Overview]
    notices: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its slide_id."""
        return self.held.key


@dataclass(frozen=True)
class TileBatch:
    """Tiles that are being read, into a batch of the readers' memory."""

    slide: Ready
    rows: NDArray[np.int64]
    number: int
    parts: tuple[Future[None], ...]
    to_stain: bool = False
    """Whether they are those that are stained anew, and in the store already."""


@dataclass(frozen=True)
class End:
    """The end of a slide: of what was `ready`, else it was kept by another process, or something is wrong with it."""

    held: Held
    ready: Ready | None = None
    stained: NDArray[np.int64] | None = None
    """Rows of the tiles that are stained anew."""


class TileReader:
    """Opens the slides that a planner has leased and has their tiles read; `next` gives batches and ends, in order.

    A thread of its own, and a few that prepare slides. The readers' memory bounds how far they read ahead: whoever has
    done with a batch gives it back.
    """

    def __init__(
        self,
        planner: Planner,
        readers: Readers,
        store: StoreWriter,
        batch_size: int,
        faults: Faults,
        stop: threading.Event,
        asked: Asked,
    ) -> None:
        self._planner, self._readers, self._store, self._faults = planner, readers, store, faults
        self._batch_size, self._asked, self._stop = batch_size, asked, stop
        recipe = recipe_of(store.contract)
        self._out_px, self._interpolation = recipe.input_px, recipe.interpolation
        tile = store.contract.tile
        self._tile = TileSize(tile["size_um"], tile["size_level0_px"])
        self._items: queue.Queue[TileBatch | End | BaseException | None] = queue.Queue()
        self._preparing = ThreadPoolExecutor(slides_open(readers.workers), thread_name_prefix="preparing")
        self._thread = threading.Thread(target=self._run, name="tiles", daemon=True)
        self._active: dict[str, Ready] = {}
        self._turns = itertools.count()
        """Which reader has the first stripe of the next slide: each has its turn."""

    def __enter__(self) -> TileReader:
        self._memory = self._readers.memory()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(self._memory)):
            self._free.put(number)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._planner.wake()
        self._thread.join()
        self._preparing.shutdown(wait=True, cancel_futures=True)

    def next(self, wait: bool = True) -> TileBatch | End | None:
        """Return what comes next, None when all slides have ended. Raises queue.Empty where nothing comes soon, or
        where nothing is there and there is no `wait`.
        """
        item = self._items.get(wait, _LOOK_SECONDS)
        if isinstance(item, BaseException):
            raise item
        return item

    def result(self, batch: TileBatch) -> NDArray[np.uint8]:
        """Wait for a batch's tiles, b × h × w × 3. Raises what came up while they were read."""
        for part in batch.parts:
            part.result()
        return self._memory[batch.number][: len(batch.rows)]

    def give_back(self, batch: TileBatch) -> None:
        """Let others be read where a batch was, when nothing writes there any more."""
        wait([part for part in batch.parts if not part.cancel()])
        self._free.put(batch.number)

    def unfinished(self) -> list[Ready]:
        """Return the slides that were ready and have not ended."""
        return list(self._active.values())

    def close(self, held: Held) -> None:
        """Close a slide, and make room for the next. Any thread may call it."""
        self._active.pop(held.key, None)
        self._readers.close(held.key)
        self._planner.release(held)

    def _run(self) -> None:
        slides = ahead(self._prepared(), lambda _: None, self._stop.is_set, 1 << 20)
        try:
            for held, preparing in slides:
                self._items.put(self._take(held, preparing))
            self._items.put(None)
        except BaseException as error:  # handed to the calling thread, which raises it
            self._items.put(error)
        slides.close()  # not before: it waits for the thread that leases, which waits for the end to be asked for

    def _prepared(self) -> Iterator[tuple[Held, Future[Ready | None]]]:
        for held in self._planner:
            if self._stop.is_set():
                return
            yield held, self._preparing.submit(self._prepare, held)

    def _take(self, held: Held, preparing: Future[Ready | None]) -> End:
        """Have a slide read to its end."""
        end = End(held)
        try:
            ready = preparing.result()
            if ready is not None:
                end = self._read(ready)
        except (*OF_ONE_SLIDE, MemoryError) as error:
            self._faults.put(held.key, str(error) or type(error).__name__)
        self._planner.all_begun(held.key)
        return end

    def _prepare(self, held: Held) -> Ready | None:
        """Open a slide and find its place in the store; None where another process has embedded it meanwhile."""
        row, record = held.row, self._store.record(held.key)
        wanted = Wanted.of(row, self._asked.stain_shift, record)
        if decide(record, wanted, self._asked.redo_changed) is not Todo.embed:
            return None
        ask = Ask(row, held.image, self._tile, self._store.contract.grid, self._out_px, self._interpolation)
        ask = replace(ask, decode=self._asked.decode)
        opened = self._readers.open(ask).result()
        spots, resolved = opened.spots, opened.resolved
        check_tiles(record, spots, resolved, wanted, self._asked.redo_changed)
        writer = self._store.slide(
            wanted.row, wanted.image, spots, resolved, wanted.expression, lease=held.lease, seen=wanted.seen
        )
        overview = self._readers.overview(ask)
        self._planner.opened(row.slide_id, len(spots) - writer.rows)
        notices = (*held.notices, *opened.notices)
        size = resolved.tile_level0_px
        by = stripes(spots.xy, self._readers.workers, next(self._turns))
        ready = Ready(held, ask, spots.xy, by, size, _spot_width(held, opened), writer, overview, notices)
        self._active[ready.key] = ready
        return ready

    def _read(self, ready: Ready) -> End:
        n, writer = len(ready.xy), ready.writer
        for start in range(writer.rows, n, self._batch_size):
            rows = np.arange(start, min(start + self._batch_size, n))
            if not self._begin(ready, rows):
                break
            self._planner.begun(ready.key, len(rows))
        wanted = self._asked.stain_shift and ready.held.row.expression is not None
        if not wanted or writer.has_stain_shift:
            return End(ready.held, ready)
        stained = tiles_for_shift(n)
        for start in range(0, len(stained), self._batch_size):
            if not self._begin(ready, stained[start : start + self._batch_size], to_stain=True):
                break
        return End(ready.held, ready, stained)

    def _begin(self, ready: Ready, rows: NDArray[np.int64], to_stain: bool = False) -> bool:
        """Have the tiles of `rows` read, in parts, so that all readers are at work on a batch; say whether to go on."""
        number = None
        while number is None:
            if self._stop.is_set() or self._faults.of(ready.key) is not None:
                return False
            with suppress(queue.Empty):
                number = self._free.get(timeout=_LOOK_SECONDS)
        at, by = np.arange(len(rows)), ready.by[rows]
        groups = [at[by == reader] for reader in np.unique(by)] if self._readers.apart else [at]
        parts = [group[start : start + _PART] for group in groups for start in range(0, len(group), _PART)]
        size = ready.tile_level0_px
        reads = [
            self._readers.read(ready.ask, size, ready.xy[rows[part]], number, part, int(by[part[0]])) for part in parts
        ]
        self._items.put(TileBatch(ready, rows, number, tuple(reads), to_stain))
        return True


def stripes(xy: NDArray[np.float64], readers: int, first: int) -> NDArray[np.int64]:
    """Return which of so many readers each of n tiles (n × 2 centres) is best read by.

    Each has a stripe of the slide from top to bottom, with as many tiles as the others': tiles beside and below each
    other share pieces of the image, which are then decoded once. A slide of few tiles is for few of them, from the
    `first` on.
    """
    n = min(readers, max(1, len(xy) // _LEAST_STRIPE))
    rank = np.empty(len(xy), np.int64)
    rank[np.argsort(xy[:, 0], kind="stable")] = np.arange(len(xy))
    return (rank * n // max(len(xy), 1) + first) % readers


def _spot_width(held: Held, opened: Opened) -> float:
    """Return how wide a spot is drawn, level-0 px: as its file says, else as on ST and Visium half of the pitch; a tile
    of a grid is as wide as it is.
    """
    size = opened.resolved.tile_level0_px
    if held.row.expression is None:
        return size
    return opened.spots.diameter_px or pitch_px(opened.spots.xy) / 2 or size
