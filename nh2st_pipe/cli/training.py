"""Stage two: train, and what is done with a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nh2st_pipe.cli.exporting import export_record, say_export
from nh2st_pipe.cli.options import Device, Json, TrustRemoteCode, Weights, exit_for, say_failed, show
from nh2st_pipe.core.errors import UsageError, listed

if TYPE_CHECKING:
    from nh2st_pipe.training.run import Run

__all__ = ["KEY", "aligned", "compare", "evaluate", "heads", "predict", "report", "say_run", "sweep", "table", "train"]


Genes = Annotated[
    str | None,
    typer.Option(help="Size of the gene panel, all, or a file with one gene a line; default: the recipe's."),
]
Folds = Annotated[
    str | None,
    typer.Option(
        help="What is left out in turn: patient, slide, a column of the manifest, or block (a quarter of every "
        "slide); :K behind it makes K folds of whole groups, a number alone K folds of patients; none: train only. "
        "Default: the recipe's (patient)."
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a field of the recipe: key=value, e.g. head.network.epochs=80."),
]
Seed = Annotated[int | None, typer.Option(help="Random seed; default: the recipe's (2021).")]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Heads and folds trained side by side, in processes that share one copy of the embeddings; default: "
        "the processors, where that pays (1 on a GPU).",
        min=1,
    ),
]
Engine = Annotated[
    str, typer.Option(help="local: this machine. ray: a Ray cluster, fits as its tasks; needs nh2st-pipe[ray].")
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster, as host:6379 or auto; default: RAY_ADDRESS, else one made on this machine."),
]
Actors = Annotated[
    int | None, typer.Option(help="Actors on Ray; default: one for each GPU of the cluster, or each CPU.", min=1)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for all that training holds, e.g. 8GB: where it would be more, counts and targets come slide by "
        "slide and embeddings from a local disk (TMPDIR), with the same results. Default: six tenths of what is free."
    ),
]


def train(
    embeddings: Annotated[
        str | None,
        typer.Option(help="Store made by `nh2st-pipe embed`, with expression; --repeat knows its own."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Training recipe by name or YAML file; default: nh2st-context.")
    ] = None,
    genes: Genes = None,
    folds: Folds = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make; default: runs/RECIPE.")] = None,
    setting: Setting = None,
    seed: Seed = None,
    device: Device = "auto",
    jobs: Jobs = None,
    max_memory: MaxMemory = None,
    trust_from: Annotated[
        float | None,
        typer.Option(help="PCC from which on a gene is usefully predicted, for the verdict on it; default: 0.2."),
    ] = None,
    gene_vectors: Annotated[
        Path | None,
        typer.Option(
            help="Vectors of genes (.csv, .parquet, .h5ad, .npz, word2vec's .txt), from which nh2st-query predicts "
            "genes that it never saw."
        ),
    ] = None,
    leave_genes_out: Annotated[
        int | None,
        typer.Option(
            help="Leave genes out too, in as many folds, and say what nh2st-query reaches on genes that it never saw.",
            min=2,
        ),
    ] = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    again: Annotated[
        Path | None,
        typer.Option("--repeat", help="Run to make again: its recipe, seed, genes, folds and device; held against it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Stage two: train a head on kept embeddings and judge it, its baselines beside it."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.training.run import train as run

    if again is not None:
        if engine != "local" or address is not None or actors is not None:
            raise UsageError("--repeat makes a run again on this machine; leave --engine, --address and --actors out")
        if any(value is not None for value in (recipe, genes, folds, setting, seed, gene_vectors, leave_genes_out)):
            raise UsageError("--repeat takes recipe, genes, folds, settings and seed from its run; leave them out")
        _repeat(again, embeddings, out, None if device == "auto" else device, jobs, as_json)
        return
    if embeddings is None:
        raise UsageError("give the store to train on with --embeddings")
    with progress_for_terminal() as progress:
        result = run(
            embeddings,
            recipe=recipe or "nh2st-context",
            genes=genes,
            folds=folds,
            out=out,
            settings=setting or (),
            seed=seed,
            device=device,
            jobs=jobs,
            max_memory=max_memory,
            trust_from=trust_from,
            gene_vectors=gene_vectors,
            leave_genes_out=leave_genes_out,
            engine=engine,
            address=address,
            actors=actors,
            progress=progress,
        )
    show({"path": str(result.path), **result.metrics}, as_json, lambda: say_run(result))


def _repeat(
    of: Path, embeddings: str | None, out: Path | None, device: str | None, jobs: int | None, as_json: bool
) -> None:
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.training.repeat import repeat

    with progress_for_terminal() as progress:
        found = repeat(of, embeddings, out=out, device=device, jobs=jobs, progress=progress)

    def say() -> None:
        say_run(found.run)
        if not found.other:
            typer.echo(f"the same as {of} bit for bit: model and {len(found.same) - 1} predictions")
            return
        typer.echo(f"not the same as {of}: {listed(found.other)}")
        for reason in found.reasons:
            typer.echo(f"note: {reason}")

    show(found.record(), as_json, say)
    if found.other:
        raise typer.Exit(1)


def sweep(
    recipe: Annotated[str, typer.Argument(help="Training recipe by name or YAML file.")],
    embeddings: Annotated[str, typer.Option(help="Store made by `nh2st-pipe embed`, with expression.")],
    grid: Annotated[
        list[str],
        typer.Option(help="key=a,b,c: a field of the recipe and its values; may be repeated, for all combinations."),
    ],
    genes: Genes = None,
    folds: Folds = None,
    out: Annotated[Path | None, typer.Option(help="Folder with a run for each; default: sweeps/RECIPE.")] = None,
    setting: Setting = None,
    seed: Seed = None,
    device: Device = "auto",
    jobs: Jobs = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    as_json: Json = False,
) -> None:
    """Train a recipe in every combination of some settings; what is there already is kept."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.training.sweep import sweep as run

    with progress_for_terminal() as progress:
        found = run(
            recipe,
            embeddings,
            grid,
            genes=genes,
            folds=folds,
            out=out,
            settings=setting or (),
            seed=seed,
            device=device,
            jobs=jobs,
            engine=engine,
            address=address,
            actors=actors,
            progress=progress,
        )

    def say() -> None:
        if found.rows:
            typer.echo(table([{**row, "head": row["cell"]} for row in found.rows], "cell"))
        typer.echo(f"{len(found.done)} cells trained, {len(found.kept)} were there, {len(found.failed)} failed")
        for note in found.notes:
            typer.echo(f"note: {note}")
        typer.echo(f"table: {found.out / 'sweep.csv'}")
        say_failed(found.failed)

    show(found.record(), as_json, say)
    exit_for(found.failed)


