"""The command line: arguments in, one library call, its result in words (or JSON).

Exit status: 0 done; 1 something failed; 2 the call itself is wrong; 130 interrupted. Errors that the package
raises on purpose are printed in one or two lines, without a traceback unless --debug is given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nh2st_pipe

if TYPE_CHECKING:
    from nh2st_pipe.embedding.summary import EmbedSummary
    from nh2st_pipe.training.run import Run

__all__ = ["app", "main"]

_INTERRUPTED = 130  # what typer makes of KeyboardInterrupt

app = typer.Typer(
    name="nh2st-pipe",
    help="Predict spatial gene expression from H&E slides: embed once, train in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Precision(StrEnum):
    """Arithmetic of the encoder."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")]
Weights = Annotated[
    Path | None, typer.Option(help="Weight file of the encoder, in place of the one on the Hugging Face hub.")
]


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


@app.command()
def embed(
    slides: Annotated[Path, typer.Option(help="manifest.csv: slide_id, slide and, where known, expression.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder recipe by name or YAML file; default: the store's, else h-optimus-0. "
            "`nh2st-pipe encoders` lists them."
        ),
    ] = None,
    weights: Weights = None,
    store: Annotated[Path, typer.Option(help="Zarr store to write or go on with.")] = Path("store.zarr"),
    views: Annotated[
        int | None, typer.Option(help="Dihedral views kept per tile, 1 or 8; default: the store's, else 1.")
    ] = None,
    tile_um: Annotated[
        float | None, typer.Option(help="Side of a tile, µm; default: the recipe's, mostly 112.", min=0)
    ] = None,
    tile_px: Annotated[
        float | None,
        typer.Option(help="Side of a tile, px of the slide's full resolution, in place of --tile-um.", min=0),
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Tiles encoded at once; default: 64 on a GPU, 8 on a CPU.", min=1)
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads that read tiles.", min=1)] = 2,
    precision: Annotated[
        Precision,
        typer.Option(help="Encoder arithmetic; auto: the store's, else the recipe's on a GPU, float32 on a CPU."),
    ] = Precision.auto,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Embed slides anew whose files changed since.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stage one: encode every tile of every slide once, into a store.

    Tiles are the spots of a slide's expression file, else a grid over its tissue. Finished slides are never
    touched again; an interrupted run goes on where it was.
    """
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.embedding.run import embed as run

    with progress_for_terminal() as progress:
        summary = run(
            slides,
            encoder=encoder,
            weights=weights,
            store=store,
            views=views,
            tile_um=tile_um,
            tile_px=tile_px,
            device=device,
            batch_size=batch_size,
            workers=workers,
            precision=None if precision is Precision.auto else precision.value,  # type: ignore[arg-type]
            redo_changed=redo_changed,
            progress=progress,
        )
    _show(summary.record(), as_json, lambda: _say_embed(summary))
    _exit_for(summary.failed)


def _say_embed(summary: EmbedSummary) -> None:
    seconds = summary.seconds
    for notice in summary.notices:
        typer.echo(f"note: {notice}")
    typer.echo(
        f"{summary.store}: {summary.encoded_tiles:,} tiles encoded, {len(summary.done)} slides finished, "
        f"{len(summary.kept)} were complete already, {len(summary.failed)} failed; {seconds['total']:.1f} s"
    )
    if summary.encoded_tiles:
        shares = ", ".join(f"{seconds[k] / seconds['total']:.0%} {k}" for k in ("encoder", "reading", "writing"))
        rate = summary.encoded_tiles / seconds["total"]
        typer.echo(f"{rate:.1f} tiles/s; of the time {shares} (reading: waiting for tiles)")
    _say_failed(summary.failed)


@app.command()
def train(
    embeddings: Annotated[Path, typer.Option(help="Store made by `nh2st-pipe embed`, with expression.")],
    recipe: Annotated[str, typer.Option(help="Training recipe by name or YAML file.")] = "nh2st",
    genes: Annotated[
        str | None,
        typer.Option(help="Size of the gene panel, or a file with one gene a line; default: the recipe's."),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            help="patient or slide: leave one out in turn; a number: so many folds of patients; "
            "none: train only. Default: the recipe's (patient)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make; default: runs/RECIPE.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the recipe: key=value, e.g. fit.epochs=50."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; default: the recipe's (2021).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Stage two: train a head on kept embeddings and judge it, its baselines beside it."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.training.run import train as run

    with progress_for_terminal() as progress:
        result = run(
            embeddings,
            recipe=recipe,
            genes=genes,
            folds=folds,
            out=out,
            settings=setting or (),
            seed=seed,
            device=device,
            progress=progress,
        )
    _show({"path": str(result.path), **result.metrics}, as_json, lambda: _say_run(result))


def _say_run(run: Run) -> None:
    metrics = run.metrics
    if metrics["summary"] is not None:
        typer.echo(
            f"{len(metrics['folds'])} folds by {metrics['folds_by']}, protocol {metrics['protocol']}: "
            f"{metrics['protocol_in_words']}"
        )
        typer.echo(run_table(run.table()))
    typer.echo(f"run: {run.path} (model/ is trained on all {metrics['n_slides']} slides; nh2st-pipe report {run.path})")


def run_table(rows: list[dict[str, Any]]) -> str:
    """Return heads and their figures as aligned text; what is undefined is a dash."""
    keys = {
        "local": "local",
        "neigh": "neigh",
        "noise": "noise",
        "pcc": "PCC",
        "pcc_top50": "PCC top 50",
        "mse": "MSE",
        "mae": "MAE",
        "train_seconds": "train s",
    }
    keys = {key: title for key, title in keys.items() if any(key in row for row in rows)}
    width = max(len("head"), *(len(row["head"]) for row in rows))
    lines = ["  ".join([f"{'head':<{width}}", *(f"{title:>10}" for title in keys.values())])]
    for row in rows:
        cells = [
            "–" if row.get(k) is None else f"{row[k]:.1f}" if k == "train_seconds" else f"{row[k]:.4f}" for k in keys
        ]
        lines.append("  ".join([f"{row['head']:<{width}}", *(f"{cell:>10}" for cell in cells)]))
    return "\n".join(lines)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="Run folder, its model/, or a Hugging Face repository.")],
    embeddings: Annotated[Path | None, typer.Option(help="Store to predict for.")] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Manifest to predict for; embedded first, into OUT/store.zarr.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for one .h5ad per slide.")] = Path("predictions"),
    weights: Weights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Predict expression with a trained head, one .h5ad per slide."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.prediction import predict as run

    with progress_for_terminal() as progress:
        summary = run(
            model,
            embeddings=embeddings,
            slides=slides,
            out=out,
            weights=weights,
            device=device,
            progress=progress,
        )

    def say() -> None:
        typer.echo(f"{len(summary.files)} slides predicted into {summary.out}")
        _say_failed(summary.failed)

    _show(summary.record(), as_json, say)
    _exit_for(summary.failed)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder of .h5ad files made by `nh2st-pipe predict`.")],
    embeddings: Annotated[Path, typer.Option(help="Store with the expression of these slides.")],
    out: Annotated[Path | None, typer.Option(help="File to write the figures to, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Judge predictions against the expression in a store."""
    from nh2st_pipe.evaluation.judge import evaluate as run

    figures = run(predictions, embeddings, out)
    rows = [{"head": name, **values} for name, values in {**figures["slides"], "mean": figures["summary"]}.items()]
    _show(figures, as_json, lambda: typer.echo(run_table(rows).replace("head", "slide", 1)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained report.html for a run: figures, genes, true and predicted maps."""
    from nh2st_pipe.reporting.page import report as write

    typer.echo(str(write(run, out)))


@app.command()
def inspect(store: Annotated[Path, typer.Argument(help="Store to look at.")], as_json: Json = False) -> None:
    """Say what is in a store: encoder, weights, tiles, slides."""
    from nh2st_pipe.store.read import open_store

    opened = open_store(store)
    contract = opened.contract
    slides = {
        name: {
            "tiles": opened.tiles(name),
            "patient": opened.manifest.get(name, {}).get("patient", name),
            "expression": opened.has_expression(name),
        }
        for name in opened.slides()
    }
    values = {**contract.attributes(), "slides": slides, "incomplete": opened.incomplete()}

    def say() -> None:
        typer.echo(repr(opened))
        typer.echo(f"weights: {contract.weights_source}, SHA-256 {contract.weights_sha256}; {contract.precision}")
        for name, slide in slides.items():
            what = "with expression" if slide["expression"] else "without expression"
            typer.echo(f"  {name}: {slide['tiles']:,} tiles, patient {slide['patient']}, {what}")
        for name in values["incomplete"]:
            typer.echo(f"  {name}: unfinished; nh2st-pipe embed goes on with it")

    _show(values, as_json, say)


@app.command()
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


@app.command()
def encoders(
    name: Annotated[str | None, typer.Argument(help="Recipe to show whole.")] = None, as_json: Json = False
) -> None:
    """List the encoder recipes, or show one."""
    from nh2st_pipe.recipes import files
    from nh2st_pipe.recipes.encoder import load_encoder_recipe

    recipes = [load_encoder_recipe(each) for each in ([name] if name else files.names("stages/embed"))]
    values = {recipe.name: recipe.model_dump(mode="json") for recipe in recipes}

    def say() -> None:
        if name:
            for key, value in values[recipes[0].name].items():
                typer.echo(f"{key}: {value}")
            return
        for recipe in recipes:
            gate = "gated" if recipe.gated else "free" if recipe.repo or recipe.kind == "fake" else "own download"
            tile = f"{recipe.input_px} px at {recipe.mpp:g} µm/px"
            typer.echo(f"{recipe.name:20} {recipe.dim:>6} values  {tile:22}  {gate:12}  {recipe.licence}")

    _show(values, as_json, say)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for slides, store, run and report.")] = Path("demo"),
) -> None:
    """Make small slides whose expression follows a known rule, and run everything on them."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.demo import run_demo

    with progress_for_terminal() as progress:
        done = run_demo(out, progress)
    _say_run(done.run)
    typer.echo("\nPCC of genes that follow the spot (local), its neighbours (neigh), nothing (noise):")
    typer.echo(run_table(done.groups))
    typer.echo(f"\nslides and embeddings: {out}; predictions: {done.predictions}")
    typer.echo(f"report: {done.report.resolve()}")


def _show(values: dict[str, Any], as_json: bool, say: Any) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))
    else:
        say()


def _say_failed(failed: dict[str, str]) -> None:
    for slide_id, cause in failed.items():
        typer.echo(f"failed: {slide_id}: {cause}", err=True)


def _exit_for(failed: dict[str, str]) -> None:
    if failed:
        raise typer.Exit(1)


def _interrupt(number: int, frame: object) -> None:
    """A batch system's SIGTERM ends work as Ctrl-C does: what is done is kept."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit with its status."""
    from nh2st_pipe.core.errors import NH2STError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except NH2STError as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        print(f"nh2st-pipe: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("nh2st-pipe: interrupted; what was finished is kept", file=sys.stderr)
        raise
    except OSError as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        print(f"nh2st-pipe: {error}; what was finished is kept", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("NH2ST_PIPE_DEBUG"):
            raise
        print(
            f"nh2st-pipe: an error nobody foresaw, {type(error).__name__}: {error}; what was finished is kept. "
            "nh2st-pipe --debug … shows where it arose; please report it",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
