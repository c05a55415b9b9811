"""Stage one: every tile of every slide through a frozen encoder, once, into the store.

What is to be done is decided here, and done by `work`. A slide that cannot be read is named and passed over. Whatever
is interrupted goes on where it was, and a finished slide is never touched again.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import nh2st_pipe
from nh2st_pipe.core.errors import EncoderError, UsageError, listed
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import signals_as_flag
from nh2st_pipe.embedding.executors import EngineName
from nh2st_pipe.embedding.executors import engine as engine_of
from nh2st_pipe.embedding.plan import Todo, auto_precision, choose_recipe, decide, make_contract, pending
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.work import ReadersKind, Work
from nh2st_pipe.encoders.weights import Weights, find_weights, known_weights
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision
from nh2st_pipe.slides.resolution import check_tile_options
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.read import check_contract, open_store
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.tiles.options import GridOptions

__all__ = ["embed"]

_LARGE_MILLIONS = 200


def embed(
    slides: str | Path,
    *,
    encoder: str | Path | EncoderRecipe | None = None,
    weights: str | Path | None = None,
    store: str | Path | Location = "store.zarr",
    views: int | None = None,
    tile_um: float | None = None,
    tile_px: float | None = None,
    overlap: float | None = None,
    min_tissue: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    readers: ReadersKind = "auto",
    precision: Precision | None = None,
    redo_changed: bool = False,
    stain_shift: Literal["auto", "off"] = "auto",
    only: Collection[str] | None = None,
    trust_remote_code: bool = False,
    compiled: bool = False,
    stage: str | Path | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    actors: int | None = None,
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed the slides of the manifest `slides` into `store`.

    `encoder` is a recipe, its name or its YAML file; `weights` a file that takes the place of the hub's. `views` is 1
    or 8. `device` "auto" takes every GPU of the machine, or the CPU; several are named with commas between them, and
    have a process each. The tile's side is `tile_um` (µm) or `tile_px` (level-0 px). Slides without spots have a grid
    of tiles, each of which shows `overlap` of the one before; those are kept of which `min_tissue` is tissue. What is
    left None is as in the store where there is one, else the recipe's default (1 view). `precision` None is the
    store's, else the recipe's on a GPU and float32 on a CPU; `workers` None 2 threads beside a CPU's encoder, else one
    for each core but one. `readers` "processes" open slides and read tiles in processes, of which a GPU needs many,
    "threads" in threads of this one; "auto" is processes beside a GPU. `redo_changed` embeds slides anew whose files
    have changed; `only` leaves other slides out. `stain_shift` "auto" finds how far embeddings move under other stains,
    for slides with expression that lack it: heads are trained on those. It encodes 48 tiles a slide under 8 stains, and
    nothing that is there already. `trust_remote_code` allows an encoder's repository to run the code it brings along;
    `compiled` has torch compile the encoder. `stage` is a folder on a local disk to which slides are copied ahead of
    need, a few at a time, and deleted from when they have been read. `engine` "ray" does the work on a Ray cluster, at
    `address` (None: RAY_ADDRESS, or one made on this machine), with an actor for each GPU, or each CPU where there is
    none, or so many `actors`; the store is then in a shared folder or an object store.

    Raises ManifestError, UsageError, EncoderError and StoreError before any work; faults of single slides are
    in the summary.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    check_tile_options(tile_um, tile_px)
    GridOptions().changed(overlap, min_tissue)
    if views not in (None, 1, 8):
        raise UsageError(f"--views takes 1 or 8, not {views}")
    if readers not in ("auto", "threads", "processes"):
        raise UsageError(f"--readers takes auto, threads or processes, not {readers}")
    if stain_shift not in ("auto", "off"):
        raise UsageError(f"--stain-shift takes auto or off, not {stain_shift}")
    rows = read_manifest(slides)
    if only is not None:
        absent = sorted(set(only) - {row.slide_id for row in rows})
        if absent:
            raise UsageError(f"{slides} has no slide {listed(absent)}")
        rows = [row for row in rows if row.slide_id in only]
    with ExitStack() as ending:
        where = ending.enter_context(engine_of(engine, device, address, actors))
        location = Location(store)
        existing = None if location.is_empty() else open_store(location)
        recipe = choose_recipe(encoder, existing)
        given = None if weights is None else Path(weights)

        def contract_of(found: Weights) -> Contract:
            contract = make_contract(
                recipe, found, existing, views, tile_um, tile_px, precision, where.kind, overlap, min_tissue
            )
            if existing is not None:
                check_contract(existing, contract)
            return contract

        summary = EmbedSummary(store=str(location))
        if existing is None:
            _warn_of_time(recipe, where.kind, summary, progress)
        known = known_weights(recipe, given, existing.contract if existing is not None else None)
        found = known or find_weights(recipe, given, trust_remote_code)
        contract = contract_of(found)

        todo, renewed = pending(rows, existing, redo_changed, stain_shift == "auto", summary)
        if todo and existing is not None:
            _warn_of_time(recipe, where.kind, summary, progress)
            here = auto_precision(recipe, where.kind)
            if precision is None and contract.precision != here:
                summary.notices.append(
                    f"the store was begun in {contract.precision} and stays so, for slides of two precisions must not "
                    f"mix; a new store would take {here} here"
                )
        if todo and known is not None:  # what was known is not enough to encode with
            try:
                found = find_weights(recipe, None, trust_remote_code)
            except EncoderError as error:
                raise EncoderError(
                    f"{error} (the store was made with {known.source}, SHA-256 {known.sha256})"
                ) from error
            contract = contract_of(found)
        work: Work | None = None
        if todo:
            work = Work(
                store=str(location if location.path is None else location.path.absolute()),
                contract=contract,
                weights=found.path,
                batch_size=batch_size,
                workers=workers,
                readers=readers,
                redo_changed=redo_changed,
                trust_remote_code=trust_remote_code,
                compiled=compiled,
                stage=None if stage is None else Path(stage).expanduser().absolute(),
            )
        # Loaded before the store is made, so that weights that do not fit leave nothing behind.
        executor = ending.enter_context(where.executor(work, len(todo))) if work is not None else None
        stop = ending.enter_context(signals_as_flag())
        ending.enter_context(_saying_what_is_kept(summary))
        writer = StoreWriter(location, contract)
        for wanted in renewed:
            stop.check()
            with writer.lease(wanted.row.slide_id):
                record, tag = writer.record_tagged(wanted.row.slide_id)
                if record is not None and decide(record, wanted, redo_changed) is Todo.row:
                    writer.renew_row(record, tag, wanted.row)
        if executor is not None:
            try:
                executor.do(todo, summary, stop, progress)
            finally:
                summary.seconds["total"] = time.perf_counter() - began
                _log(location, recipe, summary)
    summary.seconds["total"] = time.perf_counter() - began
    return summary


def _log(location: Location, recipe: EncoderRecipe, summary: EmbedSummary) -> None:
    """Add a line about this call to the store's log.jsonl, where the store is a folder."""
    if location.path is None:
        return
    values = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "event": "embed",
        "version": nh2st_pipe.__version__,
        "encoder": recipe.name,
        **summary.settings,
        "tiles": summary.encoded_tiles,
        "slides": summary.done,
        "failed": summary.failed,
        "tiles_per_second": summary.tiles_per_second,
        "busy": {name: [round(each, 3) for each in shares] for name, shares in summary.busy.items()},
        "seconds": {part: round(value, 3) for part, value in summary.seconds.items()},
    }
    with suppress(OSError), (location.path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


@contextmanager
def _saying_what_is_kept(summary: EmbedSummary) -> Iterator[None]:
    """Add to whatever ends the run what it leaves for the next one."""
    try:
        yield
    except BaseException as error:
        if summary.encoded_tiles:
            error.add_note(f"what was encoded until then is kept in {summary.store}; the same command goes on with it")
        raise


def _warn_of_time(recipe: EncoderRecipe, kind: str, summary: EmbedSummary, progress: Progress) -> None:
    """Say, before its weights are fetched, that a large encoder on a CPU takes long: the default one does."""
    millions = recipe.parameters or 0.0
    if millions >= _LARGE_MILLIONS and kind == "cpu":
        words = (
            f"encoder {recipe.name} has {millions:,.0f} million parameters, and there is no GPU: a tile takes seconds. "
            "nh2st-pipe encoders lists smaller ones"
        )
        summary.notices.append(words)
        progress.say(words)
