"""Batches of tiles through the encoder, and on to the writer, in the order in which they come."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from nh2st_pipe.embedding.summary import EmbedSummary, Part
from nh2st_pipe.embedding.tiles import End, Faults, Ready, TileBatch, TileReader
from nh2st_pipe.embedding.writing import Writer, fault_of_slide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nh2st_pipe.encoders.encoder import Coming, TileEncoder

__all__ = ["EncoderStation", "timed"]


class EncoderStation:
    """The calling thread's: it begins with a batch, and hands on the one before.

    On a GPU a batch is begun before the one before it is back.
    """

    def __init__(
        self,
        encoder: TileEncoder,
        views: int,
        tiles: TileReader,
        writer: Writer,
        faults: Faults,
        summary: EmbedSummary,
    ) -> None:
        self._encoder, self._views, self._tiles, self._writer = encoder, views, tiles, writer
        self._faults, self._summary = faults, summary
        self._underway: deque[tuple[TileBatch, Coming] | End] = deque()
        self._stained: defaultdict[str, list[NDArray[np.uint8]]] = defaultdict(list)
        """Tiles of each slide that are to be stained anew."""

    def take(self, item: TileBatch | End) -> None:
        """Begin with a batch of tiles, or with the end of a slide."""
        if isinstance(item, End):
            self._underway.append(item)
        elif self._faults.of(item.slide.key) is not None:
            self._tiles.give_back(item)
        else:
            self._begin(item)
        self.settle(self._encoder.batches_ahead)

    def settle(self, most: int) -> None:
        """Hand on to the writer whatever is more than `most`."""
        while len(self._underway) > most:
            self._hand_on(self._underway.popleft())

    def settle_one(self) -> bool:
        """Hand on to the writer what came first, where there is any; say whether there was."""
        if self._underway:
            self._hand_on(self._underway.popleft())
            return True
        return False

    def _hand_on(self, item: tuple[TileBatch, Coming] | End) -> None:
        if isinstance(item, End):
            self._end(item)
            return
        batch, underway = item
        with timed(self._summary, "encoder"):
            embeddings = underway.result()
        self._tiles.give_back(batch)
        with timed(self._summary, "writing"):
            self._writer.append(batch.slide, embeddings)
        self._summary.encoded_tiles += len(embeddings)

    def _begin(self, batch: TileBatch) -> None:
        try:
            with timed(self._summary, "reading"):
                tiles = self._tiles.result(batch)
        except Exception as error:
            self._tiles.give_back(batch)
            self._note(batch.slide, error)
            return
        if batch.to_stain:
            self._stained[batch.slide.key].append(tiles.copy())
            self._tiles.give_back(batch)
            return
        with timed(self._summary, "encoder"):
            self._underway.append((batch, self._encoder.start(tiles, self._views)))

    def _end(self, end: End) -> None:
        stained = self._stained.pop(end.held.key, None)
        if stained is not None and end.ready is not None and end.stained is not None:
            try:
                with timed(self._summary, "writing"):
                    self._writer.wait()
                if self._faults.of(end.held.key) is None:
                    self._find_shift(end.ready, end.stained, np.concatenate(stained))
            except Exception as error:
                self._note(end.ready, error)
        with timed(self._summary, "writing"):
            self._writer.end(end)

    def _find_shift(self, slide: Ready, rows: NDArray[np.int64], tiles: NDArray[np.uint8]) -> None:
        """Find and write a slide's stain shift, all of its tiles being in the store."""
        from nh2st_pipe.encoders.stains import VERSION, stain_shift

        with timed(self._summary, "writing"):
            own = slide.writer.embeddings(rows)
        with timed(self._summary, "encoder"):
            shift = stain_shift(self._encoder, tiles, own)
        with timed(self._summary, "writing"):
            slide.writer.write_stain_shift(shift, VERSION)
        self._summary.stain_shifts.append(slide.key)

    def _note(self, slide: Ready, error: Exception) -> None:
        """Note a fault of one slide; raise any other."""
        cause = fault_of_slide(error)
        if cause is None:
            raise error
        self._faults.put(slide.key, cause)


@contextmanager
def timed(summary: EmbedSummary, what: Part) -> Iterator[None]:
    """Add to `summary` how long the calling thread took for `what`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        summary.seconds[what] += time.perf_counter() - start
