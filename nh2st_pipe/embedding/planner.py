"""Which slides this process embeds, in which order, and when: each under its lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nh2st_pipe.core.errors import OF_ONE_SLIDE, listed
from nh2st_pipe.core.lease import Lease
from nh2st_pipe.embedding.plan import Asked, Todo
from nh2st_pipe.embedding.staging import Stage, ahead
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.manifest import SlideRow

__all__ = ["Held", "Planner"]

_LOOK_SECONDS = 0.2  # between looks at whether the end was asked for
_SECONDS_AHEAD = 10.0  # in which slides may be leased beyond this process's share
_BUSY_SECONDS = 0.5  # between looks at slides that another process has leased


@dataclass(frozen=True)
class Held:
    """A slide that this process has leased."""

    row: SlideRow
    lease: Lease
    image: Path
    """Where it is read from: as the manifest says, or a copy."""
    notices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its slide_id."""
        return self.row.slide_id

    def in_words_of_the_manifest(self, cause: str) -> str:
        """Return a cause with the manifest's own file in place of a copy of it."""
        return cause.replace(str(self.image), str(self.row.slide))


class Planner:
    """Leases slides as there is room for them; iterating yields each, staged where a stage is given. Leaving gives back
    the leases that are left.

    One that another process has finished meanwhile is told to `kept`, and not leased; one that another process has
    leased is come back to. Few are leased ahead of need, so that processes that share a store end together.
    """

    def __init__(
        self,
        rows: Sequence[SlideRow],
        store: StoreWriter,
        most_open: int,
        stopped: Callable[[], bool],
        asked: Asked,
        kept: Callable[[str], None],
        stage: Path | None = None,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._rows, self._store, self._stopped, self._asked = rows, store, stopped, asked
        self._kept, self._say = kept, say
        self._open = threading.Semaphore(most_open)
        self._stage = None if stage is None else Stage(stage, stopped, most_open + 1)
        self._changed = threading.Condition()
        self._held: dict[str, Lease] = {}
        self.others_have_the_rest = False
        """Whether nothing can be done but to wait for other processes: none of ours is left to be read."""
        self._leased = 0
        """Slides that are leased, and not yet with the readers to their last tile."""
        self._left: dict[str, int] = {}
        """Tiles of each opened slide that are not yet with the readers."""
        self._tiles_known = self._slides_known = self._tiles_begun = 0
        self._began = 0.0

    def __enter__(self) -> Planner:
        if self._stage is not None:
            self._stage.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for lease in self._held.values():
            lease.release()
        if self._stage is not None:
            self._stage.__exit__()

    def wake(self) -> None:
        """Let whoever waits for room see that the end was asked for."""
        self._open.release()
        if self._stage is not None:
            self._stage.room.release()
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Held]:
        if self._stage is None:
            for row, lease in self._leases(self._open):
                yield Held(row, lease, row.slide)
            return
        staged = dict[str, tuple[Path, str | None]]()

        def stage(leased: tuple[SlideRow, Lease]) -> None:
            staged[leased[0].slide_id] = self._staged(leased[0])

        for row, lease in ahead(self._leases(self._stage.room), stage, self._stopped):
            self._open.acquire()
            image, why = staged.pop(row.slide_id)
            yield Held(row, lease, image, () if why is None else (why,))

    def opened(self, key: str, tiles: int) -> None:
        """Note that a slide was opened, and how many of its tiles are to be read."""
        with self._changed:
            self._left[key] = tiles
            self._tiles_known += tiles
            self._slides_known += 1

    def begun(self, key: str, tiles: int) -> None:
        """Note that so many tiles of a slide are with the readers."""
        with self._changed:
            self._began = self._began or time.monotonic()
            self._tiles_begun += tiles
            self._left[key] -= tiles

    def all_begun(self, key: str) -> None:
        """Note that nothing more of a slide will be given to the readers."""
        with self._changed:
            self._left.pop(key, None)
            self._leased -= 1
            self._changed.notify_all()

    def release(self, held: Held) -> None:
        """Give back a slide's lease, delete its copy, and make room for the next."""
        with self._changed:
            lease = self._held.pop(held.key)
        lease.release()
        self._open.release()
        if self._stage is not None:
            self._stage.delete(held.image)
            self._stage.room.release()

    def expected_tiles(self) -> float:
        """Return the tiles of the slides opened so far, and as many again on average for each of the others."""
        return self._tiles_known * len(self._rows) / max(self._slides_known, 1)

    def _leases(self, room: threading.Semaphore) -> Iterator[tuple[SlideRow, Lease]]:
        """Yield the slides as this process has their leases, each when there is room for one more."""
        todo = list(self._rows)
        while todo:
            busy = list[SlideRow]()
            for number, row in enumerate(todo):
                if self._is_done(row):  # one request, and a lease takes several
                    self._kept(row.slide_id)
                    continue
                self._wait_to_lease(len(todo) - number)
                room.acquire()
                if self._stopped():
                    room.release()  # whoever waits for it next has to see the end too
                    return
                lease = self._store.lease(row.slide_id)
                if lease.take():
                    with self._changed:
                        self._leased += 1
                        self._held[row.slide_id] = lease
                    yield row, lease
                else:
                    room.release()
                    busy.append(row)
            if busy and len(busy) == len(todo):
                self.others_have_the_rest = self._leased == 0
                self._pause()
                self.others_have_the_rest = False
            elif busy:
                self._say(f"{listed(row.slide_id for row in busy)}: under way in another process, waited for")
            todo = busy

    def _pause(self) -> None:
        until = time.monotonic() + _BUSY_SECONDS
        while not self._stopped() and time.monotonic() < until:
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)

    def _wait_to_lease(self, left: int) -> None:
        """Wait until the next of `left` slides may be leased.

        Those that wait here to be read may be half as many as are left: more would be missed by other processes, which
        stand idle at the end. One is staged all the same, and whatever is needed in the next seconds.
        """
        most = max(left // 2, self._stage is not None)
        while not self._stopped() and self._leased > most and self._seconds_to_read() > _SECONDS_AHEAD:
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)

    def _seconds_to_read(self) -> float:
        """Return how long the tiles of leased slides will last, at the pace until now; infinity where one is not
        opened yet, or nothing was read.
        """
        with self._changed:
            if not self._tiles_begun or self._leased > len(self._left):
                return float("inf")
            pace = self._tiles_begun / (time.monotonic() - self._began)
            return sum(self._left.values()) / pace

    def _is_done(self, row: SlideRow) -> bool:
        """Whether nothing is left to do for a slide; what cannot be said is for whoever opens it."""
        with suppress(*OF_ONE_SLIDE, MemoryError):
            return self._asked.about(row, self._store.record(row.slide_id))[0] is not Todo.embed
        return False

    def _staged(self, row: SlideRow) -> tuple[Path, str | None]:
        """Copy a slide to the stage, unless another process has embedded it meanwhile."""
        assert self._stage is not None
        return (row.slide, None) if self._is_done(row) else self._stage.copy(row.slide)
