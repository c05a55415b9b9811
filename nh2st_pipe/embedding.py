"""Stage one: every tile of every slide through a frozen encoder, once, into the store.

Reader threads cut tiles ahead of the encoder, across slide borders; the encoder and the writing share the
calling thread. A slide that cannot be read is named and passed over. Whatever is interrupted goes on where it
was, and a finished slide is never touched again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import NH2STError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.encoders.weights import Weights, find_weights
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision, load_encoder_recipe
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.resolution import TileSize, choose_mpp
from nh2st_pipe.store.format import Contract, fingerprint
from nh2st_pipe.store.read import Store, check_contract, open_store
from nh2st_pipe.store.write import SlideWriter, StoreWriter
from nh2st_pipe.tiles.grid import check_on_image, file_order, grid_spots
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["DEFAULT_ENCODER", "NEIGHBOURS", "EmbedSummary", "embed"]

DEFAULT_ENCODER = "h-optimus-0"
NEIGHBOURS = 9
_THUMBNAIL_PX = 768
_TILES_AHEAD = 256
_SLIDES_OPEN = 2  # a plain image is in memory while it is open


@dataclass
class EmbedSummary:
    """What one call of `embed` did."""

    store: Path
    encoded_tiles: int = 0
    done: list[str] = field(default_factory=list)
    """Slides finished by this call."""
    kept: list[str] = field(default_factory=list)
    """Slides that were complete already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Slides passed over, each with its cause."""
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("encoder", "reading", "writing"), 0.0))
    """Where the time of the calling thread went: in the encoder, waiting for tiles, writing; and `total`."""

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {**vars(self), "store": str(self.store)}


def embed(
    slides: str | Path,
    *,
    encoder: str | Path | EncoderRecipe | None = None,
    weights: str | Path | None = None,
    store: str | Path = "store.zarr",
    views: int | None = None,
    tile_um: float | None = None,
    tile_px: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Precision | None = None,
    redo_changed: bool = False,
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed the slides of the manifest `slides` into `store`.

    `encoder` is a recipe, its name or its YAML file; `weights` a file that takes the place of the hub's. `views` is 1
    or 8. The tile's side is `tile_um` (µm) or `tile_px` (level-0 px). What is left None is as in the store
    where there is one, else the recipe's default (1 view). `precision` None is the recipe's on a GPU and float32
    on a CPU. `redo_changed` embeds slides anew whose files have changed.

    Raises ManifestError, UsageError, EncoderError and StoreError before any work; faults of single slides are
    in the summary.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    if tile_um is not None and tile_px is not None:
        raise UsageError("give the tile's size in µm or in px, not both")
    if views not in (None, 1, 8):
        raise UsageError(f"--views takes 1 or 8, not {views}")
    rows = read_manifest(slides)
    path = Path(store)
    existing = open_store(path) if path.is_dir() and any(path.iterdir()) else None
    recipe = _choose_recipe(encoder, existing)
    found = find_weights(recipe, None if weights is None else Path(weights))
    contract = _contract(recipe, found, existing, views, tile_um, tile_px, precision, device)
    if existing is not None:
        check_contract(existing, contract)

    summary = EmbedSummary(store=path)
    todo = _pending(rows, existing, redo_changed, summary)
    if todo:
        # Loaded before the store is made, so that weights that do not fit leave nothing behind.
        from nh2st_pipe.core.devices import pick_device
        from nh2st_pipe.encoders.load import load_encoder

        encoder_on_device = load_encoder(
            recipe,
            found.path,
            device=pick_device(device),
            precision=contract.precision,  # type: ignore[arg-type]
        )
        size = batch_size or (8 if encoder_on_device.device.type == "cpu" else 64)
    with StoreWriter(path, contract) as writer:
        writer.record([row for row in rows if row.slide_id not in summary.failed])
        if todo:
            _run(todo, writer, encoder_on_device.encode, size, workers or 2, summary, progress)
    summary.seconds["total"] = time.perf_counter() - began
    return summary


def _choose_recipe(encoder: str | Path | EncoderRecipe | None, existing: Store | None) -> EncoderRecipe:
    if isinstance(encoder, EncoderRecipe):
        return encoder
    if encoder is not None or existing is None:
        return load_encoder_recipe(encoder or DEFAULT_ENCODER)
    return EncoderRecipe.model_validate(existing.contract.encoder)


def _contract(
    recipe: EncoderRecipe,
    weights: Weights,
    existing: Store | None,
    views: int | None,
    tile_um: float | None,
    tile_px: float | None,
    precision: Precision | None,
    device: str,
) -> Contract:
    """Say what all slides of the store have in common, from what was asked for, the store, or the recipe."""
    old = existing.contract if existing else None
    for name, value in (("--tile-um", tile_um), ("--tile-px", tile_px)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UsageError(f"{name} takes a positive number, not {value}")
    if tile_um is not None or tile_px is not None:
        tile = TileSize(tile_um, tile_px).record()
    else:
        tile = old.tile if old else TileSize(um=recipe.input_px * recipe.mpp).record()
    if precision is None:
        precision = old.precision if old else _auto_precision(recipe, device)  # type: ignore[assignment]
    assert precision is not None
    return Contract(
        encoder=recipe.model_dump(mode="json"),
        identity=recipe.identity(),
        weights_sha256=weights.sha256,
        weights_source=weights.source,
        precision=precision,
        tile=tile,
        views=views or (old.views if old else 1),
    )


def _auto_precision(recipe: EncoderRecipe, device: str) -> Precision:
    from nh2st_pipe.core.devices import pick_device

    return recipe.precision if pick_device(device).type == "cuda" else "float32"


def _source(row: SlideRow) -> dict[str, Any]:
    """What decides a slide's embeddings besides the contract."""
    files = {"image": row.slide, "expression": row.expression, "tissue": row.tissue}
    return {**{name: fingerprint(file) if file else None for name, file in files.items()}, "mpp": row.mpp}


