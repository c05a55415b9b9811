"""Predictions as files of other programs, and heads to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nh2st_pipe.cli.options import Json, exit_for, say_failed, show

if TYPE_CHECKING:
    from nh2st_pipe.exporting.run import ExportSummary

__all__ = ["export", "export_record", "push", "say_export"]


def export(
    predictions: Annotated[Path, typer.Argument(help="A prediction, a folder of them, or a run.")],
    to: Annotated[
        str,
        typer.Option(
            help="qupath, spatialdata, ome-tiff, ome-zarr, vitessce, tissuumaps, csv, anndata; several with commas "
            "between them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for a file or folder per slide and target.")] = Path("exported"),
    genes: Annotated[
        str | None,
        typer.Option(
            help="These alone: names with commas between them, or a file with one a line; default: trusted ones."
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Genes that are not trusted and tiles unlike the training tiles too, marked."),
    ] = False,
    slides: Annotated[
        Path | None, typer.Option(help="Manifest that says where the slides are, for tissuumaps to show them.")
    ] = None,
    ngff: Annotated[str, typer.Option(help="Of ome-zarr: 0.5, or 0.4 for older viewers.")] = "0.5",
    base_url: Annotated[
        str, typer.Option(help="Of vitessce: where the folder will be served from.")
    ] = "http://localhost:8080",
    force: Annotated[bool, typer.Option("--force", help="In place of what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write predictions as QuPath and others read them: trusted genes, on tiles like the training tiles."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.exporting.run import export as run

    with progress_for_terminal() as progress:
        summary = run(
            predictions,
            to,
            out,
            genes=genes,
            everything=everything,
            force=force,
            slides=slides,
            ngff=ngff,
            base_url=base_url,
            progress=progress,
        )
    show(export_record(summary), as_json, lambda: say_export(summary))
    exit_for(summary.failed)


def push(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model/.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is made.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request, to somebody else's repository.")
    ] = False,
    with_reference: Annotated[
        bool,
        typer.Option(
            "--with-reference", help="Embeddings of training tiles too, made from patients' slides: may they be public?"
        ),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(help="Benchmark dataset on the hub that the run is of, to whose leaderboard its PCC is told."),
    ] = None,
    task: Annotated[str, typer.Option(help="The benchmark's name of the task.")] = "default",
    as_json: Json = False,
) -> None:
    """Push a trained head to the Hugging Face hub, in one commit, without names of slides and patients."""
    from nh2st_pipe.runs.push import push as run_push

    done = run_push(
        run,
        repo,
        private=private,
        create_pr=create_pr,
        with_reference=with_reference,
        dataset=dataset,
        task=task,
    )

    def say() -> None:
        for notice in done.notices:
            typer.echo(f"note: {notice}")
        typer.echo(f"{', '.join(done.files)}: {done.url}")
        typer.echo(f"nh2st-pipe predict --model {done.model} --slides manifest.csv")

    show({"model": done.model, "url": done.url, "files": done.files, "notices": done.notices}, as_json, say)


def export_record(summary: ExportSummary) -> dict[str, Any]:
    """Return what was exported as JSON has it."""
    return {
        "out": str(summary.out),
        "files": {slide: [str(path) for path in paths] for slide, paths in summary.files.items()},
        "failed": summary.failed,
        "notices": summary.notices,
    }


def say_export(summary: ExportSummary) -> None:
    """Say what was exported, and what not."""
    from nh2st_pipe.evaluation.statistics import many

    for notice in summary.notices:
        typer.echo(f"note: {notice}")
    say_failed(summary.failed)
    files = sum(map(len, summary.files.values()))
    typer.echo(f"{many(files, 'file')} of {many(len(summary.files), 'slide')} in {summary.out}")
