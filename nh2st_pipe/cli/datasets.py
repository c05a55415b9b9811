"""Where slides come from: published datasets, and generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nh2st_pipe.cli.training import say_run, table

__all__ = ["demo", "manifest"]


def manifest(
    layout: Annotated[str, typer.Argument(help="Dataset layout: her2st.")],
    folder: Annotated[Path, typer.Argument(help="The dataset as it was downloaded.")],
    out: Annotated[Path, typer.Option(help="Manifest to write; .h5ad files go to expression/ beside it.")] = Path(
        "manifest.csv"
    ),
) -> None:
    """Turn a published dataset into a manifest and one .h5ad per section."""
    from nh2st_pipe.datasets import import_dataset

    rows = import_dataset(layout, folder, out, typer.echo)
    patients = len({row.patient for row in rows})
    typer.echo(f"{out}: {len(rows)} slides of {patients} patient{'s' if patients != 1 else ''}")


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