def _pending(
    rows: list[SlideRow], existing: Store | None, redo_changed: bool, summary: EmbedSummary
) -> list[tuple[SlideRow, dict[str, Any]]]:
    """Return the slides still to embed, each with its source; the others go into the summary."""
    todo = []
    for row in rows:
        source = _source(row)
        state = existing.state(row.slide_id) if existing else None
        if state is None or not state.complete:
            todo.append((row, source))  # the writer goes on with it, or begins anew where its source changed
        elif state.source == source:
            summary.kept.append(row.slide_id)
        elif redo_changed:
            todo.append((row, source))
        else:
            changed = [name for name in source if state.source.get(name) != source[name]]
            summary.failed[row.slide_id] = (
                f"its {' and '.join(changed)} changed since it was embedded; "
                "embed it anew with --redo-changed, or give the changed slide another slide_id"
            )
    return todo


@dataclass
class _Job:
    """One slide under way."""

    row: SlideRow
    source: dict[str, Any]
    slide: Slide | None = None
    spots: Spots | None = None
    writer: SlideWriter | None = None
    tile_level0_px: float = 0.0
    failed: str | None = None

    def close(self) -> None:
        if self.slide is not None:
            self.slide.close()
            self.slide = None


@dataclass
class _Item:
    """What the reader side hands over: a batch being read, or (no batch) the end of a slide."""

    job: _Job
    batch: Future[NDArray[np.uint8]] | None = None


