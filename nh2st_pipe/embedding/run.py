"""Stage one: every tile of every slide through a frozen encoder, once, into the store.

What is to be done is decided here, and done by `work`. A slide that cannot be read is named and passed over. Whatever
is interrupted goes on where it was, and a finished slide is never touched again.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import nh2st_pipe
from nh2st_pipe.core.errors import EncoderError, UsageError, listed
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import signals_as_flag
from nh2st_pipe.embedding.executors import engine as engine_of
from nh2st_pipe.embedding.options import EmbedOptions
from nh2st_pipe.embedding.plan import Asked, Todo, auto_precision, choose_recipe, decide, make_contract, pending
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.work import Work
from nh2st_pipe.encoders.weights import Weights, find_weights, known_weights
from nh2st_pipe.recipes.encoder import EncoderRecipe
from nh2st_pipe.slides.nvidia import check_decoder
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.read import check_contract, open_store
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest

__all__ = ["embed"]

_LARGE_MILLIONS = 200


def embed(
    slides: str | Path, options: EmbedOptions | None = None, *, progress: Progress | None = None, **changes: Any
) -> EmbedSummary:
    """Embed the slides of the manifest `slides` into a store.

    What is asked for is in `options`, or given by name: `embed("manifest.csv", encoder="uni2-h", store="s.zarr")`.
    `EmbedOptions` has the names and what they mean.

    Raises ManifestError, UsageError, EncoderError and StoreError before any work; faults of single slides are
    in the summary.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    options = EmbedOptions.of(options, **changes)
    if options.decode == "gpu" and options.engine == "local":
        check_decoder()
    rows = _rows(slides, options)
    with ExitStack() as ending:
        where = ending.enter_context(engine_of(options.engine, options.device, options.address, options.actors))
        location = Location(options.store)
        existing = None if location.is_empty() else open_store(location)
        recipe = choose_recipe(options.encoder, existing)
        given = None if options.weights is None else Path(options.weights)

        def contract_of(found: Weights) -> Contract:
            contract = make_contract(recipe, found, existing, options, where.kind)
            if existing is not None:
                check_contract(existing, contract)
            return contract

        summary = EmbedSummary(store=str(location))
        if existing is None:
            _warn_of_time(recipe, where.kind, summary, progress)
        known = known_weights(recipe, given, existing.contract if existing is not None else None)
        found = known or find_weights(recipe, given, options.trust_remote_code)
        contract = contract_of(found)

        todo, renewed = pending(rows, existing, Asked.of(options), summary)
        if todo and existing is not None:
            _warn_of_time(recipe, where.kind, summary, progress)
            here = auto_precision(recipe, where.kind)
            if options.precision is None and contract.precision != here:
                summary.notices.append(
                    f"the store was begun in {contract.precision} and stays so, for slides of two precisions must not "
                    f"mix; a new store would take {here} here"
                )
        if todo and known is not None:  # what was known is not enough to encode with
            try:
                found = find_weights(recipe, None, options.trust_remote_code)
            except EncoderError as error:
                raise EncoderError(
                    f"{error} (the store was made with {known.source}, SHA-256 {known.sha256})"
                ) from error
            contract = contract_of(found)
        # Loaded before the store is made, so that weights that do not fit leave nothing behind.
        work = Work.of(options, location, contract, found.path)
        executor = ending.enter_context(where.executor(work, len(todo))) if todo else None
        stop = ending.enter_context(signals_as_flag())
        ending.enter_context(_saying_what_is_kept(summary))
        writer = StoreWriter(location, contract)
        for wanted in renewed:
            stop.check()
            with writer.lease(wanted.row.slide_id):
                record, tag = writer.record_tagged(wanted.row.slide_id)
                if record is not None and decide(record, wanted, options.redo_changed) is Todo.row:
                    writer.renew_row(record, tag, wanted.row)
        if executor is not None:
            try:
                executor.do(todo, summary, stop, progress)
            finally:
                summary.seconds["total"] = time.perf_counter() - began
                _log(location, recipe, summary)
    summary.seconds["total"] = time.perf_counter() - began
    return summary


def _rows(slides: str | Path, options: EmbedOptions) -> list[SlideRow]:
    """Return the rows of the manifest that are asked for. Raises UsageError where one is not in it."""
    rows = read_manifest(slides)
    if options.only is not None:
        absent = sorted(set(options.only) - {row.slide_id for row in rows})
        if absent:
            raise UsageError(f"{slides} has no slide {listed(absent)}")
        rows = [row for row in rows if row.slide_id in options.only]
    part, parts = options.part
    return rows[part - 1 :: parts]


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
