"""Which encoder: a pilot with each before the whole of a study is embedded, and public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nh2st_pipe.cli.options import Device, Json, TilePx, TrustRemoteCode, Weights, Workers, exit_for, say_failed, show
from nh2st_pipe.cli.training import Actors, Address, aligned
from nh2st_pipe.core.errors import UsageError

if TYPE_CHECKING:
    from nh2st_pipe.benching.hest import Benchmarked
    from nh2st_pipe.benching.run import Benched

__all__ = ["bench", "benchmark"]


def bench(
    slides: Annotated[Path, typer.Option(help="manifest.csv of the whole study.")],
    encoders: Annotated[str, typer.Option(help="Encoders to try, names or YAML files with commas between them.")],
    pilot: Annotated[int, typer.Option(help="Spots of each slide, in patches of 100.", min=1)] = 200,
    pilot_slides: Annotated[
        int, typer.Option(help="Slides at most, one of each patient before a second of any.", min=1)
    ] = 12,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: an encoder's weight file, in place of the one on the hub; may be repeated."),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(help="What is left out in turn, as in train; default: patient, else slide, else block."),
    ] = None,
    genes: Annotated[int | None, typer.Option(help="Size of the gene panel; default: the recipe's, 250.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pilot, stores and runs; what is there is not repeated.")] = Path(
        "bench"
    ),
    tile_um: Annotated[
        float | None, typer.Option(help="Side of a tile, µm; default: each encoder's own, mostly 112.", min=0)
    ] = None,
    tile_px: TilePx = None,
    seed: Annotated[int, typer.Option(help="Seed of the pilot's patches and of the folds.")] = 2021,
    device: Device = "auto",
    workers: Workers = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Try encoders on a sample of spots: PCC with an interval, tiles/s here, and the hours all would take."""
    from nh2st_pipe.benching.run import bench as run
    from nh2st_pipe.core.progress import progress_for_terminal

    files = {}
    for each in weights or ():
        name, equals, file = each.partition("=")
        if not equals or not file:
            raise UsageError(f"--weights takes NAME=FILE here, one for each encoder that needs it, not '{each}'")
        files[name] = Path(file)
    with progress_for_terminal() as progress:
        found = run(
            slides,
            [name.strip() for name in encoders.split(",") if name.strip()],
            pilot=pilot,
            pilot_slides=pilot_slides,
            weights=files,
            folds=folds,
            genes=genes,
            out=out,
            tile_um=tile_um,
            tile_px=tile_px,
            seed=seed,
            device=device,
            workers=workers,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show(found.record(), as_json, lambda: _say(found))
    exit_for({**found.failed, **found.left_out})


def benchmark(
    suite: Annotated[str, typer.Argument(help="Benchmark: hest.")],
    folder: Annotated[Path, typer.Argument(help="HEST-Benchmark as it was downloaded: a folder a task.")],
    encoder: Annotated[str, typer.Option(help="Encoder recipe by name or YAML file.")],
    weights: Weights = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks with commas between them; default: all there are.")] = None,
    heads: Annotated[str, typer.Option(help="Training recipes with commas between them.")] = "hest-ridge,nh2st-context",
    views: Annotated[int, typer.Option(help="Dihedral views kept per patch, 1 or 8; hest-ridge reads one.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all that is made; default: benchmark/hest-ENCODER.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the heads' recipes: key=value.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    engine: Annotated[
        str,
        typer.Option(help="local: this machine. ray: a Ray cluster, slides and splits as its tasks; nh2st-pipe[ray]."),
    ] = "local",
    address: Address = None,
    actors: Actors = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run HEST-Benchmark with an encoder: its splits and genes, judged as it does and as this package does.

    Says which published row hest-ridge should equal. A call that was cut short goes on where it was.
    """
    from nh2st_pipe.benching.hest import benchmark_hest
    from nh2st_pipe.core.progress import progress_for_terminal

    if suite != "hest":
        raise UsageError(f"no benchmark is called '{suite}' (there is hest)")
    with progress_for_terminal() as progress:
        done = benchmark_hest(
            folder,
            encoder=encoder,
            weights=weights,
            tasks=_names(tasks),
            heads=_names(heads),
            views=views,
            out=out,
            settings=tuple(setting or ()),
            seed=seed,
            device=device,
            workers=workers,
            engine=engine,
            address=address,
            actors=actors,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show(done.record(), as_json, lambda: _say_benchmark(done))
    say_failed(done.failed)
    exit_for(done.failed)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _say_benchmark(done: Benchmarked) -> None:
    lines = [("task", "head", "HEST's protocol", "ours")]
    for row in [*done.rows, *(done.means() if len(done.rows) else [])]:
        figures = ("–" if row.get(key) is None else f"{row[key]:.4f}" for key in ("hest", "ours"))
        lines.append((row["task"], f"{row['head']:<16}", *figures))
    typer.echo(aligned(lines))
    typer.echo("HEST's: ln(1 + counts), PCC over all test spots of a split; ours: the recipe's targets, PCC by slide")
    typer.echo(done.published())
    for row in done.rows:
        if row.get("undefined"):
            typer.echo(f"note: task {row['task']}, {row['head']}: {row['undefined']} genes without a PCC left out")
    for note in done.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"all of it: {done.out}")


def _say(found: Benched) -> None:
    if found.rows:
        of = f"{found.spots:,} spots of {found.slides} slides"
        typer.echo(f"{of}; PCC: mean over {found.unit}s, 95% interval (Student's)")
        wide = max(len("encoder"), *(len(row["encoder"]) for row in found.rows))
        head = f"{'encoder':{wide}}  {'values':>6}  {'PCC':>6}  {'interval':>16}  {'behind the best':>25}"
        typer.echo(f"{head}  {'tiles/s':>8}  {'whole study':>26}")
    for row in found.rows:
        pcc = "    –" if row["pcc"] is None else f"{row['pcc']:.4f}"
        interval = "–" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        behind = "" if row["verdict"] == "best" or row["behind"] is None else f"{row['behind']:.4f}"
        if row["behind_low"] is not None:
            behind += f" ({row['behind_low']:+.4f} to {row['behind_high']:+.4f})"
        rate = "–" if row["tiles_per_second"] is None else f"{row['tiles_per_second']:.1f}"
        hours = "–" if row["hours"] is None else f"{row['tiles']:,} tiles, {_duration(row['hours'])}"
        what = f"{row['encoder']:{wide}}  {row['dim']:>6}  {pcc:>6}  {interval:>16}  {behind:>25}"
        use = "" if row["commercial"] is not False else "  not commercial"
        typer.echo(f"{what}  {rate:>8}  {hours:>26}{use}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"kept in {found.out}")
    say_failed(found.failed)
    say_failed(found.left_out)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
