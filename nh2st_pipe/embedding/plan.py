"""What is to be done: which encoder, what the slides of the store have in common, which of them are still to embed."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import DamageError, RecipeError, SlideError, StoreError
from nh2st_pipe.core.pool import in_order
from nh2st_pipe.embedding.options import DecodeOn, EmbedOptions
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.encoders.weights import Weights
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision, load_encoder_recipe
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.store.format import (
    Contract,
    ImageSource,
    ManifestRow,
    Resolved,
    Seen,
    SlideRecord,
    WeightsOf,
    counts_fingerprint,
    fingerprint,
    sampled_fingerprint,
    spots_fingerprint,
)
from nh2st_pipe.store.read import Store
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots

__all__ = [
    "DEFAULT_ENCODER",
    "Asked",
    "Todo",
    "Wanted",
    "auto_precision",
    "check_tiles",
    "choose_recipe",
    "decide",
    "make_contract",
    "pending",
    "recipe_of",
]

DEFAULT_ENCODER = "h-optimus-0"

_OF_SEVERAL = (".mrxs", ".vms", ".dcm")
_LOOKS_AT_ONCE = 32  # each waits for a disk, or for a request


def choose_recipe(encoder: str | Path | EncoderRecipe | None, existing: Store | None) -> EncoderRecipe:
    """Return the encoder asked for, else the store's, else the default."""
    if isinstance(encoder, EncoderRecipe):
        return encoder
    if encoder is not None or existing is None:
        return load_encoder_recipe(encoder or DEFAULT_ENCODER)
    return recipe_of(existing.contract)


def recipe_of(contract: Contract) -> EncoderRecipe:
    """Return the encoder recipe a store was made with. Raises StoreError where it is unknown here."""
    try:
        return validate(EncoderRecipe, contract.encoder, "the store's encoder")
    except RecipeError as error:
        raise StoreError(f"{error}; was the store made by a newer version?") from error


def make_contract(
    recipe: EncoderRecipe,
    weights: Weights,
    existing: Store | None,
    options: EmbedOptions,
    kind: str,
) -> Contract:
    """Say what all slides of the store have in common, from what was asked for, the store, or the recipe."""
    old = existing.contract if existing is not None else None
    grid = old.grid if old else GridOptions()
    if options.tile_um is not None or options.tile_px is not None:
        tile: dict[Any, float | None] = TileSize(options.tile_um, options.tile_px).record()
    else:
        tile = old.tile if old else TileSize(um=recipe.input_px * recipe.mpp).record()
    precision = options.precision
    if precision is None:
        precision = old.precision if old else auto_precision(recipe, kind)
    assert precision is not None
    if old is not None and old.identity["name"] == recipe.name:
        # As a store was begun: whether a recipe says so today has moved, and its numbers with it.
        recipe = recipe.model_copy(update={"autocast": bool(old.identity.get("autocast", False))})
    return Contract(
        encoder=recipe.model_dump(mode="json"),
        identity=recipe.identity(),
        weights=WeightsOf(sha256=weights.sha256, source=weights.source),
        precision=precision,
        tile=tile,
        views=options.views or (old.views if old else 1),
        grid=grid.changed(options.overlap, options.min_tissue),
    )


def auto_precision(recipe: EncoderRecipe, kind: str) -> Precision:
    """Return the arithmetic that a new store would take on a device of `kind`: cpu, cuda or mps."""
    return recipe.precision if kind == "cuda" else "float32"


@dataclass(frozen=True)
class Wanted:
    """What a slide's files are now: what decides its embeddings, and the file its counts are from."""

    row: ManifestRow
    image: ImageSource
    expression: str | None
    """Fingerprint of all of its counts."""
    sampled: str | None = None
    """Fingerprint of samples of them, as stores of earlier formats have it; None where that is the same."""
    stain_shift: bool = False
    """Whether its embeddings' shift under other stains is wanted."""
    seen: Mapping[str, Seen] = field(default_factory=dict)
    """Sizes and times of the files, where those say that a file is the same."""

    @classmethod
    def of(cls, row: SlideRow, stain_shift: bool = False, record: SlideRecord | None = None) -> Wanted:
        """Take the fingerprints of a manifest row's files, or from its `record` where a file's size and time are those
        that are kept there. Raises SlideError where one cannot be read.
        """
        old = {} if record is None else {"image": record.image.image, "tissue": record.image.tissue}
        old |= {} if record is None else {"expression": record.expression}
        found, seen, sampled = dict[str, str | None](), dict[str, Seen](), None
        of_files = ("image", row.slide, fingerprint), ("tissue", row.tissue, fingerprint)
        for name, file, take in (*of_files, ("expression", row.expression, counts_fingerprint)):
            if file is None:
                continue
            try:
                now = _seen(file)
                if now is not None:
                    seen[name] = now
                if record is not None and now is not None and record.seen.get(name) == now and old[name] is not None:
                    found[name] = old[name]
                    continue
                found[name] = take(file)
                sampled = sampled_fingerprint(file) if name == "expression" else None
            except OSError as error:
                raise SlideError(f"{file} cannot be read: {error.strerror or error}") from error
        image = ImageSource(image=found["image"] or "", tissue=found.get("tissue"), mpp=row.mpp)
        wanted = stain_shift and row.expression is not None
        entry = ManifestRow.model_validate(row.record())
        return cls(entry, image, found.get("expression"), sampled, wanted, seen)

    def has_counts_of(self, record: SlideRecord) -> bool:
        """Whether a record's counts are these, as far as it knows."""
        return record.expression == self.expression or (self.sampled is not None and record.expression == self.sampled)


