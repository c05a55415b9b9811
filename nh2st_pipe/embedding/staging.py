"""Slides copied from a slow disk to a local one ahead of need, and deleted when they have been read.

A slide is read in thousands of pieces, each of which waits for the network; copied in one go it comes at the network's
full speed. What cannot be staged (the disk is full, or the format has files that only its own library can name) is
read from where it is, and that is said.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.leftovers import new_folder, sweep

__all__ = ["Stage", "ahead"]

_ONE_FILE = frozenset(
    [
        ".svs",
        ".ndpi",
        ".tif",
        ".tiff",
        ".btf",
        ".tf2",
        ".tf8",
        ".scn",
        ".bif",
        ".qptiff",
        ".svslide",
        ".png",
        ".jpg",
        ".jpeg",
        ".jp2",
        ".webp",
        ".bmp",
    ]
)
_AT_ONCE = 16 << 20  # bytes
_SPARE = 1 << 30  # bytes of the disk that others may need
_KIND = "nh2st-stage"

T = TypeVar("T")


class Stage:
    """A folder of this process's own in `where`, for copies of slides, `most` at a time. Leaving deletes it.

    What processes that were killed have left there is deleted on entering, and nothing of one that lives, wherever.
    """

    def __init__(self, where: Path, stopped: Callable[[], bool] = lambda: False, most: int = 3) -> None:
        self._where, self._stopped = where, stopped
        self.room = threading.Semaphore(most)

    def __enter__(self) -> Stage:
        """Make the folder. Raises UsageError where it cannot be made."""
        try:
            self._where.mkdir(parents=True, exist_ok=True)
            sweep(self._where, _KIND)
            self._folder, self._held = new_folder(self._where, _KIND)
        except OSError as error:
            raise UsageError(f"--stage {self._where} cannot be used: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.let_go()

    def copy(self, slide: Path) -> tuple[Path, str | None]:
        """Return where `slide` is to be read from, and why that is not a copy of it."""
        files = _files(slide)
        if files is None:
            return slide, "not staged, as its format has several files; it is read from where it is"
        try:
            size = sum(file.stat().st_size for file in files)
        except OSError:
            return slide, None  # whoever opens it says what is wrong
        free = shutil.disk_usage(self._folder).free
        if free < size + _SPARE:
            have = f"{free / 1e9:.2f} GB free, of which {_SPARE / 1e9:.0f} stay so, for {size / 1e9:.2f} GB"
            return slide, f"not staged, as {self._where} is full ({have}); it is read from where it is"
        place = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            for file in files:
                target = place / file.relative_to(slide.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._copy(file, target)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            return slide, f"not staged ({error.strerror or error}); it is read from where it is"
        return place / slide.name, None

    def delete(self, copy: Path) -> None:
        """Delete a copy, and nothing that is not one."""
        if copy.is_relative_to(self._folder):
            shutil.rmtree(self._folder / copy.relative_to(self._folder).parts[0], ignore_errors=True)

    def _copy(self, file: Path, target: Path) -> None:
        with file.open("rb") as source, target.open("xb") as sink:
            while (part := source.read(_AT_ONCE)) and not self._stopped():
                sink.write(part)


def _files(slide: Path) -> list[Path] | None:
    """Return all files a slide consists of; None where only its own library knows."""
    suffix = slide.suffix.lower()
    if slide.is_dir():
        return [each for each in slide.rglob("*") if each.is_file()]
    if suffix == ".mrxs":
        beside = slide.with_suffix("")
        return [slide, *(each for each in beside.rglob("*") if each.is_file())] if beside.is_dir() else None
    return [slide] if suffix in _ONE_FILE else None


def ahead(
    items: Iterator[T], prepare: Callable[[T], None], stopped: Callable[[], bool], most: int = 1
) -> Generator[T, None, None]:
    """Yield `items` in their order; a thread takes and prepares the next, `most` of them, while one is at work."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(most)

    def put(what: T | BaseException | None) -> None:
        while not stopped():
            with suppress(queue.Full):
                ready.put(what, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                prepare(item)
                put(item)
            put(None)
        except BaseException as error:  # handed to whoever iterates
            put(error)

    thread = threading.Thread(target=work, name="stage", daemon=True)
    thread.start()
    try:
        while not stopped():
            try:
                what = ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if what is None:
                return
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        thread.join()
