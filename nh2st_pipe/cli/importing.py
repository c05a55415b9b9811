"""Commands that bring in what other tools made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nh2st_pipe.cli.options import Json, Precision, exit_for, say_failed, show

if TYPE_CHECKING:
    from nh2st_pipe.importing.run import ImportSummary
    from nh2st_pipe.recipes.encoder import Precision as Arithmetic

__all__ = ["import_features"]


def import_features(
    folder: Annotated[Path, typer.Argument(help="Folder with the features.")],
    slides: Annotated[Path, typer.Option(help="manifest.csv: the slides they are of, with expression where known.")],
    store: Annotated[str, typer.Option(help="Store to write, or to go on with.")] = "store.zarr",
    layout: Annotated[
        str,
        typer.Option(
            "--from",
            help="Tool that wrote them: trident, clam, hest, lazyslide, slide2vec, stamp, tiatoolbox, atlaspatch, "
            "gigapath, histoencoder; auto looks.",
        ),
    ] = "auto",
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder, by a name of nh2st-pipe encoders or the tool's own: where there are several, or "
            "no file says it."
        ),
    ] = None,
    coords: Annotated[
        Path | None, typer.Option(help="Folder of the files with coordinates, where that is another (CLAM's patches).")
    ] = None,
    tile_um: Annotated[float | None, typer.Option(help="Side of a tile, µm, where no file says it.", min=0)] = None,
    tile_px: Annotated[
        float | None, typer.Option(help="Side of a tile, level-0 px, where no file says it.", min=0)
    ] = None,
    mpp_read: Annotated[
        float | None, typer.Option(help="µm per px at which tiles were read, where coordinates are in such px.", min=0)
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic of the encoder; auto: what the tool does where nobody asks.")
    ] = Precision.auto,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Write slides anew whose image or features changed since.")
    ] = False,
    trust_places: Annotated[
        bool,
        typer.Option("--trust-places", help="Take tiles as they lie, though they would cover more tissue otherwise."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring features that another tool made into a store, in place of embed.

    Slides are known by their slide_id or by their image's name. Tiles have to lie on the slide's tissue as they are;
    where the manifest has expression each spot gets the tile around it. What the files do not tell is asked.
    """
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.importing.run import import_features as run

    with progress_for_terminal() as progress:
        summary = run(
            folder,
            slides,
            store,
            layout=layout,
            encoder=encoder,
            coords=coords,
            tile_um=tile_um,
            tile_px=tile_px,
            mpp_read=mpp_read,
            precision=None if precision is Precision.auto else cast("Arithmetic", precision.value),
            redo_changed=redo_changed,
            trust_places=trust_places,
            progress=progress,
        )
    show(summary.record(), as_json, lambda: _say_imported(summary))
    exit_for(summary.failed)


def _say_imported(summary: ImportSummary) -> None:
    for notice in summary.notices:
        typer.echo(f"note: {notice}")
    typer.echo(
        f"{summary.store}: {summary.tiles:,} tiles of {len(summary.done)} slides from {summary.tool} "
        f"({summary.encoder or 'no encoder'}), {len(summary.kept)} were there already, {len(summary.failed)} failed"
    )
    say_failed(summary.failed)