def _seen(file: Path) -> Seen | None:
    """Return a file's size and time, None where those do not tell: of a folder, and of what has others beside it."""
    at = file.stat()
    return (at.st_size, at.st_mtime_ns) if stat.S_ISREG(at.st_mode) and file.suffix.lower() not in _OF_SEVERAL else None


class Todo(Enum):
    """What is to be done about a slide."""

    nothing = "nothing"
    row = "take over its row of the manifest"
    embed = "embed it, go on with it, renew its counts, or find its stain shift"


def decide(record: SlideRecord | None, wanted: Wanted, redo_changed: bool) -> Todo:
    """Say what is to be done about a slide. Raises SlideError where it is complete and its image has changed since."""
    if record is None or not record.state.complete:
        return Todo.embed  # the writer goes on with it, or begins anew where it has changed
    differs = record.image.differences(wanted.image)
    if not differs:
        if not wanted.has_counts_of(record) or (wanted.stain_shift and record.stain_shift is None):
            return Todo.embed
        return Todo.nothing if record.row == wanted.row else Todo.row
    if redo_changed:
        return Todo.embed
    raise SlideError(_changed(differs))


@dataclass(frozen=True)
class Asked:
    """What a call asks for, of every slide."""

    redo_changed: bool = False
    stain_shift: bool = False
    decode: DecodeOn = "cpu"

    @classmethod
    def of(cls, options: EmbedOptions) -> Asked:
        """Take it from the options."""
        return cls(options.redo_changed, options.stain_shift == "auto", options.decode)

    def about(self, row: SlideRow, record: SlideRecord | None) -> tuple[Todo, Wanted | None]:
        """Say what is to be done about a slide that may be finished, and why: nothing is read of one that is not."""
        if record is None or not record.state.complete:
            return Todo.embed, None
        wanted = Wanted.of(row, self.stain_shift, record)
        return decide(record, wanted, self.redo_changed), wanted


def check_tiles(
    record: SlideRecord | None, spots: Spots, resolved: Resolved, wanted: Wanted, redo_changed: bool
) -> None:
    """Raise SlideError where a slide is complete and its tiles would be others by now: other spots, or another size, as
    where the resolution that a file of counts says has changed.
    """
    if record is None or not record.state.complete or redo_changed or not record.image.same(wanted.image):
        return
    differs = [] if record.spots == spots_fingerprint(spots.barcodes, spots.xy) else ["spots"]
    differs += record.resolved.differences(resolved) if record.resolved is not None else []
    if differs:
        raise SlideError(_changed(differs))


def _changed(what: Iterable[str]) -> str:
    return (
        f"its {' and '.join(what)} changed since it was embedded; "
        "embed it anew with --redo-changed, or give the changed slide another slide_id"
    )


def pending(
    rows: list[SlideRow], existing: Store | None, asked: Asked, summary: EmbedSummary
) -> tuple[list[SlideRow], list[Wanted]]:
    """Return the slides still to embed, and those whose row alone has changed; the others go into the summary.

    A first look, without leases: it saves loading an encoder for which there is nothing to do. It takes one request a
    slide, several at a time, and reads no file of a slide that is not finished, or whose files are as they were.
    """

    def look(row: SlideRow) -> tuple[Todo, Wanted | None] | str:
        try:
            return (Todo.embed, None) if existing is None else asked.about(row, existing.record(row.slide_id))
        except (SlideError, DamageError) as error:
            return str(error)

    todo, renewed = [], []
    for row, found in zip(rows, in_order(look, rows, _LOOKS_AT_ONCE), strict=True):
        if isinstance(found, str):
            summary.failed[row.slide_id] = found
        elif found[0] is Todo.embed:
            todo.append(row)
        else:
            summary.kept.append(row.slide_id)
            if found[0] is Todo.row and found[1] is not None:
                renewed.append(found[1])
    return todo, renewed
