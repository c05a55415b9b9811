"""What each process that takes part in `embed` does: slides through a line of stations, into the store.

Planner (leases) → TileReader (slides opened, tiles read, by Readers: threads or processes) → EncoderStation (the
calling thread) → Writer (a thread). A fault of one slide travels on to its end; any other ends the line, with what
was done kept.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nh2st_pipe.core.errors import reason_of
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.embedding.encoding import EncoderStation, timed
from nh2st_pipe.embedding.options import EmbedOptions, ReadersKind
from nh2st_pipe.embedding.plan import Asked, choose_recipe, recipe_of
from nh2st_pipe.embedding.planner import Planner
from nh2st_pipe.embedding.readers import Readers, ThreadReaders, slides_open
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.tiles import End, Faults, Ready, TileBatch, TileReader, batches_of_memory
from nh2st_pipe.embedding.writing import Writer
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.manifest import SlideRow

if TYPE_CHECKING:
    from nh2st_pipe.encoders.encoder import Encoder, TileEncoder
    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["Executor", "Slides", "Work", "readers_beside"]

Slides = Sequence[SlideRow]

_MOST_READERS = 16  # of a device


@dataclass(frozen=True)
class Work:
    """How slides are to be embedded, and into which store. It can be pickled: any process may do some of it."""

    store: str
    contract: Contract
    weights: Path | None
    options: EmbedOptions

    @classmethod
    def of(cls, options: EmbedOptions, location: Location, contract: Contract, weights: Path | None) -> Work:
        """Return what any process can do in its own folder: the paths in it are absolute."""
        store = str(location if location.path is None else location.path.absolute())
        stage = None if options.stage is None else Path(options.stage).expanduser().absolute()
        return cls(store, contract, weights, options.model_copy(update={"stage": stage, "store": store}))

    def load(self, device: str, threads: int | None = None) -> Encoder:
        """Return the encoder, on `device`; on a CPU it computes with so many `threads`, None is one for each core.

        Raises EncoderError where it cannot be built there.
        """
        import torch

        from nh2st_pipe.core.devices import pick_device
        from nh2st_pipe.encoders.load import load_encoder

        where = pick_device(device)
        if where.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
        return load_encoder(
            self.recipe(),
            self.weights,
            device=where,
            precision=self.contract.precision,
            trust_remote_code=self.options.trust_remote_code,
            compiled=self.options.compiled,
        )

    def recipe(self) -> EncoderRecipe:
        """Return the encoder's recipe; of code of somebody's own with the place where whoever calls has named it."""
        recipe, asked = recipe_of(self.contract), self.options.encoder
        if recipe.kind == "python" and asked is not None:
            return recipe.model_copy(update={"beside": choose_recipe(asked, None).beside})
        return recipe

    def do(
        self,
        todo: Slides,
        encoder: TileEncoder,
        summary: EmbedSummary,
        stop: Stop,
        progress: Progress,
        processes: int = 1,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        """Embed the slides `todo`, and put down in `summary` what came of each.

        `processes` share the machine; `turn` is entered by whoever reads a batch, where slides share a process.

        A fault of one slide is put down and the others go on; any other is raised, with what was done kept.
        """
        size = self.options.batch_size or encoder.fits(self.contract.views)
        workers = self.options.workers or readers_beside(encoder.kind, processes, len(encoder.devices))
        progress.start("embedding", len(todo), "tiles")
        with ExitStack() as ending:
            readers = _started(ending, self.options.readers, encoder, size, workers, turn, summary, progress)
            summary.settings = {
                "device": ",".join(encoder.devices),
                "precision": self.contract.precision,
                "batch_size": size,
                "workers": workers,
                "readers": readers.kind,
                "cores": cores(),
            }
            line = _Line(self, todo, size, readers, summary, progress)
            line.run(encoder, stop)


class _Line:
    """The stations of one call, joined."""

    def __init__(
        self, work: Work, todo: Slides, size: int, readers: Readers, summary: EmbedSummary, progress: Progress
    ) -> None:
        self._summary, self._progress, self._views = summary, progress, work.contract.views
        self._readers = readers
        self._faults = Faults()
        ended = threading.Event()
        store = StoreWriter(Location(work.store), work.contract)
        asked, stage = Asked.of(work.options), work.options.stage
        self._planner = Planner(
            todo,
            store,
            slides_open(readers.workers),
            ended.is_set,
            asked,
            kept=summary.kept.append,
            stage=None if stage is None else Path(stage),
            say=progress.say,
        )
        self._tiles = TileReader(self._planner, readers, store, size, self._faults, ended, asked)
        self._writer = Writer(self._faults, self._close)

    def run(self, encoder: TileEncoder, stop: Stop) -> None:
        """Take every slide from one end to the other. Whatever ends it early leaves what was encoded in the store."""
        began, cpu = time.perf_counter(), time.process_time()
        with self._planner:
            try:
                with self._tiles, self._writer:
                    station = EncoderStation(
                        encoder, self._views, self._tiles, self._writer, self._faults, self._summary
                    )
                    self._encode(station, stop)
            finally:
                for slide in self._tiles.unfinished():
                    self._keep(slide)
        wall = max(time.perf_counter() - began, 1e-9)
        main = (time.process_time() - cpu) / wall
        self._summary.busy = {"main": [main], "readers": self._readers.busy(), "encoders": encoder.busy()}

    def _keep(self, slide: Ready) -> None:
        """Keep what was encoded of a slide that does not come to its end. What ends the run is not this."""
        try:
            if self._faults.of(slide.key) is None:
                slide.writer.checkpoint()
        except Exception as error:
            self._progress.say(f"{slide.key}: the tiles that were encoded last could not be kept ({reason_of(error)})")
        finally:
            self._readers.close(slide.key)

    def _encode(self, station: EncoderStation, stop: Stop) -> None:
        def check() -> None:
            stop.check()
            self._writer.check()

        try:
            while (item := self._next(station, check)) is not None:
                station.take(item)
                at = item.held.key if isinstance(item, End) else item.slide.key
                self._progress.advance(self._summary.encoded_tiles, self._planner.expected_tiles(), at)
        except KeyboardInterrupt:
            station.settle(0)
            raise
        station.settle(0)
        with timed(self._summary, "writing"):
            self._writer.close()

    def _next(self, station: EncoderStation, check: Callable[[], None]) -> TileBatch | End | None:
        """Return what comes next. What is under way is handed on before that is waited for: it may come only when a
        slide has ended.

        Waiting for it is for slides to be opened; where it is for other processes, which have all that is left, it
        counts for nothing here.
        """
        while True:
            check()
            with suppress(queue.Empty):
                return self._tiles.next(wait=False)
            if station.settle_one():
                continue
            began, others = time.perf_counter(), self._planner.others_have_the_rest
            try:
                return self._tiles.next()
            except queue.Empty:
                continue
            finally:
                if not others:
                    self._summary.seconds["opening"] += time.perf_counter() - began

    def _close(self, end: End) -> None:
        """Put down what came of a slide, in the writer's thread."""
        key, summary = end.held.key, self._summary
        self._tiles.close(end.held)
        cause = self._faults.of(key)
        if cause is not None:
            summary.failed[key] = end.held.in_words_of_the_manifest(cause)
            self._progress.say(f"{key} passed over; the end says why")
        elif end.ready is None:
            summary.kept.append(key)
        else:
            summary.done.append(key)
            notices = (*end.ready.notices, *end.ready.overview.result().doubts)
            summary.notices += [f"{key}: {notice}" for notice in notices]
            self._progress.say(f"{key}: {len(end.ready.xy):,} tiles done")


