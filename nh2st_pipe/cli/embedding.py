"""Stage one: embed, and what can be asked about stores and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nh2st_pipe.cli.options import (
    Device,
    Json,
    MinTissue,
    Overlap,
    Precision,
    TilePx,
    TrustRemoteCode,
    Weights,
    Workers,
    exit_for,
    say_failed,
    show,
)
from nh2st_pipe.core.errors import listed

if TYPE_CHECKING:
    from nh2st_pipe.checking.run import Checked
    from nh2st_pipe.embedding.summary import EmbedSummary
    from nh2st_pipe.encoders.check import Finding

__all__ = ["check", "embed", "encoders", "inspect", "upgrade", "verify"]


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
    store: Annotated[
        str, typer.Option(help="Zarr store to write or go on with: a folder, or a URL such as s3://bucket/store.zarr.")
    ] = "store.zarr",
    views: Annotated[
        int | None, typer.Option(help="Dihedral views kept per tile, 1 or 8; default: the store's, else 1.")
    ] = None,
    tile_um: Annotated[
        float | None, typer.Option(help="Side of a tile, µm; default: the recipe's, mostly 112.", min=0)
    ] = None,
    tile_px: TilePx = None,
    overlap: Overlap = None,
    min_tissue: MinTissue = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:1, mps, or several with commas between them; auto takes all GPUs of the machine, "
            "with a process each, or the CPU."
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Tiles encoded at once; default: what fits on a GPU, at most 256; 8 on a CPU.", min=1),
    ] = None,
    workers: Workers = None,
    readers: Annotated[
        str,
        typer.Option(
            help="processes: slides are opened and tiles read in processes of their own, which a GPU needs; threads: "
            "in threads of this one; auto: processes beside a GPU."
        ),
    ] = "auto",
    decode: Annotated[
        str,
        typer.Option(
            help="gpu: have JPEG and JPEG 2000 tiles of SVS and TIFF files decoded by nvImageCodec, for small encoders "
            "and few cores; not tried out on a GPU yet. cpu: do not."
        ),
    ] = "cpu",
    precision: Annotated[
        Precision,
        typer.Option(help="Encoder arithmetic; auto: the store's, else the recipe's on a GPU, float32 on a CPU."),
    ] = Precision.auto,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Embed slides anew whose files changed since.")
    ] = False,
    stain_shift: Annotated[
        str,
        typer.Option(
            help="auto: for slides with expression, encode 48 tiles under 8 synthetic stains too, so that heads can "
            "leave out what a stain adds; off: do not."
        ),
    ] = "auto",
    shard: Annotated[
        str | None,
        typer.Option(
            help="2/8: the second of eight parts of the manifest and nothing else; without it, processes share the "
            "slides of a store by leases."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Have torch compile the encoder: a minute or two first, then faster on a GPU."),
    ] = False,
    stage: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a local disk to copy slides to ahead of need, where theirs is slow; a few at a time."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: this machine. ray: a Ray cluster, slides as its tasks; needs nh2st-pipe[ray].")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, as host:6379 or auto; default: RAY_ADDRESS, else one made on this machine."),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(help="Actors on Ray; default: one for each GPU of the cluster, or each CPU.", min=1),
    ] = None,
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
            overlap=overlap,
            min_tissue=min_tissue,
            device=device,
            batch_size=batch_size,
            workers=workers,
            readers=readers,
            decode=decode,
            precision=None if precision is Precision.auto else precision.value,
            redo_changed=redo_changed,
            stain_shift=stain_shift,
            shard=shard,
            trust_remote_code=trust_remote_code,
            compiled=compiled,
            stage=stage,
            engine=engine,
            address=address,
            actors=actors,
            progress=progress,
        )
    show(summary.record(), as_json, lambda: _say_embed(summary))
    exit_for(summary.failed)


def check(
    slides: Annotated[Path, typer.Option(help="manifest.csv to look at.")],
    out: Annotated[Path | None, typer.Option(help="Page to write about all slides, as .html.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder they are for, by recipe: its tiles are looked at; default: 112 µm, 224 px."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A run or model (hf-hub:owner/name): can it predict these slides? Its tiles are looked at."),
    ] = None,
    tile_um: Annotated[float | None, typer.Option(help="Side of a tile, µm; default: the encoder's.", min=0)] = None,
    tile_px: TilePx = None,
    overlap: Overlap = None,
    min_tissue: MinTissue = None,
    fix: Annotated[
        Path | None,
        typer.Option(help="New folder for a manifest with what is proposed put right, and corrected .h5ad files."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at slides before the GPU is booked: can they be read, do tiles and spots lie on them, and at which scale.

    Exit status 1 where embed would pass a slide over, or something about one is unlikely.
    """
    from nh2st_pipe.checking.run import check as run
    from nh2st_pipe.core.progress import progress_for_terminal

    with progress_for_terminal() as progress:
        found = run(
            slides,
            out=out,
            encoder=encoder,
            model=model,
            tile_um=tile_um,
            tile_px=tile_px,
            overlap=overlap,
            min_tissue=min_tissue,
            fix=fix,
            progress=progress,
        )
    show(found.record(), as_json, lambda: _say_checked(found, "embed" if model is None else "predict"))
    if not found.good:
        raise typer.Exit(1)


