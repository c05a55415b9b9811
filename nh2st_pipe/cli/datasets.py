"""Where slides come from: published datasets, and generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nh2st_pipe.cli.options import say_failed
from nh2st_pipe.cli.training import say_run, table
from nh2st_pipe.core.errors import UsageError

__all__ = ["demo", "manifest"]


def manifest(
    layout: Annotated[
        str, typer.Argument(help="Dataset layout: her2st, stnet, skin, stimage, hest or visium (Space Ranger's outs).")
    ],
    folder: Annotated[Path, typer.Argument(help="The dataset as it was downloaded.")],
    out: Annotated[Path, typer.Option(help="Manifest to write; expression/*.h5ad and spots.png go beside it.")] = Path(
        "manifest.csv"
    ),
    where: Annotated[
        list[str] | None,
        typer.Option(help="Sections to take, by what is known of them: organ=Breast, id=INT*, species='Homo sapiens'."),
    ] = None,
    look: Annotated[
        bool, typer.Option("--look/--no-look", help="Hold the spots against the tissue, and draw them in spots.png.")
    ] = True,
) -> None:
    """Turn a published dataset into a manifest and one .h5ad per section.

    Exit status 1 where a section is left out, or its spots do not lie on its tissue.
    """
    from nh2st_pipe.datasets import import_dataset

    pairs = [text.partition("=") for text in where or ()]
    wrong = next((text for text, pair in zip(where or (), pairs, strict=True) if not all(pair)), None)
    if wrong is not None:
        raise UsageError(f"--where takes key=value, not {wrong}")
    made = import_dataset(layout, folder, out, typer.echo, where={key: value for key, _, value in pairs}, look=look)
    patients = len({row.patient for row in made.rows})
    typer.echo(f"{out}: {len(made.rows)} slides of {patients} patient{'s' if patients != 1 else ''}")
    if made.picture is not None:
        typer.echo(f"{made.picture}: the spots on their tissue, to be looked at")
    for slide_id, doubts in made.doubts.items():
        for words in doubts:
            typer.echo(f"look: {slide_id}: {words}", err=True)
    say_failed(made.failed)
    if made.failed or made.doubts:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for slides, store, run and report.")] = Path("demo"),
) -> None:
    """Make small slides whose expression follows a known rule, and run everything on them."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.demo import run_demo, standing

    with progress_for_terminal() as progress:
        done = run_demo(out, progress)
    say_run(done.run)
    typer.echo("\nPCC of genes that follow the spot (local), its neighbours (neigh), nothing (noise):")
    typer.echo(table(done.groups))
    for words in standing(done.groups):
        typer.echo(words)
    typer.echo(f"\nslides and embeddings: {out}; predictions: {done.predictions}")
    typer.echo(f"report: {done.report.resolve()}")
