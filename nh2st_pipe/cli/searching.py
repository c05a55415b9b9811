"""Many slides together: tiles and slides found by how they look and what is predicted there, and cohorts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nh2st_pipe.cli.options import Device, Json, TrustRemoteCode, Weights, exit_for, say_failed, show
from nh2st_pipe.core.errors import UsageError

if TYPE_CHECKING:
    from nh2st_pipe.searching.search import Hits

__all__ = ["cohort", "index", "search"]

STORES = Annotated[
    list[str], typer.Argument(metavar="STORE...", help="Store made by `nh2st-pipe embed`, or several that are alike.")
]
IndexAt = Annotated[
    Path | None,
    typer.Option("--index", help="Folder of the index; default: STORE.search beside the store; several need it."),
]


def index(
    store: STORES,
    where: IndexAt = None,
    anew: Annotated[
        bool, typer.Option("--anew", help="Make all of it again, its mean and stain directions too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make or renew the index that `search` needs: only slides that are new or have changed are read."""
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.evaluation.statistics import many
    from nh2st_pipe.searching.coarse import coarse_of
    from nh2st_pipe.searching.index import index_of
    from nh2st_pipe.searching.stores import together

    with progress_for_terminal() as progress:
        found = index_of(together(store), where, anew=anew, progress=progress)
        coarse = coarse_of(found, progress=progress)
    record = {
        "index": str(found.path),
        "slides": len(found.slides),
        "tiles": len(found),
        "renewed": list(found.renewed),
        "coarse": coarse is not None,
    }
    of = f"{many(len(found), 'tile')} of {many(len(found.slides), 'slide')}"
    words = f"{found.path}: {of}, {len(found.renewed):,} of them read now"
    show(record, as_json, lambda: typer.echo(words))


def search(
    store: STORES,
    slide: Annotated[
        str | None, typer.Option(help="Slides like this one; with --tile, --at or --region, tiles.")
    ] = None,
    tile: Annotated[str | None, typer.Option(help="Tiles like this tile of --slide, by its name.")] = None,
    at: Annotated[str | None, typer.Option(help="Tiles like the one at x,y of --slide (level-0 px).")] = None,
    region: Annotated[
        Path | None, typer.Option(help="Tiles like those within an outline on --slide, as QuPath exports it.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Tiles like the middle of a picture of your own, through the store's encoder.")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="µm per px of --image; default: as it says itself.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Tiles where this holds: 'ERBB2 > p90 and trusted and unlike < 95'; needs --predictions."),
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder of predictions, or a run.")] = None,
    genes: Annotated[str | None, typer.Option(help="Tell values of these genes too, with commas between them.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 20,
    same_patient: Annotated[
        bool, typer.Option("--same-patient", help="Tiles of other slides of the asker's own patient too.")
    ] = False,
    index_at: IndexAt = None,
    out: Annotated[Path | None, typer.Option(help="Write the hits to this .csv file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the hits to this page, as pictures.")] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Manifest that says where the slides are, for the page to show their H&E.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find tiles that look like a tile or region, slides like a slide, and tiles by what is predicted there.

    Exact: every tile of the index is held against the query. Those of the asker's own patient are left out.
    """
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.searching.search import Query
    from nh2st_pipe.searching.search import search as run

    if slides is not None and html is None:
        raise UsageError("--slides says where the slides are for a page to show them; --html FILE says which page")
    named = tuple(name.strip() for name in (genes or "").split(",") if name.strip())
    query = Query(slide, tile, _place(at), region, image, mpp, where, same_patient, named, k)
    with progress_for_terminal() as progress:
        hits = run(
            store,
            query,
            predictions=predictions,
            index=index_at,
            weights=weights,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if out is not None:
        from nh2st_pipe.core.whole import written_whole

        with written_whole(out) as part:
            hits.frame().write_csv(part)
    if html is not None:
        from nh2st_pipe.searching.page import write_page
        from nh2st_pipe.searching.stores import together

        within = tile or at or region
        like = f"Like {within} on slide {slide}" if within else f"Slides like {slide}" if slide else ""
        asked = [like or (f"Like {image}" if image else ""), f"where {where}" if where else ""]
        write_page(html, hits, together(store), slides, ", ".join(filter(None, asked)), hits.asker)
    about = {"searched": hits.searched, "unit": hits.unit, "notices": hits.notices}
    record = {"hits": [hit.record() for hit in hits], **about}
    show(record, as_json, lambda: _say(hits))


def cohort(
    predictions: Annotated[Path, typer.Argument(help="A folder of predictions, or a run.")],
    out: Annotated[Path, typer.Option(help="Folder for cohort.csv, patients.h5ad and cohort.html.")] = Path("cohort"),
    gene_sets: Annotated[Path | None, typer.Option(help="Gene sets (GMT): a score of each slide.")] = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="Folder of SLIDE.geojson (QuPath): means and scores of their regions too, regions.csv, .h5ad."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put predictions of many slides together: which are unlike or stand apart, and means by patient."""
    from nh2st_pipe.cohorts.run import write_cohort
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.evaluation.statistics import many

    with progress_for_terminal() as progress:
        found, paths = write_cohort(predictions, out, gene_sets, regions, progress=progress)

    def say() -> None:
        for notice in found.notices:
            typer.echo(f"note: {notice}")
        say_failed(found.failed)
        patients = len({slide.patient for slide in found.slides})
        of = f"{many(len(found.slides), 'slide')} of {many(patients, 'patient')}"
        typer.echo(f"{of}: {', '.join(map(str, paths))}")

    of_regions = {"regions": found.regions_frame().to_dicts()} if found.regions else {}
    record = {"slides": found.frame().to_dicts(), **of_regions, "failed": found.failed, "notices": found.notices}
    show({**record, "files": [str(path) for path in paths]}, as_json, say)
    exit_for(found.failed)


def _place(at: str | None) -> tuple[float, float] | None:
    if at is None:
        return None
    try:
        x, y = (float(part) for part in at.split(","))
    except ValueError as error:
        raise UsageError(f"--at takes x,y in level-0 px, not {at}") from error
    return x, y


def _say(hits: Hits) -> None:
    for notice in hits.notices:
        typer.echo(f"note: {notice}")
    rows = [{key: value for key, value in hit.record().items() if value not in (None, "")} for hit in hits]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells if rows else ():
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if hits.unit:
        typer.echo(f"values: {hits.unit}")
    typer.echo(f"{len(hits):,} found among {hits.searched:,} tiles")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return "" if value is None else str(value)