def _started(
    ending: ExitStack,
    kind: ReadersKind,
    encoder: TileEncoder,
    batch_size: int,
    workers: int,
    turn: AbstractContextManager[object] | None,
    summary: EmbedSummary,
    progress: Progress,
) -> Readers:
    """Return readers, until `ending`, with memory for as many batches as are under way at once.

    Of the kind asked for: "auto" is processes beside a GPU, which takes more tiles than one interpreter cuts, unless
    several slides share this process.
    """
    px = encoder.recipe.input_px
    shape = batch_size, px, px, 3
    batches = batches_of_memory(batch_size, encoder.batches_ahead)
    if kind == "processes" or (kind == "auto" and encoder.kind == "cuda" and turn is None and workers > 1):
        from nh2st_pipe.embedding.processes import ProcessReaders

        try:
            return ending.enter_context(ProcessReaders(workers, (batches, *shape), encoder.pinned, progress.say))
        except OSError as error:
            words = f"tiles are read in threads, for processes cannot be had ({reason_of(error)})"
            summary.notices.append(words)
            progress.say(words)
    return ending.enter_context(ThreadReaders(workers, lambda: [encoder.blank(shape) for _ in range(batches)], turn))


class Executor(Protocol):
    """Who does the work: this process, several of this machine, or those of a cluster.

    Entering loads the encoder wherever it is needed, and raises EncoderError where it cannot be.
    """

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...

    def do(self, todo: Slides, summary: EmbedSummary, stop: Stop, progress: Progress) -> None:
        """Embed the slides `todo`, and put down in `summary` what came of each; raise what ends more than one."""


def readers_beside(device: str, processes: int = 1, devices: int = 1) -> int:
    """Return how many read tiles where nobody says: beside GPUs a process's share of the cores but one, since one core
    decodes a thousand tiles a second; beside an encoder on the CPU two.
    """
    return 2 if device == "cpu" else min(max(cores() // processes - 1, 2), _MOST_READERS * devices)