def _say_checked(found: Checked, verb: str) -> None:
    for slide in found.slides:
        mpp = "no mpp" if slide.mpp is None else f"{slide.mpp:.4g} µm per px ({slide.mpp_source})"
        size = "" if slide.width is None else f"{slide.width:,} × {slide.height:,} px, {mpp}"
        tiles = "" if slide.tile_px is None else f", {slide.tiles:,} tiles of {slide.tile_px:.4g} px"
        typer.echo(f"{slide.slide_id}: {'good' if slide.good else 'see below'}; {size}{tiles}")
        for kind, every in ((f"{verb} passes it over", slide.faults), ("look", slide.doubts), ("note", slide.notes)):
            for words in every:
                typer.echo(f"  {kind}: {words}")
        if slide.correction is not None and slide.correction.way:
            typer.echo(f"  spots on tissue would be {slide.on_tissue[slide.correction.way]:.0%} {slide.correction.way}")
    if found.lines:
        typer.echo(
            "proposed lines of the manifest" + ("" if found.corrected else " (--fix FOLDER writes what they name)")
        )
        typer.echo("\n".join((found.header, *found.lines.values())))
    for what, path in (("corrected manifest", found.corrected), ("page", found.page)):
        if path is not None:
            typer.echo(f"{what}: {path}")


def _say_embed(summary: EmbedSummary) -> None:
    from nh2st_pipe.embedding.summary import PARTS

    seconds = summary.seconds
    for notice in summary.notices:
        typer.echo(f"note: {notice}")
    typer.echo(
        f"{summary.store}: {summary.encoded_tiles:,} tiles encoded, {len(summary.done)} slides finished, "
        f"{len(summary.kept)} were complete already, {len(summary.failed)} failed; {seconds['total']:.1f} s"
    )
    if summary.stain_shifts:
        typer.echo(f"stain shift found for {len(summary.stain_shifts)} slides (48 tiles under 8 stains each)")
    if summary.encoded_tiles:
        shares = ", ".join(f"{seconds[k] / seconds['total']:.0%} {k}" for k in PARTS)
        waits = "opening, reading, writing: the encoder waiting for it"
        typer.echo(f"{summary.tiles_per_second:.1f} tiles/s; of the time {shares} ({waits})")
        typer.echo(summary.advice())
    say_failed(summary.failed)


def inspect(store: Annotated[str, typer.Argument(help="Store to look at.")], as_json: Json = False) -> None:
    """Say what is in a store: encoder, weights, tiles, slides."""
    from nh2st_pipe.store.read import open_store

    opened = open_store(store)
    contract = opened.contract
    whole, incomplete, damaged = opened.survey()
    slides = {
        name: {
            "tiles": record.state.tiles,
            "patient": record.row.patient,
            "expression": record.expression is not None,
            "resolved": None if record.resolved is None else record.resolved.model_dump(mode="json"),
        }
        for name, record in whole.items()
    }
    values = {**contract.attributes(), "slides": slides, "incomplete": incomplete, "damaged": damaged}

    def say() -> None:
        typer.echo(opened.in_words(len(whole)))
        typer.echo(f"weights: {contract.weights.source}, SHA-256 {contract.weights.sha256}; {contract.precision}")
        if contract.imported is not None:
            assumed = f"; assumed, for its files do not tell: {listed(contract.imported.assumed)}"
            typer.echo(f"{contract.made_by()}{assumed if contract.imported.assumed else ''}")
        for name, slide in slides.items():
            what = "with expression" if slide["expression"] else "without expression"
            made = whole[name].resolved
            size = "" if made is None else f" of {made.tile_level0_px:.4g} level-0 px"
            mpp = "" if made is None or made.mpp is None else f" ({made.mpp:.4g} µm per px by the {made.mpp_source})"
            typer.echo(f"  {name}: {slide['tiles']:,} tiles{size}{mpp}, patient {slide['patient']}, {what}")
        for name in values["incomplete"]:
            typer.echo(f"  {name}: unfinished; nh2st-pipe embed goes on with it")
        for name in values["damaged"]:
            typer.echo(f"  {name}: damaged; nh2st-pipe verify says what is wrong")

    show(values, as_json, say)


