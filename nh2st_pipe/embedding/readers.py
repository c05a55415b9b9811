"""Slides opened and tiles read ahead of the encoder, in threads, across slide borders."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import OF_ONE_SLIDE, listed
from nh2st_pipe.core.lease import Lease
from nh2st_pipe.embedding.plan import Todo, Wanted, check_tiles, decide, recipe_of
from nh2st_pipe.embedding.staging import Stage, ahead
from nh2st_pipe.encoders.stains import tiles_for_shift
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import read_tile, smaller, thumbnail
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.store.format import Picture, Resolved
from nh2st_pipe.store.write import SlideWriter, StoreWriter
from nh2st_pipe.tiles.lattice import pitch_px
from nh2st_pipe.tiles.layout import doubts_on_tissue, lay_out
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.masks import tissue_files
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots

__all__ = ["NEIGHBOURS", "Item", "Job", "Readers", "finish"]

NEIGHBOURS = 9

_THUMBNAIL_PX = 768

_TILES_AHEAD = 256

_PART = 32  # tiles of a batch that one thread reads

_LOOK_SECONDS = 0.2  # between looks at whether the end was asked for

_SECONDS_AHEAD = 10.0  # in which slides may be leased beyond this process's share

_BUSY_SECONDS = 0.5  # between looks at slides that another process has leased


@dataclass(frozen=True)
class Overview:
    """What a look at the whole slide gives."""

    picture: NDArray[np.uint8]
    scale: float
    """Px of the picture per level-0 px."""
    doubts: tuple[str, ...]
    tissue: Mapping[str, bytes]
    """The tissue as files, by name."""


@dataclass
class Job:
    """One slide under way."""

    row: SlideRow
    wanted: Wanted
    lease: Lease | None = None
    slide: Slide | None = None
    spots: Spots | None = None
    writer: SlideWriter | None = None
    tile_level0_px: float = 0.0
    tissue: NDArray[np.bool_] | None = None
    """What a grid was laid over."""
    made: NDArray[np.uint8] | None = None
    """A thumbnail that was made for that."""
    kept: bool = False
    """Whether another process finished it before this one had the lease."""
    failed: str | None = None
    notices: list[str] = field(default_factory=list)
    """What a person should know of the slide, short of an error."""
    neighbours: Future[tuple[NDArray[np.int32], NDArray[np.float64]]] | None = None
    picture: Future[Overview] | None = None
    stained: tuple[NDArray[np.int64], Batch] | None = None
    """Rows of the tiles that are stained anew, and those tiles."""
    reads: list[Future[Any]] = field(default_factory=list)
    """Whatever reads from the slide in another thread."""
    staged: Path | None = None
    """Where its image is read from, if that is not where the manifest says."""

    def close(self) -> None:
        """Close the slide, when nothing reads from it any more, and give back the lease."""
        # What was cancelled before it began is never waited for: a pool that has been shut down does not say so.
        wait([read for read in self.reads if not read.cancel()])
        self.reads.clear()
        if self.slide is not None:
            self.slide.close()
            self.slide = None
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    @property
    def cause(self) -> str | None:
        """Why it failed, in words that name the manifest's own file."""
        if self.failed is None or self.staged is None:
            return self.failed
        return self.failed.replace(str(self.staged), str(self.row.slide))


@dataclass
class Item:
    """What the reader side hands over: a batch being read, or (no batch) the end of a slide."""

    job: Job
    batch: Batch | None = None


class Batch:
    """Tiles b × h × w × 3 that several threads are reading."""

    def __init__(self, tiles: NDArray[np.uint8], parts: list[Future[None]]) -> None:
        self._tiles, self.parts = tiles, parts

    def result(self) -> NDArray[np.uint8]:
        """Wait for the tiles. Raises what came up while they were read."""
        for part in self.parts:
            part.result()
        return self._tiles