def _run(
    todo: list[tuple[SlideRow, dict[str, Any]]],
    store: StoreWriter,
    encode: Callable[[NDArray[np.uint8], int], NDArray[np.float16]],
    batch_size: int,
    workers: int,
    summary: EmbedSummary,
    progress: Progress,
) -> None:
    jobs = [_Job(row, source) for row, source in todo]
    views = store.contract.views
    progress.start("embedding", len(jobs), "tiles")
    with _Readers(jobs, store, batch_size, workers) as readers:
        for item in readers:
            job = item.job
            try:
                if job.failed is None and item.batch is not None:
                    with _timed(summary, "reading"):
                        tiles = item.batch.result()
                    with _timed(summary, "encoder"):
                        embeddings = encode(tiles, views)
                    with _timed(summary, "writing"):
                        assert job.writer is not None
                        job.writer.append(embeddings)
                    summary.encoded_tiles += len(tiles)
                    progress.advance(summary.encoded_tiles, readers.expected_tiles(), job.row.slide_id)
                elif job.failed is None:
                    with _timed(summary, "writing"):
                        _finish(job)
                    summary.done.append(job.row.slide_id)
            except (NH2STError, OSError, MemoryError) as error:
                if isinstance(error, OSError) and not isinstance(error, NH2STError) and error.errno is not None:
                    raise  # the disk is full or gone: no slide's own fault
                if isinstance(error, NH2STError) and not _of_one_slide(error):
                    raise
                job.failed = str(error) or type(error).__name__
            if item.batch is None:
                readers.release(job)
                if job.failed is not None:
                    summary.failed[job.row.slide_id] = job.failed
                    progress.say(f"{job.row.slide_id} passed over: {job.failed}")
                elif job.spots is not None:
                    summary.notices += [f"{job.row.slide_id}: {notice}" for notice in job.spots.notices]
                    progress.say(f"{job.row.slide_id}: {len(job.spots):,} tiles done")
                job.spots = job.writer = None  # counts of a thousand slides are not for keeping


def _of_one_slide(error: NH2STError) -> bool:
    from nh2st_pipe.core.errors import ExpressionError, SlideError

    return isinstance(error, (SlideError, ExpressionError))


@contextmanager
def _timed(summary: EmbedSummary, what: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        summary.seconds[what] += time.perf_counter() - start


class _Readers:
    """Opens slides and reads tiles ahead of the encoder, in threads; iterating gives items in order.

    One thread plans: it opens the next slide, reads its spots and hands batches of tiles to a pool. The queue
    between it and the encoder bounds the memory, and at most two slides are open.
    """

    def __init__(self, jobs: list[_Job], store: StoreWriter, batch_size: int, workers: int) -> None:
        self._jobs, self._store, self._batch_size = jobs, store, batch_size
        recipe = EncoderRecipe.model_validate(store.contract.encoder)
        self._out_px, self._interpolation = recipe.input_px, recipe.interpolation
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(max(2, _TILES_AHEAD // batch_size))
        self._open = threading.Semaphore(_SLIDES_OPEN)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._tiles_known = self._slides_known = 0

    def __enter__(self) -> _Readers:
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

    def __iter__(self) -> Iterator[_Item]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self, job: _Job) -> None:
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
                self._queue.put(_Item(job))
            self._queue.put(None)
        except BaseException as error:  # handed to the calling thread, which raises it
            self._queue.put(error)

    def _prepare(self, job: _Job) -> None:
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

    def _submit(self, job: _Job) -> None:
        assert job.spots is not None
        assert job.writer is not None
        n = len(job.spots)
        for start in range(job.writer.rows, n, self._batch_size):
            if self._stop.is_set() or job.failed is not None:
                return
            stop = min(start + self._batch_size, n)
            self._queue.put(_Item(job, self._pool.submit(self._read, job, start, stop)))

    def _read(self, job: _Job, start: int, stop: int) -> NDArray[np.uint8]:
        slide = job.slide
        assert slide is not None
        assert job.spots is not None
        tiles = np.empty((stop - start, self._out_px, self._out_px, 3), np.uint8)
        for i, (x, y) in enumerate(job.spots.xy[start:stop]):
            tiles[i] = read_tile(slide, (float(x), float(y)), job.tile_level0_px, self._out_px, self._interpolation)
        return tiles


def _finish(job: _Job) -> None:
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
