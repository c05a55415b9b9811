"""What this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nh2st_pipe.cli.options import Json, show

__all__ = ["doctor"]


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where stores and runs are to lie.")] = Path(),
    hub: Annotated[
        bool, typer.Option(help="Ask the Hugging Face hub which gated encoders its token opens.", show_default=False)
    ] = True,
    self_test: Annotated[
        bool, typer.Option(help="Embed and train on two generated slides, in about ten seconds.", show_default=False)
    ] = True,
    as_json: Json = False,
) -> None:
    """Look at this machine: packages, GPU, disk, locks, the hub; each line with what to do.

    Exit status 1 where something will fail.
    """
    from nh2st_pipe.doctor import WIDE, Finding, examine, said_of, worst

    found = list[Finding]()
    for finding in examine(folder, hub=hub, self_test=self_test):
        found.append(finding)
        if not as_json:
            typer.echo(said_of(finding, WIDE))
    status = worst(found)
    if as_json:
        show({"findings": [each.to_json() for each in found]}, True, lambda: None)
    if status:
        raise typer.Exit(status)