class Readers:
    """Opens slides and reads tiles ahead of the encoder, in threads; iterating gives items in order.

    One thread leases slides, one of a few prepares each (decides what is to be done about it, reads its spots or finds
    its tissue), and the planner hands batches of tiles to a pool, slide after slide. The queue between it and the
    encoder bounds the memory, as does the number of open slides. A slide that another process has leased is come back
    to. `check` is called while an item is waited for, and raises what is
    to end that; `blank` gives the memory that tiles are read into; `turn` is entered
    while a batch is read, where several share a process.
    """

    def __init__(
        self,
        jobs: list[Job],
        store: StoreWriter,
        batch_size: int,
        workers: int,
        check: Callable[[], None],
        redo_changed: bool = False,
        say: Callable[[str], None] = lambda words: None,
        blank: Callable[[tuple[int, ...]], NDArray[np.uint8]] = lambda shape: np.empty(shape, np.uint8),
        stage: Path | None = None,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._jobs, self._store, self._batch_size = jobs, store, batch_size
        self._check, self._redo, self._say, self._blank = check, redo_changed, say, blank
        self._turn = turn or nullcontext()
        recipe = recipe_of(store.contract)
        self._out_px, self._interpolation = recipe.input_px, recipe.interpolation
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(max(3, _TILES_AHEAD // batch_size))
        most_open = slides_open(workers)
        self._open = threading.Semaphore(most_open)
        self._stop = threading.Event()
        self._stage = None if stage is None else Stage(stage, self._stop.is_set, most_open + 1)
        self._openers = ThreadPoolExecutor(most_open, thread_name_prefix="opener")
        self._leases = threading.Condition()
        self._to_read = 0
        """Slides that are leased, and not yet with the pool to their last tile."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._tiles_known = self._slides_known = self._tiles_begun = 0
        self._began = 0.0
        self._left: dict[str, int] = {}
        """Tiles of each prepared slide that are not yet with the pool."""

    def __enter__(self) -> Readers:
        if self._stage is not None:
            self._stage.__enter__()
        self._planner.start()
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        self._stop.set()
        self._open.release()
        if self._stage is not None:
            self._stage.room.release()
        with self._leases:
            self._leases.notify_all()
        while self._planner.is_alive():  # it may be waiting for room in the queue
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._openers.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for job in self._jobs:
            try:
                if kind is not None and job.writer is not None and job.failed is None and job.slide is not None:
                    job.writer.checkpoint()  # interrupted: keep what was encoded
            finally:
                job.close()
        if self._stage is not None:
            self._stage.__exit__()

    def __iter__(self) -> Iterator[Item]:
        while True:
            self._check()
            try:
                item = self._queue.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self, job: Job) -> None:
        """Close a slide, so that the next may be opened. Any thread may call it."""
        job.close()
        self._open.release()
        if self._stage is not None:
            if job.staged is not None:
                self._stage.delete(job.staged)
            self._stage.room.release()

    def expected_tiles(self) -> float:
        """Return the tiles of the slides opened so far, and as many again on average for each of the others."""
        known = max(self._slides_known, 1)
        return self._tiles_known * len(self._jobs) / known

    def _plan(self) -> None:
        slides = ahead(self._opened(), lambda _: None, self._stop.is_set, len(self._jobs))
        try:
            for job, prepared in slides:
                self._take(job, prepared)
            self._queue.put(None)
        except BaseException as error:  # handed to the calling thread, which raises it
            self._queue.put(error)
        slides.close()  # not before: it waits for the thread that leases, which waits for the end to be asked for

    def _opened(self) -> Iterator[tuple[Job, Future[None]]]:
        """Yield the jobs as this process has their leases, each with its preparation under way."""
        if self._stage is None:
            for job in self._leased(self._open):
                yield job, self._openers.submit(self._prepare, job)
            return
        for job in ahead(self._leased(self._stage.room), self._staged, self._stop.is_set):
            self._open.acquire()
            if self._stop.is_set():
                return
            yield job, self._openers.submit(self._prepare, job)

    def _leased(self, room: threading.Semaphore) -> Iterator[Job]:
        """Yield the jobs as this process has their leases, each when there is room for one more."""
        todo = list(self._jobs)
        while todo:
            busy = list[Job]()
            for number, job in enumerate(todo):
                self._wait_to_lease(len(todo) - number)
                room.acquire()
                if self._stop.is_set():
                    room.release()  # whoever waits for it next has to see the end too
                    return
                lease = self._store.lease(job.row.slide_id)
                if lease.take():
                    job.lease = lease
                    with self._leases:
                        self._to_read += 1
                    yield job
                else:
                    room.release()
                    busy.append(job)
            if busy and len(busy) == len(todo):
                self._stop.wait(_BUSY_SECONDS)
            elif busy:
                self._say(f"{listed(job.row.slide_id for job in busy)}: under way in another process, waited for")
            todo = busy

    def _wait_to_lease(self, left: int) -> None:
        """Wait until the next of `left` slides may be leased.

        Those that wait here to be read may be half as many as are left: more would be missed by other processes, which
        stand idle at the end. One is staged all the same, and whatever is needed in the next seconds.
        """
        most = max(left // 2, self._stage is not None)
        while not self._stop.is_set() and self._to_read > most and self._seconds_to_read() > _SECONDS_AHEAD:
            with self._leases:
                self._leases.wait(_LOOK_SECONDS)

    def _seconds_to_read(self) -> float:
        """Return how long the tiles of leased slides will last, at the pace until now; infinity where one is not
        prepared yet, or nothing was read.
        """
        if not self._tiles_begun or self._to_read > len(self._left):
            return float("inf")
        pace = self._tiles_begun / (time.monotonic() - self._began)
        return sum(list(self._left.values())) / pace

    def _staged(self, job: Job) -> None:
        """Copy a slide to the stage, unless another process has embedded it meanwhile."""
        assert self._stage is not None
        try:
            if decide(self._store.record(job.row.slide_id), job.wanted, self._redo) is not Todo.embed:
                return
        except (*OF_ONE_SLIDE, MemoryError):
            return  # as whoever takes it will see
        job.staged, why = self._stage.copy(job.row.slide)
        if why is not None:
            job.notices.append(why)

    def _take(self, job: Job, prepared: Future[None]) -> None:
        """Read a slide whose lease is held, to its end."""
        try:
            prepared.result()
            self._submit(job)
        except (*OF_ONE_SLIDE, MemoryError) as error:
            job.failed = str(error) or type(error).__name__
        self._left.pop(job.row.slide_id, None)
        with self._leases:
            self._to_read -= 1
            self._leases.notify_all()
        self._queue.put(Item(job))

    def _prepare(self, job: Job) -> None:
        row, wanted = job.row, job.wanted
        record = self._store.record(row.slide_id)
        if decide(record, wanted, self._redo) is not Todo.embed:
            job.kept = True
            return
        slide = job.slide = open_slide(job.staged or row.slide)
        contract_tile = self._store.contract.tile
        size_of_tile = TileSize(contract_tile["size_um"], contract_tile["size_level0_px"])
        layout = lay_out(row, slide, size_of_tile, self._store.contract.grid, input_px=self._out_px)
        spots, size, resolution = layout.spots, layout.size_level0_px, layout.resolution
        resolved = Resolved(
            width=slide.size[0],
            height=slide.size[1],
            mpp=resolution.mpp,
            mpp_source=resolution.source,
            tile_level0_px=size,
            reader=slide.reader,
        )
        check_tiles(record, spots, resolved, wanted, self._redo)
        job.notices += [*layout.notes, *layout.doubts]
        job.spots, job.tile_level0_px = spots, size
        job.tissue, job.made = layout.tissue, layout.picture
        job.writer = self._store.slide(wanted.row, wanted.image, spots, resolved, wanted.expression, job.lease)
        job.neighbours = self._pool.submit(nearest_spots, spots.xy, NEIGHBOURS)
        with self._leases:
            self._left[row.slide_id] = len(spots) - job.writer.rows
            self._tiles_known += self._left[row.slide_id]
            self._slides_known += 1

    def _submit(self, job: Job) -> None:
        if job.kept:
            return
        assert job.slide is not None
        assert job.spots is not None
        assert job.writer is not None
        n = len(job.spots)
        for start in range(job.writer.rows, n, self._batch_size):
            if self._stop.is_set() or job.failed is not None:
                return
            self._began = self._began or time.monotonic()
            rows = np.arange(start, min(start + self._batch_size, n))
            batch = self._begin(job, rows)
            job.reads = [read for read in job.reads if not read.done()] + batch.parts
            self._queue.put(Item(job, batch))
            self._tiles_begun += len(rows)
            self._left[job.row.slide_id] -= len(rows)
        if job.wanted.stain_shift and not job.writer.has_stain_shift:
            rows = tiles_for_shift(n)
            job.stained = rows, self._begin(job, rows)
            job.reads += job.stained[1].parts
        job.picture = self._pool.submit(_look, job.slide, job.row, job.spots, job.tissue, job.made)
        job.reads.append(job.picture)

    def _begin(self, job: Job, rows: NDArray[np.int64]) -> Batch:
        """Have the pool read the tiles of `rows`, in parts, so that all of it is at work on a batch."""
        tiles = self._blank((len(rows), self._out_px, self._out_px, 3))
        parts = [slice(start, start + _PART) for start in range(0, len(rows), _PART)]
        return Batch(tiles, [self._pool.submit(self._read, job, rows[part], tiles[part]) for part in parts])

    def _read(self, job: Job, rows: NDArray[np.int64], tiles: NDArray[np.uint8]) -> None:
        slide = job.slide
        assert slide is not None
        assert job.spots is not None
        with self._turn:
            for i, (x, y) in enumerate(job.spots.xy[rows]):
                tiles[i] = read_tile(slide, (float(x), float(y)), job.tile_level0_px, self._out_px, self._interpolation)


def slides_open(workers: int) -> int:
    """Return how many slides may be open beside so many readers: what is read, and what is prepared meanwhile. A plain
    image is in memory while it is open.
    """
    return 1 + min(max(workers // 4, 1), 3)


def _look(
    slide: Slide,
    row: SlideRow,
    spots: Spots,
    tissue: NDArray[np.bool_] | None,
    made: NDArray[np.uint8] | None,
) -> Overview:
    """Make the thumbnail, hold spots against the tissue on it, and put that into words and pictures for others."""
    if made is None:
        picture, scale = thumbnail(slide, _THUMBNAIL_PX)
    else:
        picture = smaller(made, _THUMBNAIL_PX)
        scale = picture.shape[1] / slide.size[0]
    doubts = list[str]()
    if tissue is None:
        tissue, doubts = doubts_on_tissue(spots, slide, picture, row.tissue)
    return Overview(picture, scale, tuple(doubts), tissue_files(tissue, slide))


def _spot_width(job: Job) -> float:
    """Return how wide a spot is drawn, level-0 px: as its file says, else as on ST and Visium half of the pitch; a tile
    of a grid is as wide as it is.
    """
    assert job.spots is not None
    if job.row.expression is None:
        return job.tile_level0_px
    return job.spots.diameter_px or pitch_px(job.spots.xy) / 2 or job.tile_level0_px


def finish(job: Job) -> None:
    """Write what needs the whole slide: neighbours, thumbnail, completion mark."""
    assert job.writer is not None
    assert job.neighbours is not None
    assert job.picture is not None
    indices, distances = job.neighbours.result()
    seen = job.picture.result()
    job.notices += seen.doubts
    job.writer.finish(
        indices,
        distances,
        seen.picture,
        Picture(scale=seen.scale, spot_px=_spot_width(job)),
        seen.tissue,
    )
