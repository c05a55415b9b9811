"""A store of an earlier format into one of format 3, in place, encoding nothing.

Slide by slide, what format 3 needs is written beside what is there; then the record, from which on the slide is one of
format 3; then what it has no use for is deleted, and the record gets its list of files. The root says which format the
store has, and is replaced last. Whatever strikes before, the store is read, each slide as its record says, and the work
is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from anndata.io import read_elem

from nh2st_pipe.core.errors import NH2STError, ResourceError, StoreError, for_want_of, reason_of
from nh2st_pipe.core.lease import lease_on
from nh2st_pipe.core.location import Location
from nh2st_pipe.store import legacy
from nh2st_pipe.store.files import SlideFiles, faults_of, list_files
from nh2st_pipe.store.format import FORMAT, KEY, THUMBNAIL, Contract, SlideRecord, signed, spots_fingerprint
from nh2st_pipe.store.graph import CONNECTIVITIES
from nh2st_pipe.store.read import Store, read_root
from nh2st_pipe.store.write import RecordFile, as_png, graph_files, partial_name, write_partial

__all__ = ["upgrade"]


def upgrade(where: str | Path | Location, say: Callable[[str], None] = lambda words: None) -> list[str]:
    """Turn the store at `where` into format 3 and return the slides that were; none where it is one already.

    Raises StoreError where a slide is damaged: it has to be deleted, or embedded anew by the version that made it.
    """
    location = Location(where)
    read_root(location)  # before the lease, which would leave a folder where there is no store
    with lease_on(location, "store"):
        store = Store(location)
        if store.format == FORMAT:
            return []
        done = []
        for slide_id in location.folders("slides"):
            record, tag = store.record_tagged(slide_id)
            if record is None or not record.state.ready:  # cut short before its first tile: nothing in it is of use
                location.delete(f"slides/{slide_id}")
                continue
            try:
                _upgrade_slide(location, RecordFile(location, slide_id, tag), record, store.contract)
            except NH2STError:
                raise
            except Exception as error:
                lacking = for_want_of(error)
                if lacking is not None:
                    raise ResourceError(
                        f"{location}, slide {slide_id} could not be upgraded for want of resources: {lacking}. That "
                        "says nothing of the slide; the same command goes on"
                    ) from error
                raise StoreError(
                    f"{location}, slide {slide_id} is damaged: {reason_of(error)}; delete its folder "
                    "under slides/, then upgrade again"
                ) from error
            done.append(slide_id)
            say(f"{slide_id}: {record.state.tiles:,} tiles")
        root = zarr.open_group(location.zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)
        root.attrs[KEY] = signed(store.contract.attributes())
    return done


_CHANGE = ("embedding/zarr.json", "embedding/uns/", "embedding/var/", f"embedding/obsp/{CONNECTIVITIES}/")
_LISTS = "embedding/zarr.json"  # listed by a slide that is of format 3 altogether
_OF_NO_USE = (
    "partial",
    "embedding/uns",
    "embedding/var",
    "embedding/obsm/neighbors",
    "embedding/obsm/neighbor_distances",
    f"embedding/obsp/{CONNECTIVITIES}",
)


def _upgrade_slide(location: Location, kept: RecordFile, record: SlideRecord, contract: Contract) -> None:
    path = f"slides/{kept.slide_id}"
    faults = faults_of(location, path, record.files, deep=False)
    if faults:
        raise ValueError(faults[0])

    def open_group(name: str) -> Any:
        return zarr.open_group(location.zarr_store(), path=name, mode="r+", zarr_format=3, use_consolidated=False)

    group = open_group(path)
    if record.resolved is None:
        record = _beside(location, group, open_group(f"{path}/embedding"), record, contract)
        kept.write(record)
    if _LISTS in record.files:
        return
    for name in _OF_NO_USE:
        location.delete(f"{path}/{name}")
    if record.state.complete:
        groups = [name for name in ("embedding", "expression") if f"{name}/zarr.json" not in record.files]
        SlideFiles(location, path).consolidate(groups)
        kept.write(record.model_copy(update={"files": list_files(location, path, record.files)}))


def _beside(location: Location, group: Any, embedding: Any, record: SlideRecord, contract: Contract) -> SlideRecord:
    """Write beside what is there what format 3 has in its place, and return the record of that."""
    state = record.state
    xy = embedding["obsm/spatial"][:]
    resolved, picture, thumbnail = legacy.resolved_of(read_elem(embedding["uns"]), contract)
    if not record.spots:
        barcodes = [str(name) for name in read_elem(embedding["obs"]).index]
        record = record.model_copy(update={"spots": spots_fingerprint(barcodes, xy)})
    if not state.complete:
        if state.partial and "partial" in group:  # format 1; what was begun of the other is written over
            shard = (embedding["X"].shards or embedding["X"].chunks)[0]
            write_partial(group, partial_name(state.rows), group["partial"][: state.partial], shard)
        return record.model_copy(update={"resolved": resolved})
    if not record.files:  # format 1
        neighbours = embedding["obsm/neighbors"][:]
        distances = np.linalg.norm(xy[neighbours] - xy[:, None], axis=2)
        SlideFiles(location, group.path).lay(graph_files(neighbours, distances))
    if thumbnail is not None:
        location.write(f"{group.path}/{THUMBNAIL}", as_png(thumbnail))
    old = {name: value for name, value in record.files.items() if not name.startswith(_CHANGE)}
    return record.model_copy(update={"resolved": resolved, "picture": picture, "files": old})
