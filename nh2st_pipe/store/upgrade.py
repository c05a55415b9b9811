"""A store of format 1 into one of format 2, in place, encoding nothing.

Everything format 2 needs is written beside what is there; the root's attributes are replaced last, in one write. Until
then the store is one of format 1 and read as such, so the work may be cut short at any moment and begun again. What
format 1 alone uses (`state`, `obsm/neighbors`) stays where it is, and is read no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from anndata.io import read_elem

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.location import Location
from nh2st_pipe.store.files import list_files
from nh2st_pipe.store.format import FORMAT, KEY, SlideRecord, signed, spots_fingerprint
from nh2st_pipe.store.read import Store, read_root
from nh2st_pipe.store.write import SHARD_TILES, consolidate, partial_name, write_graph, write_partial, write_record

__all__ = ["upgrade"]


def upgrade(where: str | Path | Location, say: Callable[[str], None] = lambda words: None) -> list[str]:
    """Turn the store at `where` into format 2 and return the slides that were; none where it is one already.

    Raises StoreError where a slide is damaged: it has to be deleted, or embedded anew by the version that made it.
    """
    location = Location(where)
    read_root(location)  # before the claim, which would leave a folder where there is no store
    with location.claim("store"):
        store = Store(location)
        if store.format == FORMAT:
            return []
        done = []
        for slide_id in location.folders("slides"):
            record = store.record(slide_id)
            if record is None:  # begun and cut short before its first tile: nothing in it is of use
                location.delete(f"slides/{slide_id}")
                continue
            try:
                _upgrade_slide(location, slide_id, record)
            except StoreError:
                raise
            except Exception as error:
                raise StoreError(
                    f"{location}, slide {slide_id} is damaged: {' '.join(str(error).split())[:200]}; delete its folder "
                    "under slides/, then upgrade again"
                ) from error
            done.append(slide_id)
            say(f"{slide_id}: {record.state.tiles:,} tiles")
        root = zarr.open_group(location.zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)
        root.attrs[KEY] = signed(store.contract.attributes())
    return done


def _upgrade_slide(location: Location, slide_id: str, record: SlideRecord) -> None:
    path = f"slides/{slide_id}"

    def open_group(name: str) -> Any:
        return zarr.open_group(location.zarr_store(), path=name, mode="r+", zarr_format=3, use_consolidated=False)

    group, embedding = open_group(path), open_group(f"{path}/embedding")
    barcodes = [str(name) for name in read_elem(embedding["obs"]).index]
    xy = embedding["obsm/spatial"][:]
    record = record.model_copy(update={"spots": spots_fingerprint(barcodes, xy)})
    state = record.state
    if state.complete:
        neighbours = embedding["obsm/neighbors"][:]
        distances = np.linalg.norm(xy[neighbours] - xy[:, None], axis=2)
        write_graph(embedding, open_group(f"{path}/embedding/uns"), neighbours, distances)
        for name in ("embedding", "expression"):
            if name in group:
                consolidate(group, name)
        record = record.model_copy(update={"files": list_files(location, path)})
    elif state.partial:
        values = group["partial"][: state.partial]
        assert len(values) <= SHARD_TILES
        write_partial(group, partial_name(state.rows), values)
    write_record(group, record)
