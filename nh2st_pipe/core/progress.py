"""What a person sees while work goes on: a bar on a terminal, plain lines elsewhere, nothing from Python."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["PlainProgress", "Progress", "RichProgress", "progress_for_terminal"]

_PLAIN_SECONDS = 15.0
_LEAST_RATE = 0.1  # per second; slower things are not counted by the second


class Progress:
    """Says nothing. The others override what they show; `unit` names what is counted."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, what: str, total: float, unit: str) -> None:
        """Begin to count `what` up to `total`."""

    def advance(self, done: float, total: float, now: str = "") -> None:
        """Say that `done` of `total` are done, and what is at work `now`."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """End the display."""


class PlainProgress(Progress):
    """A line every fifteen seconds, for logs."""

    def __init__(self) -> None:
        self._what, self._unit = "", ""
        self._began = self._said = time.monotonic()

    def start(self, what: str, total: float, unit: str) -> None:
        """See Progress."""
        self._what, self._unit = what, unit
        self._began = self._said = time.monotonic()

    def advance(self, done: float, total: float, now: str = "") -> None:
        """See Progress."""
        clock = time.monotonic()
        if clock - self._said < _PLAIN_SECONDS:
            return
        self._said = clock
        rate = done / (clock - self._began)
        parts = [f"{done:,.0f} of {total:,.0f} {self._unit}"]
        if rate >= _LEAST_RATE:
            parts.append(f"{rate:.1f} {self._unit}/s")
        if rate > 0:
            parts.append(f"{(total - done) / rate:,.0f} s left")
        self.say(f"{self._what} {now}: {', '.join(parts)}")

    def say(self, text: str) -> None:
        """See Progress."""
        print(text, file=sys.stderr, flush=True)


class RichProgress(Progress):
    """A bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task("", start=False, visible=False, unit="", rate="")
        self._what = ""
        self._began = time.monotonic()

    def start(self, what: str, total: float, unit: str) -> None:
        """See Progress."""
        self._what, self._began = what, time.monotonic()
        self._bars.start()
        self._bars.reset(self._task, total=max(total, 1), description=what, visible=True, unit=unit, rate="")

    def advance(self, done: float, total: float, now: str = "") -> None:
        """See Progress."""
        rate = done / max(time.monotonic() - self._began, 1e-6)
        from rich.markup import escape

        self._bars.update(
            self._task,
            completed=done,
            total=max(total, 1),
            description=escape(f"{self._what} {now}"),
            rate=f"{rate:.1f}/s" if rate >= _LEAST_RATE else "",
        )

    def say(self, text: str) -> None:
        """See Progress."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See Progress."""
        self._bars.stop()


def progress_for_terminal() -> Progress:
    """Return a bar where output goes to a terminal, plain lines elsewhere."""
    return RichProgress() if sys.stderr.isatty() and sys.stdout.isatty() else PlainProgress()
