"""Slides opened and tiles read ahead of the encoder, in threads, across slide borders."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import NH2STError
from nh2st_pipe.recipes.encoder import EncoderRecipe
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.resolution import TileSize, choose_mpp
from nh2st_pipe.store.write import SlideWriter, StoreWriter
from nh2st_pipe.tiles.grid import check_on_image, file_order, grid_spots
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["NEIGHBOURS", "Item", "Job", "Readers", "finish"]

NEIGHBOURS = 9

_THUMBNAIL_PX = 768

_TILES_AHEAD = 256

_SLIDES_OPEN = 2  # a plain image is in memory while it is open


@dataclass
class Job:
    """One slide under way."""

    row: SlideRow
    source: dict[str, Any]
    slide: Slide | None = None
    spots: Spots | None = None
    writer: SlideWriter | None = None
    tile_level0_px: float = 0.0
    failed: str | None = None

    def close(self) -> None:
        """Close the slide, if it is open."""
        if self.slide is not None:
            self.slide.close()
            self.slide = None


@dataclass
class Item:
    """What the reader side hands over: a batch being read, or (no batch) the end of a slide."""

    job: Job
    batch: Future[NDArray[np.uint8]] | None = None


class Readers:
    """Opens slides and reads tiles ahead of the encoder, in threads; iterating gives items in order.

    One thread plans: it opens the next slide, reads its spots and hands batches of tiles to a pool. The queue
    between it and the encoder bounds the memory, and at most two slides are open.
    """

    def __init__(self, jobs: list[Job], store: StoreWriter, batch_size: int, workers: int) -> None:
        self._jobs, self._store, self._batch_size = jobs, store, batch_size
        recipe = EncoderRecipe.model_validate(store.contract.encoder)
        self._out_px, self._interpolation = recipe.input_px, recipe.interpolation
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(max(2, _TILES_AHEAD // batch_size))
        self._open = threading.Semaphore(_SLIDES_OPEN)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._tiles_known = self._slides_known = 0

    def __enter__(self) -> Readers:
        self._planner.start()
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        self._stop.set()
        self._open.release()
        while self._planner.is_alive():  # it may be waiting for room in the queue
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for job in self._jobs:
            if kind is not None and job.writer is not None and job.failed is None and job.slide is not None:
                job.writer.checkpoint()  # interrupted: keep what was encoded
            job.close()

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self, job: Job) -> None:
        """Close a slide, so that the next may be opened."""
        job.close()
        self._open.release()

    def expected_tiles(self) -> float:
        """Return the tiles of the slides opened so far, and as many again on average for each of the others."""
        known = max(self._slides_known, 1)
        return self._tiles_known * len(self._jobs) / known

    def _plan(self) -> None:
        try:
            for job in self._jobs:
                self._open.acquire()
                if self._stop.is_set():
                    return
                try:
                    self._prepare(job)
                    self._submit(job)
                except (NH2STError, MemoryError) as error:
                    job.failed = str(error) or type(error).__name__
                self._queue.put(Item(job))
            self._queue.put(None)
        except BaseException as error:  # handed to the calling thread, which raises it
            self._queue.put(error)

    def _prepare(self, job: Job) -> None:
        row = job.row
        slide = job.slide = open_slide(row.slide)
        mpp, mpp_source, notice = choose_mpp(row.mpp, slide.mpp)
        contract_tile = self._store.contract.tile
        size = TileSize(contract_tile["size_um"], contract_tile["size_level0_px"]).on_slide(mpp, slide)
        if row.expression is not None:
            spots = read_spots(row.expression)
            check_on_image(spots, slide)
        else:
            from nh2st_pipe.tiles.tissue import tissue_mask

            spots = grid_spots(tissue_mask(slide, row.tissue), size, slide)
        spots = spots.take(file_order(spots.xy))
        if notice:
            spots = Spots(**{**vars(spots), "notices": (*spots.notices, notice)})
        image: dict[str, Any] = {
            "path": str(row.slide),
            "width": slide.size[0],
            "height": slide.size[1],
            "mpp_source": mpp_source,
            "tile_level0_px": size,
            "fingerprint": job.source["image"],
        }
        uns = {"image": image if mpp is None else {**image, "mpp": mpp}}
        job.spots, job.tile_level0_px = spots, size
        job.writer = self._store.slide(row.slide_id, spots, job.source, uns)
        self._tiles_known += len(spots) - job.writer.rows
        self._slides_known += 1

    def _submit(self, job: Job) -> None:
        assert job.spots is not None
        assert job.writer is not None
        n = len(job.spots)
        for start in range(job.writer.rows, n, self._batch_size):
            if self._stop.is_set() or job.failed is not None:
                return
            stop = min(start + self._batch_size, n)
            self._queue.put(Item(job, self._pool.submit(self._read, job, start, stop)))

    def _read(self, job: Job, start: int, stop: int) -> NDArray[np.uint8]:
        slide = job.slide
        assert slide is not None
        assert job.spots is not None
        tiles = np.empty((stop - start, self._out_px, self._out_px, 3), np.uint8)
        for i, (x, y) in enumerate(job.spots.xy[start:stop]):
            tiles[i] = read_tile(slide, (float(x), float(y)), job.tile_level0_px, self._out_px, self._interpolation)
        return tiles


def finish(job: Job) -> None:
    """Write what needs the whole slide: neighbours, thumbnail, completion mark."""
    assert job.spots is not None
    assert job.writer is not None
    assert job.slide is not None
    indices, distances = nearest_spots(job.spots.xy, NEIGHBOURS)
    picture, scale = thumbnail(job.slide, _THUMBNAIL_PX)
    job.writer.finish(
        indices,
        distances,
        {
            job.row.slide_id: {
                "images": {"lowres": picture},
                "scalefactors": {
                    "tissue_lowres_scalef": scale,
                    "spot_diameter_fullres": job.tile_level0_px,
                },
            }
        },
    )