KEY = (
    "best 50: genes picked on training slides; top 50: picked by these very PCCs, as in papers; its null: top 50 of "
    "maps without any tie"
)
"""What the columns of a table are."""


def say_run(run: Run) -> None:
    """Print a run's table and where it is."""
    from nh2st_pipe.evaluation.statistics import headline

    metrics = run.metrics
    if metrics["summary"] is not None:
        by = metrics["folds_by"].partition(":")[0]
        typer.echo(
            f"{len(metrics['folds'])} folds by {by}, protocol {metrics['protocol']}: {metrics['protocol_in_words']}"
        )
        typer.echo(table(run.rows()))
        typer.echo(f"{metrics['head']}: {headline(metrics['summary'])}")
        typer.echo(KEY)
    if "unseen_genes" in metrics:
        _say_unseen(metrics["unseen_genes"])
    for note in metrics["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"run: {run.path} (model/ is trained on all {metrics['n_slides']} slides; nh2st-pipe report {run.path})")


def _say_unseen(figures: dict[str, Any]) -> None:
    """Print what was reached on genes that were left out."""
    from nh2st_pipe.evaluation.unseen import ALL, NEAREST, verdict_in_words

    typer.echo(
        f"\n{figures['genes']:,} genes left out in {figures['folds']} folds, on slides that were left out too; their "
        f"vectors: {figures['vectors']}"
    )
    lines = [("predicted by", "PCC", "95 % interval", "by query is")]
    for row in figures["rows"]:
        interval = "–" if row["pcc_low"] is None else f"{row['pcc_low']:.3f} to {row['pcc_high']:.3f}"
        beside = verdict_in_words(figures, row["by"]) if row["by"] in (NEAREST, ALL) else ""
        lines.append((row["by"], "–" if row["pcc"] is None else f"{row['pcc']:.4f}", interval, beside))
    typer.echo(aligned(lines))
    typer.echo(
        "trained on: these genes, when the head saw them; nearest genes: the mean of the genes whose vectors are most "
        "alike; all genes: the mean of all others\n"
    )


def table(rows: list[dict[str, Any]], what: str = "head") -> str:
    """Return heads and their figures as aligned text, `what` above their names; what is undefined is a dash."""
    keys = {
        "local": "local",
        "neigh": "neigh",
        "noise": "noise",
        "pcc": "PCC",
        "interval": "95 % interval",
        "pcc_top50_train": "best 50",
        "pcc_top50": "top 50",
        "pcc_top50_null": "its null",
        "mse": "MSE",
        "mae": "MAE",
        "train_seconds": "train s",
    }
    rows = [_with_interval(row) for row in rows]
    keys = {key: title for key, title in keys.items() if any(key in row for row in rows)}
    lines = [(what, *keys.values())]
    for row in rows:
        cells = (row.get(key) for key in keys)
        lines.append((row["head"], *(_cell(key, cell) for key, cell in zip(keys, cells, strict=True))))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of as many cells as text: the first column to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join((f"{head:<{wide[0]}}", *(f"{c:>{w}}" for c, w in zip(cells, wide[1:], strict=True))))
            for head, *cells in lines)  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def _with_interval(row: dict[str, Any]) -> dict[str, Any]:
    if "pcc_low" not in row:
        return row
    low, high = row["pcc_low"], row["pcc_high"]
    return {**row, "interval": "–" if low is None else f"{low:.3f} to {high:.3f}"}


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.1f}" if key == "train_seconds" else f"{value:.4f}"


