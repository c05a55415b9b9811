"""What is damaged in a store, made anew from the slides, and nothing else."""

from __future__ import annotations

from pathlib import Path

from nh2st_pipe.core.errors import DamageError, StoreError, UsageError, listed
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.embedding.plan import Wanted, recipe_of
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.store.format import FORMAT, Contract
from nh2st_pipe.store.read import Store, open_store
from nh2st_pipe.store.verify import Verified, encoded_anew, set_aside
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest

__all__ = ["repair"]


def repair(
    found: Verified,
    slides: str | Path,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed anew, from the manifest `slides`, what `verify` found damaged; where only counts are, renew those. What was
    begun and not finished, as by a repair that was killed, is finished too.

    Nothing is set aside that could not be made anew. Raises, before anything is touched, UsageError where the manifest
    lacks a damaged slide or its image is another by now, StoreError where the store is of an earlier format or of other
    weights, SlideError and EncoderError where a slide's files or the weights cannot be had.
    """
    rows = {row.slide_id: row for row in read_manifest(slides)}
    absent = sorted(set(found.damaged) - rows.keys())
    if absent:
        raise UsageError(f"{slides} has no slide {listed(absent)}, which is damaged; nothing was changed")
    store = open_store(found.store)
    if found.damaged and store.format != FORMAT:
        raise StoreError(
            f"{found.store} has format {store.format}, in which no slide can be made anew; delete the folders of "
            f"{listed(found.damaged)} in it, nh2st-pipe upgrade it, and embed them again. Nothing was changed"
        )
    if store.contract.imported is not None:
        folders = listed([*found.damaged, *found.incomplete])
        raise StoreError(
            f"{found.store} holds {store.contract.made_by()}, which cannot be made anew from slides: delete the "
            f"folders of {folders} in it, and import them again. Nothing was changed"
        )
    for slide_id in found.damaged:
        _check_image(store, rows[slide_id])
    if any(encoded_anew(faults) for faults in found.damaged.values()):
        _check_weights(store.contract, weights, trust_remote_code)
    set_aside(found.store, found)
    return embed(
        slides,
        store=found.store,
        weights=weights,
        device=device,
        only=[*found.damaged, *(slide_id for slide_id in found.incomplete if slide_id in rows)],
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def _check_image(store: Store, row: SlideRow) -> None:
    """Raise where a slide's files cannot be read, or its image is not the one that was embedded."""
    wanted = Wanted.of(row)
    try:
        record = store.record(row.slide_id)
    except DamageError:
        return  # nothing says what it was
    differs = [] if record is None else record.image.differences(wanted.image)
    if differs:
        raise UsageError(
            f"the {' and '.join(differs)} of slide {row.slide_id} changed since it was embedded, so that it cannot be "
            "made anew as it was; give the file it was made of, or embed it with --redo-changed. Nothing was changed"
        )


def _check_weights(contract: Contract, weights: str | Path | None, trust_remote_code: bool) -> None:
    """Raise where the weights that the store was made with cannot be had."""
    found = find_weights(recipe_of(contract), None if weights is None else Path(weights), trust_remote_code)
    if found.sha256 != contract.weights.sha256:
        raise StoreError(
            f"the store was made with weights of {contract.weights.source} (SHA-256 {contract.weights.sha256[:12]}…), "
            f"and {found.source} is another file ({found.sha256[:12]}…). Nothing was changed"
        )
