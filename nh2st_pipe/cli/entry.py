"""Where the command line is entered: an end that is asked for while it is still being loaded, or has been done already,
is one line and status 130, as it is in between.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["INTERRUPTED", "at_once", "main"]

INTERRUPTED = 130  # what typer makes of KeyboardInterrupt, too


def at_once() -> None:
    """Have SIGINT and SIGTERM end the process at once: nothing is under way that could be kept."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    os.write(2, b"nh2st-pipe: interrupted\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line and exit with its status."""
    at_once()
    from nh2st_pipe.cli.app import main as run

    status: object = 0
    try:
        run()
    except SystemExit as end:
        status = end.code
    at_once()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # who read it is gone
            status = status or 1
    sys.exit(status)  # type: ignore[arg-type]