def predict(
    model: Annotated[str, typer.Option(help="Run folder, its model/, or hf-hub:owner/name.")],
    embeddings: Annotated[str | None, typer.Option(help="Store to predict for.")] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Manifest to predict for; embedded first, into OUT/store.zarr.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for one .h5ad per slide.")] = Path("predictions"),
    weights: Weights = None,
    device: Device = "auto",
    level: Annotated[float, typer.Option(help="Of the intervals around each value: 0.5, 0.8, 0.9 or 0.95.")] = 0.9,
    genes: Annotated[
        str | None, typer.Option(help="Write these alone: names with commas between them, or a file with one a line.")
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="Genes to predict too that the head never saw, by their vectors (nh2st-query): names, or a file."
        ),
    ] = None,
    trusted_only: Annotated[
        bool, typer.Option("--trusted-only", help="Write the genes alone that the model is trusted on.")
    ] = False,
    float16: Annotated[
        bool, typer.Option("--float16", help="Keep values in half precision: files of half the size.")
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="Write OUT/report.html too: maps of every gene.")
    ] = False,
    exports: Annotated[
        str | None,
        typer.Option(
            "--export", help="Write OUT/exported too, for these programs: qupath,spatialdata …; see nh2st-pipe export."
        ),
    ] = None,
    any_mpp: Annotated[
        bool, typer.Option("--any-mpp", help="Predict slides of another resolution too, with tiles of as many px.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local: this machine. ray: a Ray cluster, slides as its tasks; needs nh2st-pipe[ray].")
    ] = "local",
    address: Address = None,
    actors: Actors = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Predict expression with a trained head, one .h5ad per slide."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.prediction import predict as run

    if exports is not None:
        from nh2st_pipe.exporting.run import export, targets_named

        for target in targets_named(exports):
            target.writer()  # what is missing is said before any work
    with progress_for_terminal() as progress:
        summary = run(
            model,
            embeddings=embeddings,
            slides=slides,
            out=out,
            weights=weights,
            device=device,
            level=level,
            genes=genes,
            query=query,
            trusted_only=trusted_only,
            float16=float16,
            any_mpp=any_mpp,
            engine=engine,
            address=address,
            actors=actors,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    page = _report(summary.out, summary.files, slides) if with_report and summary.files else None
    exported = None
    if exports is not None and summary.files:
        folder, files = summary.out / "exported", list(summary.files.values())
        with progress_for_terminal() as progress:
            exported = export(summary.out, exports, folder, slides=slides, only=files, force=True, progress=progress)

    def say() -> None:
        for notice in summary.notices:
            typer.echo(f"note: {notice}")
        typer.echo(f"{len(summary.files)} slides predicted into {summary.out}")
        if page is not None:
            typer.echo(f"report: {page}")
        say_failed(summary.failed)
        if exported is not None:
            say_export(exported)

    record = {**summary.record(), **({} if page is None else {"report": str(page)})}
    show({**record, **({} if exported is None else {"exported": export_record(exported)})}, as_json, say)
    exit_for({**summary.failed, **({} if exported is None else exported.failed)})


def _report(out: Path, files: dict[str, Path], slides: Path | None) -> Path:
    """Write the report of the predictions that were just made, whatever else lies in their folder."""
    from nh2st_pipe.reporting.page import report as write

    return write(out, only=list(files.values()), slides=slides)


def evaluate(
    predictions: Annotated[
        Path, typer.Option(help="Folder of .h5ad files made by `nh2st-pipe predict`, or a run folder.")
    ],
    embeddings: Annotated[str, typer.Option(help="Store with the expression of these slides.")],
    out: Annotated[Path | None, typer.Option(help="File to write the figures to, as JSON.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="More figures, by name: spearman, pcc_gene, pcc_spot, pcc_heg, pcc_hvg.")
    ] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(help="GMT file: the PCC of each set's mean z-score is given too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge predictions against the expression in a store."""
    from nh2st_pipe.evaluation.judge import evaluate as run

    figures = run(predictions, embeddings, out, figures=metric or (), gene_sets=gene_sets)
    slides, count = figures["slides"], figures["in_sample"]
    rows = [{"head": f"{name} (in-sample)" if each["in_sample"] else name, **each} for name, each in slides.items()]
    rows.append({"head": f"mean ({count} of {len(slides)} in-sample)" if count else "mean", **figures["summary"]})
    if "summary_new" in figures:
        rows.append({"head": "mean of the new ones", **figures["summary_new"]})

    def say() -> None:
        typer.echo(table(rows).replace("head", "slide", 1))
        for name, words in figures.get("definitions", {}).items():
            of_slides = ", ".join(f"{slide} {_figure(each[name], 3)}" for slide, each in figures["slides"].items())
            typer.echo(f"{name} {_figure(figures['summary'][name], 4)} ({of_slides}): {words}")
        for name, value in sorted(figures.get("gene_sets", {}).items(), key=lambda pair: -(pair[1] or -2)):
            typer.echo(f"gene set {name}: PCC {_figure(value, 3)}")
        for note in figures["notes"]:
            typer.echo(f"note: {note}")

    show(figures, as_json, say)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first one's head is held against all others.")],
    as_json: Json = False,
) -> None:
    """Hold runs and their baselines side by side: paired differences over slides, and whether chance explains them."""
    from nh2st_pipe.evaluation.compare import compare as run

    found = run(runs)

    def say() -> None:
        typer.echo(
            f"{found.reference} against the others, over {found.n_units} {found.unit}s and {found.n_genes} genes; "
            "Δ: its PCC less theirs, with Student's 95 % interval"
        )
        lines = [
            ("head", "PCC", "best 50", "top 50", "MSE", "Δ PCC", "interval", "p", f"{found.unit}s won", "genes won", "")
        ]
        for row in found.rows:
            means = [_figure(row[key], 3) for key in ("pcc", "pcc_top50_train", "pcc_top50")]
            figures = (*means, _figure(row["mse"], 4))
            against = [""] * 6
            if "difference" in row:
                of = row["difference"]["pcc"]
                interval = "–" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"
                won = (f"{row['units_won']}/{found.n_units}", f"{row['genes_won']}/{row['genes']}")
                p = "–" if of["p"] is None else f"{of['p']:.3f}"
                against = [_figure(of["mean"], 3, "+"), interval, p, *won, row["verdict"]]
            lines.append((row["head"], *figures, *against))
        rows = aligned([line[:-1] for line in lines]).splitlines()
        for text, (*_, verdict) in zip(rows, lines, strict=True):
            typer.echo(f"{text}  {verdict}".rstrip())
        for note in found.notes:
            typer.echo(f"note: {note}")

    show(found.record(), as_json, say)


def _figure(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, one that was interrupted, or a folder of predictions.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: RUN/report.html.")] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(help="Gene sets (GMT), each of which gets maps: the mean of its genes.")
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="Outlines as QuPath exports them: a folder with SLIDE.geojson, or a file for the only slide."
        ),
    ] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Manifest that says where the slides are: the H&E under spots is shown.")
    ] = None,
    domains: Annotated[
        int | None,
        typer.Option(help="Part each slide into so many domains, as measured and as predicted: how do they match?"),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Store of whose embeddings domains are found too, with --domains.")
    ] = None,
) -> None:
    """Write one self-contained report.html for a run or predictions: verdict, genes, measured and predicted maps."""
    from nh2st_pipe.reporting.page import report as write

    typer.echo(
        str(
            write(run, out, gene_sets=gene_sets, regions=regions, slides=slides, domains=domains, embeddings=embeddings)
        )
    )


def heads(as_json: Json = False) -> None:
    """List the heads that can be trained, ours and those that packages register."""
    from nh2st_pipe.heads.registry import every_head

    every = every_head()
    lines = [f"{each['name']:<16} {each['about']}" for each in every]
    show({"heads": every}, as_json, lambda: typer.echo("\n".join(lines)))
