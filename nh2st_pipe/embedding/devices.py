"""Several devices of one machine: a process for each, which share the slides by their leases.

Each process goes through all slides, beginning at its own; those that are done or leased by another it leaves, and
comes back to. So one that is killed loses nothing: its lease ends with it, and another goes on with its slide.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from nh2st_pipe.core.children import how_it_ended, without_main
from nh2st_pipe.core.errors import EncoderError, listed, sendable
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop, signals_as_flag
from nh2st_pipe.embedding.summary import EmbedSummary, merge
from nh2st_pipe.embedding.work import Slides, Work

__all__ = ["Devices"]

_LOOK_SECONDS = 0.2


@dataclass
class _Child:
    device: str
    process: BaseProcess
    pipe: Connection
    slide: str = ""
    """What it is at."""
    tiles: float = 0.0
    expected: float = 0.0
    summary: EmbedSummary | None = None


class Devices:
    """A process for each of `devices`, each with the encoder of `work` on its own.

    They load it when this is entered, which raises EncoderError where one cannot; leaving ends them.
    """

    def __init__(self, work: Work, devices: Sequence[str]) -> None:
        self._work, self._devices = work, devices
        self._children: list[_Child] = []

    def __enter__(self) -> Devices:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        for device in self._devices:
            here, there = context.Pipe()
            process = context.Process(target=_child, args=(self._work, device, len(self._devices), there), daemon=False)
            with without_main():
                process.start()
            there.close()
            self._children.append(_Child(device, process, here))
        try:
            for child in self._children:
                try:
                    what, value = child.pipe.recv()
                except (EOFError, OSError):
                    child.process.join()
                    raise EncoderError(f"the process for {child.device} {how_it_ended(child.process)}") from None
                if what == "failed":
                    raise value
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.process.is_alive() and child.summary is None:
                child.process.terminate()  # as a flag: it keeps what it has encoded
        for child in self._children:
            child.process.join()
            child.pipe.close()

    def do(self, todo: Slides, summary: EmbedSummary, stop: Stop, progress: Progress) -> None:
        """Embed the slides `todo`. Raises what ends more than one slide, when all processes have ended."""
        for number, child in enumerate(self._children):
            start = number * len(todo) // len(self._children)
            child.pipe.send([*todo[start:], *todo[:start]])
        progress.start("embedding", len(todo), "tiles")
        at_work, gone, errors = list(self._children), list[_Child](), list[BaseException]()
        told = False
        while at_work:
            if (stop.asked or errors) and not told:
                told = True
                for child in at_work:
                    child.process.terminate()
            for pipe in wait([child.pipe for child in at_work], timeout=_LOOK_SECONDS):
                child = next(child for child in at_work if child.pipe is pipe)
                try:
                    what, value = child.pipe.recv()
                except (EOFError, OSError):
                    child.process.join()
                    at_work.remove(child)
                    gone.append(child)
                    if at_work and not told:
                        at = f" while it was at {child.slide}" if child.slide else ""
                        progress.say(
                            f"the process for {child.device} {how_it_ended(child.process)}{at}; the others take over"
                        )
                    continue
                if what == "said":
                    progress.say(value)
                elif what == "tiles":
                    child.tiles, child.expected, child.slide = value
                    done = sum(each.tiles for each in self._children)
                    expected = max(each.expected for each in self._children)
                    progress.advance(done, max(done, expected), child.slide)
                else:
                    child.summary, error = value
                    if error is not None:
                        errors.append(error)
                    at_work.remove(child)
        merge(summary, [child.summary for child in self._children if child.summary is not None])
        if stop.asked:
            raise KeyboardInterrupt
        for error in errors:
            if not isinstance(error, KeyboardInterrupt):
                raise error
        if errors:
            raise errors[0]
        left = {row.slide_id for row in todo} - {*summary.done, *summary.kept, *summary.failed}
        if gone and left:
            how = "; ".join(
                f"that for {each.device} {how_it_ended(each.process)} at {each.slide or '-'}" for each in gone
            )
            raise EncoderError(f"no process is left, and {listed(sorted(left))} are not done: {how}")


class _Piped(Progress):
    """Progress that another process shows. Where that process is gone, saying something raises OSError."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def advance(self, done: float, total: float, now: str = "") -> None:
        self._pipe.send(("tiles", (done, total, now)))

    def say(self, text: str) -> None:
        self._pipe.send(("said", text))


def _child(work: Work, device: str, processes: int, pipe: Connection) -> None:
    """Load the encoder, wait for slides, embed them, and say what came of it."""
    with signals_as_flag() as stop, contextlib.suppress(EOFError, BrokenPipeError):
        try:
            encoder = work.load(device, max(1, cores() // processes))
        except Exception as error:
            pipe.send(("failed", sendable(error)))
            return
        pipe.send(("ready", None))
        while not pipe.poll(_LOOK_SECONDS):
            if stop.asked:
                return
        todo: Slides = pipe.recv()
        summary = EmbedSummary(store=work.store)
        failed: BaseException | None = None
        try:
            work.do(todo, encoder, summary, stop, _Piped(pipe), processes)
        except BaseException as raised:
            failed = sendable(raised)
        pipe.send(("done", (summary, failed)))