def verify(
    store: Annotated[str, typer.Argument(help="Store to read back.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged slides anew from --slides, and nothing else.")
    ] = False,
    slides: Annotated[Path | None, typer.Option(help="manifest.csv of the slides; for --repair.")] = None,
    weights: Weights = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Read a whole store back and say which slides are damaged; exit status 1 where any is.

    --repair makes them anew, and finishes what is unfinished; status 1 where something is left.
    """
    from nh2st_pipe.core.errors import UsageError
    from nh2st_pipe.core.progress import progress_for_terminal
    from nh2st_pipe.embedding.repair import repair as make_anew
    from nh2st_pipe.store.verify import verify as read_back

    if repair and slides is None:
        raise UsageError("--repair needs the slides it makes anew: give their manifest with --slides")
    found = read_back(store)
    repaired: dict[str, Any] = {}
    if repair and slides is not None and (found.damaged or found.incomplete):
        with progress_for_terminal() as progress:
            done = make_anew(
                found,
                slides,
                weights=weights,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        repaired = {"repaired": done.done, "encoded_tiles": done.encoded_tiles, "failed": done.failed}

    def say() -> None:
        read = f"{found.slides} slides, {found.bytes / 1e6:,.0f} MB read back"
        typer.echo(f"{store}: {read}, {len(found.damaged)} damaged")
        for slide_id, faults in found.damaged.items():
            typer.echo(f"  {slide_id}: {listed(faults, 3)}")
        for slide_id in found.incomplete:
            typer.echo(f"  {slide_id}: unfinished; nh2st-pipe embed goes on with it")
        if repaired:
            typer.echo(f"repaired: {listed(repaired['repaired'])}; {repaired['encoded_tiles']:,} tiles encoded")
            say_failed(repaired["failed"])
        elif found.damaged:
            typer.echo(f"nh2st-pipe verify {store} --repair --slides manifest.csv makes what is damaged anew")

    show({**found.record(), **repaired}, as_json, say)
    wanted = {*found.damaged, *(found.incomplete if repair else ())}
    left = wanted - {*repaired.get("repaired", ())}
    if left:
        raise typer.Exit(1)


def upgrade(store: Annotated[str, typer.Argument(help="Store made by an earlier version.")]) -> None:
    """Turn a store of an earlier format into the present one, in place; nothing is encoded."""
    from nh2st_pipe.store.upgrade import upgrade as run

    done = run(store, lambda words: typer.echo(f"  {words}"))
    typer.echo(f"{store}: {len(done)} slides upgraded" if done else f"{store} has the present format already")


_NEEDS = {
    "transformers": "transformers",
    "remote": "own code",
    "package": "own package",
    "python": "your own",
}  # by kind of recipe


def _say_findings(found: list[Finding]) -> None:
    for each in found:
        typer.echo(f"{each.what}: {'' if each.good else 'FAULT: '}{each.words}")


def encoders(
    name: Annotated[str | None, typer.Argument(help="Recipe to show whole, by name or YAML file.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say whether it can be had here and is what its recipe says; status 1 if not."),
    ] = False,
    weights: Weights = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """List the encoder recipes, show one, or check one before a job waits for it."""
    from nh2st_pipe.core.errors import UsageError
    from nh2st_pipe.recipes.encoder import encoder_names, load_encoder_recipe

    if (check or weights) and not (check and name):
        raise UsageError("--check looks at one encoder: nh2st-pipe encoders NAME --check [--weights FILE]")
    if check and name:
        from nh2st_pipe.encoders.check import check_encoder

        found = check_encoder(load_encoder_recipe(name), weights, trust_remote_code)
        show({"findings": [vars(each) for each in found]}, as_json, lambda: _say_findings(found))
        if not all(each.good for each in found):
            raise typer.Exit(1)
        return
    recipes = [load_encoder_recipe(each) for each in ([name] if name else encoder_names())]
    values = {recipe.name: recipe.model_dump(mode="json") for recipe in recipes}

    def say() -> None:
        if name:
            for key, value in values[recipes[0].name].items():
                typer.echo(f"{key}: {value}")
            return
        for recipe in recipes:
            gate = "gated" if recipe.gated else "open" if recipe.repo or recipe.kind == "fake" else "own download"
            needs = _NEEDS.get(recipe.kind, "")
            size = "" if recipe.parameters is None else f"{recipe.parameters:,.0f} M"
            tile = f"{recipe.input_px} px at {recipe.mpp:g} µm/px"
            use = {True: "", False: ", not commercial", None: ", look up its terms"}[recipe.commercial]
            what = f"{recipe.name:20} {size:>8} {recipe.dim:>6} values"
            typer.echo(f"{what}  {tile:20}  {gate:12}  {needs:12}  {recipe.licence}{use}")

    show(values, as_json, say)
