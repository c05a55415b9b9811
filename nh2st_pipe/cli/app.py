"""The command line: arguments in, one library call, its result in words (or JSON).

Exit status: 0 done; 1 something failed; 2 the call itself is wrong; 130 interrupted. Errors that the package
raises on purpose are printed in one or two lines, without a traceback unless --debug is given.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import nh2st_pipe
from nh2st_pipe.cli import benching, datasets, embedding, exporting, importing, machine, searching, training
from nh2st_pipe.cli.entry import INTERRUPTED

__all__ = ["app", "main"]

app = typer.Typer(
    name="nh2st-pipe",
    help="Predict spatial gene expression from H&E slides: embed once, train in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nh2st-pipe {nh2st_pipe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Predict spatial gene expression from H&E slides: embed once, train in seconds."""
    if debug:
        os.environ["NH2ST_PIPE_DEBUG"] = "1"


_COMMANDS: tuple[Callable[..., None], ...] = (
    embedding.check,
    benching.bench,
    benching.benchmark,
    embedding.embed,
    importing.import_features,
    training.train,
    training.sweep,
    training.predict,
    training.evaluate,
    training.compare,
    training.report,
    exporting.export,
    exporting.push,
    searching.index,
    searching.search,
    searching.cohort,
    embedding.inspect,
    embedding.verify,
    embedding.upgrade,
    datasets.manifest,
    datasets.reproduce,
    embedding.encoders,
    training.heads,
    datasets.demo,
    machine.doctor,
)
for _command in _COMMANDS:
    app.command()(_command)


def _interrupt(number: int, frame: object) -> None:
    """A batch system's SIGTERM ends work as Ctrl-C does: what is done is kept."""
    raise KeyboardInterrupt


def _notes(error: BaseException | None) -> str:
    """Return what was added to an error, or to one that it arose from, on its way here."""
    found: list[str] = []
    while error is not None:
        found += getattr(error, "__notes__", [])
        error = error.__cause__ or error.__context__
    return "".join(f"; {note}" for note in dict.fromkeys(found))


def main() -> None:
    """Run the command line and exit with its status."""
    from nh2st_pipe.core.errors import NH2STError

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except NH2STError as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        print(f"nh2st-pipe: {error}{_notes(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(f"nh2st-pipe: interrupted{_notes(end)}", file=sys.stderr)
        raise
    except OSError as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        at, why = error.filename, error.strerror or str(error) or type(error).__name__
        print(f"nh2st-pipe: {why if at is None else f'{at}: {why}'}{_notes(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        print(
            f"nh2st-pipe: an error nobody foresaw, {type(error).__name__}: {error}{_notes(error)}. "
            "nh2st-pipe --debug … shows where it arose; please report it",
            file=sys.stderr,
        )
        sys.exit(1)
