"""Where slides come from: published datasets, and generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nh2st_pipe.cli.options import Device, Json, Weights, exit_for, say_failed, show
from nh2st_pipe.cli.training import aligned, say_run, table
from nh2st_pipe.core.errors import UsageError

__all__ = ["demo", "manifest", "reproduce"]


def manifest(
    layout: Annotated[
        str,
        typer.Argument(
            help="her2st, stnet, skin, stimage, hest, hest-bench, spared, visium, spatialdata or xenium; or a function "
            "of your own, my_layout.py:find."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="The dataset as it was downloaded.")],
    out: Annotated[Path, typer.Option(help="Manifest to write; expression/*.h5ad and spots.png go beside it.")] = Path(
        "manifest.csv"
    ),
    where: Annotated[
        list[str] | None,
        typer.Option(help="Sections to take, by what is known of them: organ=Breast, id=INT*, species='Homo sapiens'."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Where the sections' images are: a folder, a pattern in quotation marks ('/scans/{}*.ndpi', {} being "
            "the section), or a CSV of section,image."
        ),
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
    chosen = {key: value for key, _, value in pairs}
    made = import_dataset(layout, folder, out, typer.echo, where=chosen, images=images, look=look)
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


def reproduce(
    name: Annotated[str, typer.Argument(help="Dataset: her2st, stnet, skin, pcw, mouse, int, zen, or a YAML file.")],
    data: Annotated[Path, typer.Option(help="Folder of its files, as they were downloaded.")],
    out: Annotated[Path | None, typer.Option(help="Folder for all that is made; default: reproduce/NAME.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder recipe by name or YAML file; default: h-optimus-0.")
    ] = None,
    weights: Weights = None,
    views: Annotated[int, typer.Option(help="Dihedral views kept per tile, 1 or 8.")] = 8,
    folds: Annotated[
        str | None, typer.Option(help="What is left out in turn, in place of the dataset's; see train --folds.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the heads' recipes: key=value.")
    ] = None,
    device: Device = "auto",
    jobs: Annotated[int | None, typer.Option(help="Folds trained side by side; see train --jobs.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """From a dataset's files to a table of what is published and what is reached.

    Imports, embeds, and trains nh2st and nh2st-context as the paper judged and as it should be. A call that was cut
    short goes on where it was.
    """
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.datasets.reproduce import reproduce as run

    with progress_for_terminal() as progress:
        done = run(
            name,
            data,
            out=out,
            encoder=encoder,
            weights=weights,
            views=views,
            folds=folds,
            settings=tuple(setting or ()),
            device=device,
            jobs=jobs,
            progress=progress,
        )

    def say() -> None:
        for note in done.notes:
            typer.echo(f"note: {note}")
        wide = max(len(row["judged"]) for row in done.rows)
        lines = [("head", f"{'judged':<{wide}}", "MSE", "MAE", "PCC", "best 50", "top 50", "its null")]
        for row in done.rows:
            cells = (row.get(key) for key in ("mse", "mae", "pcc", "pcc_top50_train", "pcc_top50", "pcc_top50_null"))
            figures = ("–" if value is None else f"{value:.4f}" for value in cells)
            lines.append((row["head"], f"{row['judged']:<{wide}}", *figures))
        typer.echo(aligned(lines))
        typer.echo(f"all of it: {done.out}")

    show(done.record(), as_json, say)
    say_failed(done.failed)
    exit_for(done.failed)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for slides, store, run and report.")] = Path("demo"),
    layout: Annotated[
        str | None,
        typer.Option(help="Small sections in a published layout instead (hest, visium, …), imported and all."),
    ] = None,
) -> None:
    """Make small slides whose expression follows a known rule, and run everything on them."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.demo import next_steps, run_demo, run_layout_demo, standing

    if layout is not None:
        with progress_for_terminal() as progress:
            shown = run_layout_demo(layout, out, progress)
        say_run(shown.run)
        typer.echo("\nThe same by hand:")
        for command in shown.commands:
            typer.echo(f"  {command}")
        return
    with progress_for_terminal() as progress:
        done = run_demo(out, progress)
    say_run(done.run)
    typer.echo("\nPCC of genes that follow the spot (local), its neighbours (neigh), nothing (noise):")
    typer.echo(table(done.groups))
    for words in standing(done.groups):
        typer.echo(words)
    typer.echo(f"\nmade in {out}: slides/, store.zarr (their embeddings), run/ (heads, judged), predictions/")
    typer.echo(f"open this: {done.report.resolve()}")
    typer.echo("\nthree things to try:")
    for what, command in next_steps(out):
        typer.echo(f"  {what}\n    {command}")
