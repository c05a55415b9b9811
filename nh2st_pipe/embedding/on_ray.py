"""A Ray cluster: an actor for each GPU, or for each CPU where there is none, and slides as its tasks.

Ray places the actors and says when one is lost; its slides go to others then, which go on with what it had written.
What an actor does with a slide is what this process would do. Two slides at a time are with an actor, so that one is
opened and read while the other is encoded.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nh2st_pipe.core.cluster import Reached, end_of_a_process, reached, resources_in_words, seen_everywhere
from nh2st_pipe.core.errors import EncoderError, sendable
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop
from nh2st_pipe.embedding.summary import PARTS, EmbedSummary, merge
from nh2st_pipe.embedding.work import Slides, Work, readers_beside
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.tiles.manifest import SlideRow

if TYPE_CHECKING:
    from nh2st_pipe.encoders.encoder import Encoder

__all__ = ["Cluster", "OnRay", "on_ray"]

_SLIDES_EACH = 2
_MOST_DEATHS = 3  # of actors with the same slide, or before one has loaded its encoder
_LOOK_SECONDS = 0.2
_ASK_SECONDS = 1.0
_PLACING_SECONDS = 900.0  # a cluster may have to start a node first
_STOP_SECONDS = 60.0


@contextmanager
def on_ray(device: str, address: str | None, actors: int | None) -> Iterator[Cluster]:
    """Connect to a Ray cluster; see `core.cluster.reached`."""
    with reached(device, address, actors) as found:
        yield Cluster(found)


class Cluster:
    """A Ray cluster as an engine."""

    def __init__(self, found: Reached) -> None:
        self.found, self.kind = found, found.kind

    def executor(self, work: Work, slides: int) -> OnRay:
        """See Engine."""
        return OnRay(work, self.found, slides)


@dataclass
class _Actor:
    """An actor, and what it has been given."""

    handle: Any
    loading: Any
    ready: bool = False
    slides: set[str] = field(default_factory=set)
    asked: Any = None
    tiles: int = 0


class OnRay:
    """The actors of a cluster, each with the encoder of `work`: one for each GPU or CPU, and no more than `slides`."""

    def __init__(self, work: Work, cluster: Reached, slides: int) -> None:
        self._work, self._cluster, self._ray = work, cluster, cluster.ray
        seen_everywhere(Location(work.store), "--store")
        self._wanted, self._resources = cluster.share(slides)
        self._actors: list[_Actor] = []
        self._deaths_in_loading = 0

    def __enter__(self) -> OnRay:
        try:
            self._actors = [self._new() for _ in range(self._wanted)]
            until = time.monotonic() + _PLACING_SECONDS
            while not any(actor.ready for actor in self._actors):
                self._look(list(self._actors), None)
                if time.monotonic() > until:
                    raise EncoderError(
                        f"Ray could not place an actor with {resources_in_words(self._resources)} in "
                        f"{_PLACING_SECONDS / 60:.0f} minutes; `ray status` says what is free, and who has the rest"
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []

    def do(self, todo: Slides, summary: EmbedSummary, stop: Stop, progress: Progress) -> None:
        """See Executor."""
        waiting = deque(map(_absolute, todo))
        running: dict[Any, tuple[_Actor, SlideRow]] = {}
        deaths, parts, fatal = Counter[str](), list[EmbedSummary](), list[BaseException]()
        progress.start("embedding", len(todo), "tiles")
        progress.say(f"Ray: {len(self._actors)} actors with {resources_in_words(self._resources)} each")
        done_tiles, last_asked, until = 0, 0.0, None
        while waiting or running:
            if (stop.asked or fatal) and until is None:
                until = time.monotonic() + _STOP_SECONDS
                waiting.clear()
                for actor in self._actors:
                    actor.handle.stop.options(concurrency_group="asks").remote()
            if until is not None and time.monotonic() > until:
                break
            self._give_out(waiting, running, deaths)
            for ref in self._look([actor for actor in self._actors if not actor.ready], running):
                actor, row = running.pop(ref)
                actor.slides.discard(row.slide_id)
                try:
                    part, error = self._ray.get(ref)
                except self._ray.exceptions.RayError as gone:
                    why = self._end_of_a_process(gone)
                    deaths[row.slide_id] += 1
                    if deaths[row.slide_id] >= _MOST_DEATHS:
                        summary.failed[row.slide_id] = (
                            f"{_MOST_DEATHS} processes ended while they were at it, the last one alone with it: {why}"
                        )
                    elif until is None:
                        waiting.appendleft(row)
                        progress.say(f"{row.slide_id}: the process that was at it is gone ({why}); another takes over")
                    self._replace(actor)
                    continue
                parts.append(part)
                done_tiles += part.encoded_tiles
                if error is not None:
                    fatal.append(error)
            if time.monotonic() - last_asked > _ASK_SECONDS:
                last_asked = time.monotonic()
                at = next((row.slide_id for _, row in running.values()), "")
                now = done_tiles + self._ask()
                ended = len(parts)
                progress.advance(now, max(now, now * len(todo) / max(ended, 1)), at)
        merge(summary, parts)
        summary.settings |= {"engine": "ray", "processes": len(self._actors)}
        for name in PARTS:  # of an actor, on average; merge took the mean over slides
            summary.seconds[name] *= len(parts) / max(len(self._actors), 1)
        if stop.asked:
            raise KeyboardInterrupt
        for error in fatal:
            if not isinstance(error, KeyboardInterrupt):
                raise error

    def _new(self) -> _Actor:
        groups = {"slides": _SLIDES_EACH, "asks": 1}
        remote = self._ray.remote(max_restarts=0, concurrency_groups=groups, **self._resources)(Embedder)
        sharing = max(1, self._cluster.most_of_a_node)
        handle = remote.remote(self._work, self._cluster.kind, self._resources["num_cpus"], sharing)
        return _Actor(handle, handle.load.remote())

    def _look(self, loading: list[_Actor], running: Any) -> list[Any]:
        """Wait a moment for actors that load and slides that end; return the latter."""
        refs = {actor.loading: actor for actor in loading}
        ended, _ = self._ray.wait([*refs, *(running or ())], num_returns=1, timeout=_LOOK_SECONDS)
        for ref in ended:
            if ref in refs:
                self._loaded(refs[ref])
        return [ref for ref in ended if ref not in refs]

    def _loaded(self, actor: _Actor) -> None:
        """See whether an actor has its encoder. Raises EncoderError where none has and no other is to be expected."""
        try:
            fault = self._ray.get(actor.loading)
        except self._ray.exceptions.RayError as error:
            why = self._end_of_a_process(error)
            self._deaths_in_loading += 1
            fault = EncoderError(f"a process on Ray ended while it loaded its encoder: {why}")
            if self._deaths_in_loading < _MOST_DEATHS:
                self._actors[self._actors.index(actor)] = self._new()
                return
        if fault is None:
            actor.ready = True
            return
        self._actors.remove(actor)
        if not self._actors:
            raise fault

    def _end_of_a_process(self, error: Exception) -> str:
        return end_of_a_process(self._ray, error, "fewer --actors, or a smaller --batch-size, take less")

    def _give_out(self, waiting: deque[SlideRow], running: dict[Any, Any], deaths: Counter[str]) -> None:
        ready = [actor for actor in self._actors if actor.ready]
        for most in range(1, _SLIDES_EACH + 1):
            for actor in ready:
                # A second slide only while there are enough for all: the last ones are not to lie with one actor.
                if not waiting or len(actor.slides) >= most or (most > 1 and len(waiting) < len(ready)):
                    continue
                # At whose side a process died is alone with the next one: it may be that slide's doing.
                row = waiting[0]
                if actor.slides and (deaths[row.slide_id] or any(deaths[slide_id] for slide_id in actor.slides)):
                    continue
                waiting.popleft()
                actor.slides.add(row.slide_id)
                ref = actor.handle.embed.options(concurrency_group="slides").remote(row)
                running[ref] = actor, row

    def _replace(self, actor: _Actor) -> None:
        if actor in self._actors:
            self._ray.kill(actor.handle)  # one that cannot be reached may still be there
            self._actors[self._actors.index(actor)] = self._new()

    def _ask(self) -> int:
        """Return the tiles of slides under way, as far as the actors have answered."""
        for actor in self._actors:
            if not actor.ready:
                continue
            if actor.asked is not None and self._ray.wait([actor.asked], timeout=0)[0]:
                try:
                    actor.tiles = self._ray.get(actor.asked)
                except self._ray.exceptions.RayError:
                    actor.tiles = 0
                actor.asked = None
            if actor.asked is None:
                actor.asked = actor.handle.tiles.options(concurrency_group="asks").remote()
        return sum(actor.tiles for actor in self._actors)


class Embedder:
    """An actor: the encoder on one device, and what the driver asks of it from several threads."""

    def __init__(self, work: Work, device: str, threads: int, sharing: int) -> None:
        self._work, self._device, self._threads, self._sharing = work, device, threads, sharing
        self._stop = Stop()
        self._tiles = dict[str, int]()
        self._encoder: Encoder | None = None
        kind = "cpu" if device == "cpu" else "cuda"
        # Two slides at a time, and no more threads that read than one would have.
        self._turn = threading.BoundedSemaphore(work.options.workers or readers_beside(kind, sharing))

    def load(self) -> BaseException | None:
        """Load the encoder; return what went wrong."""
        try:
            work = replace(self._work, weights=_weights_here(self._work))
            self._encoder = work.load(self._device, self._threads)
        except Exception as error:
            return sendable(error)
        return None

    def embed(self, row: SlideRow) -> tuple[EmbedSummary, BaseException | None]:
        """Embed a slide; return what came of it, and what went wrong beyond it."""
        assert self._encoder is not None
        summary, fault = EmbedSummary(store=self._work.store), None
        try:
            counting = _Counting(self._tiles, row.slide_id)
            self._work.do([row], self._encoder, summary, self._stop, counting, self._sharing, self._turn)
        except BaseException as error:
            fault = sendable(error)
        self._tiles.pop(row.slide_id, None)
        return summary, fault

    def tiles(self) -> int:
        """Return the tiles encoded of the slides under way."""
        return sum(list(self._tiles.values()))

    def stop(self) -> None:
        """Have the slides under way end soon, with what is encoded kept."""
        self._stop.asked = True


class _Counting(Progress):
    def __init__(self, tiles: dict[str, int], slide_id: str) -> None:
        self._tiles, self._slide_id = tiles, slide_id

    def advance(self, done: float, total: float, now: str = "") -> None:
        self._tiles[self._slide_id] = int(done)


def _weights_here(work: Work) -> Path | None:
    """Return the weights' file on this node, the same as the driver's. Raises EncoderError where there is none."""
    recipe = work.recipe()
    if recipe.kind == "fake":
        return None
    given = work.weights if work.weights is not None and work.weights.is_file() else None
    try:
        found = find_weights(recipe, given, work.options.trust_remote_code)
    except EncoderError as error:
        raise EncoderError(f"on node {socket.gethostname()}, {work.weights} is not there, and {error}") from error
    if found.sha256 != work.contract.weights.sha256:
        raise EncoderError(
            f"on node {socket.gethostname()}, the weights {found.path} have the SHA-256 {found.sha256}, and the store "
            f"is made with {work.contract.weights.sha256}"
        )
    return found.path


def _absolute(row: SlideRow) -> SlideRow:
    """Return a row with paths that mean the same in a process that runs elsewhere."""
    return replace(
        row,
        slide=row.slide.absolute(),
        expression=row.expression and row.expression.absolute(),
        tissue=row.tissue and row.tissue.absolute(),
    )
