"""Reading a whole store back: what is damaged, slide by slide, and the way to have it right again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import DamageError
from nh2st_pipe.core.lease import lease_on
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.pool import in_order
from nh2st_pipe.store.files import faults_of
from nh2st_pipe.store.read import Store, open_store
from nh2st_pipe.store.write import RecordFile

__all__ = ["Verified", "encoded_anew", "set_aside", "verify"]

_AT_ONCE = 8  # slides, whose files are read one after another

_PARTS = {"expression/": "expression", "stain_shift/": "stain_shift"}
"""What of a slide can be made anew alone: where it lies, and the record's field that says it is there."""


@dataclass
class Verified:
    """What was found."""

    store: str
    slides: int = 0
    """Complete slides that were read back."""
    bytes: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)
    """slide_id → what is wrong with it."""
    incomplete: list[str] = field(default_factory=list)
    """Begun and not finished: not damaged, and gone on with by embed."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(vars(self))


def verify(where: str | Path | Location, say: Callable[[str], None] = lambda words: None) -> Verified:
    """Read every byte of the store's slides and hold it against what was written.

    Stores of format 1 have no list of files; their slides are read as stage two reads them. Raises StoreError where the
    store as a whole cannot be read.
    """
    store = open_store(where)
    found = Verified(str(store.location), incomplete=store.incomplete())

    def read(slide_id: str) -> tuple[str, list[str], int]:
        faults = _faults(store, slide_id)
        return slide_id, faults, sum(store.location.files(f"slides/{slide_id}").values())

    for slide_id, faults, size in in_order(read, [*store.slides(), *store.damaged()], _AT_ONCE):
        found.slides += 1
        if faults:
            found.damaged[slide_id] = faults
        found.bytes += size
        say(slide_id)
    return found


def _faults(store: Store, slide_id: str) -> list[str]:
    try:
        record = store.record(slide_id)
        if record is None:
            return ["its zarr.json is missing"]
        if record.files:
            return faults_of(store.location, f"slides/{slide_id}", record.files, deep=True)
        store.read(slide_id)
        if store.contract.views > 1:
            store.read(slide_id, first_view_only=True)
    except DamageError as error:
        return [error.what]
    return []


def encoded_anew(faults: list[str]) -> bool:
    """Whether a slide with these faults has to be encoded anew, as it has but where counts alone are at fault."""
    return not all(fault.startswith("expression/") for fault in faults)


def set_aside(where: str | Path | Location, found: Verified) -> None:
    """Make the damaged slides unfinished ones, so that the next embed makes them anew, and nothing else.

    Where nothing but the counts or the stain shift is damaged, the embeddings are kept.
    """
    store = open_store(where)
    for slide_id, faults in found.damaged.items():
        path = f"slides/{slide_id}"
        with lease_on(store.location, f"slide-{slide_id}"):
            try:
                record, tag = store.record_tagged(slide_id)
            except DamageError:
                record = tag = None
            if record is None or store.format == 1:
                store.location.delete(path)
                continue
            parts = {part for part in _PARTS if any(fault.startswith(part) for fault in faults)}
            kept = all(fault.startswith(tuple(_PARTS)) for fault in faults)
            anew = dict.fromkeys((_PARTS[part] for part in parts), None)
            record = record.model_copy(update={"files": {}, **anew})
            RecordFile(store.location, slide_id, tag).write(record.with_state(complete=False, ready=kept))
