"""Slides through the encoder, into the store: what each process that takes part in `embed` does.

Three threads hand on to each other: the planner of `readers`, which reads ahead; the calling one, which encodes; the
one of `writing`, which compresses and writes. On a GPU a batch is begun before the one before it is back.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nh2st_pipe.core.location import Location
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.embedding.plan import Wanted, recipe_of
from nh2st_pipe.embedding.readers import Job, Readers, finish
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.writing import Writing, fault_of_slide
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.manifest import SlideRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nh2st_pipe.encoders.encoder import Encoder, Underway

__all__ = ["Alone", "Hands", "Slides", "Work", "sendable"]

Slides = Sequence[tuple[SlideRow, Wanted]]

_MOST_READERS = 16


@dataclass(frozen=True)
class Work:
    """How slides are to be embedded, and into which store. It can be pickled: any process may do some of it."""

    store: str
    contract: Contract
    weights: Path | None
    batch_size: int | None = None
    workers: int | None = None
    redo_changed: bool = False
    trust_remote_code: bool = False
    compiled: bool = False
    stage: Path | None = None

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
            recipe_of(self.contract),
            self.weights,
            device=where,
            precision=self.contract.precision,
            trust_remote_code=self.trust_remote_code,
            compiled=self.compiled,
        )

    def do(
        self,
        todo: Slides,
        encoder: Encoder,
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
        from nh2st_pipe.encoders.batches import batch_that_fits

        kind = encoder.device.type
        size = self.batch_size or batch_that_fits(encoder, self.contract.views)
        threads = self.workers or readers_beside(kind, processes)
        summary.settings = {
            "device": str(encoder.device),
            "precision": self.contract.precision,
            "batch_size": size,
            "workers": threads,
            "cores": cores(),
        }
        writer = StoreWriter(Location(self.store), self.contract)
        jobs = [Job(row, wanted) for row, wanted in todo]
        writing = Writing()

        def check() -> None:
            stop.check()
            writing.check()

        readers = Readers(
            jobs,
            writer,
            size,
            threads,
            check,
            redo_changed=self.redo_changed,
            say=progress.say,
            blank=encoder.blank,
            stage=self.stage,
            turn=turn,
        )
        progress.start("embedding", len(jobs), "tiles")
        with readers, writing:
            flow = _Flow(readers, writing, encoder, self.contract.views, summary, progress)
            try:
                for item in readers:
                    flow.take(item.job, None if item.batch is None else item.batch.result)
            except KeyboardInterrupt:
                flow.settle(0)
                raise
            flow.settle(0)
            with timed(summary, "writing"):
                writing.close()


class Hands(Protocol):
    """Who does the work: this process, several of this machine, or those of a cluster.

    Entering loads the encoder wherever it is needed, and raises EncoderError where it cannot be.
    """

    def __enter__(self) -> Hands: ...

    def __exit__(self, *_: object) -> None: ...

    def do(
        self, todo: Sequence[tuple[SlideRow, Wanted]], summary: EmbedSummary, stop: Stop, progress: Progress
    ) -> None:
        """Embed the slides `todo`, and put down in `summary` what came of each; raise what ends more than one."""


class Alone:
    """This process, on one device."""

    def __init__(self, work: Work, device: str) -> None:
        self._work, self._device = work, device

    def __enter__(self) -> Alone:
        self._encoder = self._work.load(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        del self._encoder

    def do(
        self, todo: Sequence[tuple[SlideRow, Wanted]], summary: EmbedSummary, stop: Stop, progress: Progress
    ) -> None:
        """See Hands."""
        self._work.do(todo, self._encoder, summary, stop, progress)


def readers_beside(device: str, processes: int = 1) -> int:
    """Return how many threads read tiles where nobody says: on a GPU its share of the cores but one, since one core
    decodes a few hundred tiles a second; beside an encoder on the CPU two.
    """
    return 2 if device == "cpu" else min(max(cores() // processes - 1, 2), _MOST_READERS)


class _Flow:
    """Batches and ends of slides on their way from the readers to the writing, in that order."""

    def __init__(
        self,
        readers: Readers,
        writing: Writing,
        encoder: Encoder,
        views: int,
        summary: EmbedSummary,
        progress: Progress,
    ) -> None:
        self._readers, self._writing, self._encoder, self._views = readers, writing, encoder, views
        self._summary, self._progress = summary, progress
        self._underway: deque[tuple[Job, Underway | None]] = deque()

    def take(self, job: Job, read: Callable[[], NDArray[np.uint8]] | None) -> None:
        """Begin with a batch of tiles; without one, the slide ends."""
        if read is None:
            self._underway.append((job, None))
        elif job.failed is None:
            try:
                with timed(self._summary, "reading"):
                    tiles = read()
            except Exception as error:
                job.failed = fault_of_slide(error)
                if job.failed is None:
                    raise
                return
            with timed(self._summary, "encoder"):
                self._underway.append((job, self._encoder.start(tiles, self._views)))
        self.settle(self._encoder.batches_ahead)

    def settle(self, most: int) -> None:
        """Hand on to the writing whatever is more than `most`."""
        while len(self._underway) > most:
            job, underway = self._underway.popleft()
            if underway is None:
                self._end(job)
                continue
            with timed(self._summary, "encoder"):
                embeddings = underway.result()
            with timed(self._summary, "writing"):
                self._writing.append(job, embeddings)
            self._summary.encoded_tiles += len(embeddings)
            done, expected = self._summary.encoded_tiles, self._readers.expected_tiles()
            self._progress.advance(done, expected, job.row.slide_id)

    def _end(self, job: Job) -> None:
        with timed(self._summary, "writing"):
            if job.stained is not None:
                self._writing.wait(job)
        if job.stained is not None and job.failed is None:
            try:
                self._find_shift(job)
            except Exception as error:
                job.failed = fault_of_slide(error)
                if job.failed is None:
                    raise
        with timed(self._summary, "writing"):
            self._writing.end(job, lambda: self._close(job))

    def _find_shift(self, job: Job) -> None:
        """Find and write a slide's stain shift, all of its tiles being in the store."""
        from nh2st_pipe.encoders.stains import VERSION, stain_shift

        assert job.stained is not None
        assert job.writer is not None
        rows, future = job.stained
        with timed(self._summary, "reading"):
            tiles, own = future.result(), job.writer.embeddings(rows)
        with timed(self._summary, "encoder"):
            shift = stain_shift(self._encoder, tiles, own)
        with timed(self._summary, "writing"):
            job.writer.write_stain_shift(shift, VERSION)
        self._summary.stain_shifts.append(job.row.slide_id)

    def _close(self, job: Job) -> None:
        """End a slide, in the writing's thread."""
        slide_id, summary = job.row.slide_id, self._summary
        if job.failed is None and not job.kept:
            try:
                finish(job)
            except Exception as error:
                job.failed = fault_of_slide(error)
                if job.failed is None:
                    raise
        self._readers.release(job)
        if job.failed is not None:
            summary.failed[slide_id] = job.cause or job.failed
            self._progress.say(f"{slide_id} passed over; the end says why")
        elif job.kept:
            summary.kept.append(slide_id)
        else:
            summary.done.append(slide_id)
            if job.spots is not None:
                summary.notices += [f"{slide_id}: {notice}" for notice in job.notices]
                self._progress.say(f"{slide_id}: {len(job.spots):,} tiles done")
        job.spots = job.writer = job.neighbours = job.picture = job.stained = job.tissue = job.made = (
            None  # counts of a thousand slides are not for keeping
        )


@contextmanager
def timed(summary: EmbedSummary, what: str) -> Iterator[None]:
    """Add to `summary` how long the calling thread took for `what`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        summary.seconds[what] += time.perf_counter() - start


def sendable(error: BaseException) -> BaseException:
    """Return an error as it can be raised in another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error
