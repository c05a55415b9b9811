"""Writing a store: `StoreWriter` under a lock, one `SlideWriter` per slide.

A slide counts as present only when its completion mark is written, last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.store.format import KEY, Contract, SlideState
from nh2st_pipe.store.read import Store, check_contract, open_root
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.spots import Spots

__all__ = ["SlideWriter", "StoreWriter"]

_CHUNK_TILES, _SHARD_TILES = 32, 256
_CHECKPOINT_SECONDS = 10.0
_VALUES_PER_CHUNK = 1 << 20


class StoreWriter(Store):
    """A store open for writing, locked against a second writer until it is closed."""

    def __init__(self, path: Path, contract: Contract) -> None:
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; --store takes the folder of a Zarr store")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            if not any(path.iterdir()):
                zarr.create_group(path, attributes={KEY: {**contract.attributes(), "manifest": {}}})
            super().__init__(path, open_root(path, "r+"))
            check_contract(self, contract)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def record(self, rows: list[SlideRow]) -> None:
        """Write rows of the manifest to the root, beside those already there."""
        merged = {**self.manifest, **{row.slide_id: row.record() for row in rows}}
        if merged != self.manifest:
            self.manifest = merged
            self._root.attrs[KEY] = {**self.contract.attributes(), "manifest": merged}

    def slide(self, slide_id: str, spots: Spots, source: dict[str, Any], uns: dict[str, Any]) -> SlideWriter:
        """Return the writer of one slide: where it was left if it was begun from the same `source`, else new."""
        state = self.state(slide_id)
        group = self._root.get(f"slides/{slide_id}")
        if state is not None and not state.complete and state.source == source and state.tiles == len(spots):
            assert isinstance(group, zarr.Group)
            return SlideWriter(group, self.contract, state)
        if group is not None:
            del self._root[f"slides/{slide_id}"]
        group = self._root.require_group(f"slides/{slide_id}")
        state = SlideState(complete=False, rows=0, partial=0, tiles=len(spots), source=source)
        _write_skeleton(group, self.contract, spots, uns)
        return SlideWriter(group, self.contract, state)


class SlideWriter:
    """Writes the embeddings of one slide, in order, whole shards at a time.

    What does not yet fill a shard is kept in the array `partial`, renewed every ten seconds, so that a killed
    run loses ten seconds of work and every shard is written once.
    """

    def __init__(self, group: zarr.Group, contract: Contract, state: SlideState) -> None:
        self._group = group
        self._state = state
        self._views = contract.views
        embedding: Any = group["embedding"]
        self._x = embedding["X"]
        self._all_views = embedding["obsm/views"] if contract.views > 1 else None
        self._embedding = embedding
        self._pending: list[NDArray[np.float16]] = []
        if state.partial:
            partial: Any = group["partial"]
            self._pending.append(partial[: state.partial])
        self._saved = time.monotonic()
        if state.rows == 0 and not state.partial:
            self._mark(state)

    @property
    def rows(self) -> int:
        """Tiles that need not be encoded again."""
        return self._state.rows + sum(map(len, self._pending))

    def append(self, embeddings: NDArray[np.float16]) -> None:
        """Take the embeddings (b × V × d) of the next b tiles."""
        self._pending.append(embeddings)
        waiting = sum(map(len, self._pending))
        last = self._state.rows + waiting == self._state.tiles
        if waiting >= _SHARD_TILES or last:
            block = np.concatenate(self._pending)
            whole = waiting if last else waiting - waiting % _SHARD_TILES
            start, stop = self._state.rows, self._state.rows + whole
            self._x[start:stop] = block[:whole, 0]
            if self._all_views is not None:
                self._all_views[start:stop] = block[:whole]
            self._pending = [block[whole:]] if whole < waiting else []
            self._mark(SlideState(False, stop, 0, self._state.tiles, self._state.source))
        elif time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make what has been appended safe."""
        waiting = sum(map(len, self._pending))
        if waiting == self._state.partial:
            return
        block = np.concatenate(self._pending)
        if "partial" not in self._group:
            shape = (_SHARD_TILES, *block.shape[1:])
            self._group.create_array(
                "partial",
                shape=shape,
                chunks=shape,
                dtype="float16",
                compressors=[ZstdCodec(level=1), Crc32cCodec()],
            )
        partial: Any = self._group["partial"]
        padded = np.zeros(partial.shape, np.float16)
        padded[:waiting] = block
        partial[:] = padded
        self._mark(SlideState(False, self._state.rows, waiting, self._state.tiles, self._state.source))

    def finish(self, neighbours: NDArray[np.int32], distances: NDArray[np.float32], thumbnail: dict[str, Any]) -> None:
        """Write what needs the whole slide, and the completion mark, last."""
        if self._state.rows != self._state.tiles:
            raise StoreError(f"{self._group.path}: {self._state.rows} of {self._state.tiles} tiles are written")
        with _anndata_settings():
            write_elem(self._embedding["obsm"], "neighbors", neighbours)
            write_elem(self._embedding["obsm"], "neighbor_distances", distances)
            write_elem(self._embedding["uns"], "spatial", thumbnail)
        if "partial" in self._group:
            del self._group["partial"]
        for name in ("embedding", "expression"):
            if name in self._group:
                _consolidate(self._group, name)
        self._mark(SlideState(True, self._state.rows, 0, self._state.tiles, self._state.source))

    def _mark(self, state: SlideState) -> None:
        self._group.attrs["state"] = dict(vars(state))
        self._state = state
        self._saved = time.monotonic()


def _write_skeleton(group: zarr.Group, contract: Contract, spots: Spots, uns: dict[str, Any]) -> None:
    """Write everything of a slide that is known before its tiles are encoded."""
    n, d = len(spots), contract.dim
    obs = pd.DataFrame(index=pd.Index(spots.barcodes, name="barcode", dtype=object))
    for name, values in (("array_row", spots.array_row), ("array_col", spots.array_col)):
        if values is not None:
            obs[name] = values
    obs["in_tissue"] = np.ones(n, dtype=bool)
    embedding = group.create_group("embedding")
    embedding.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    with _anndata_settings():
        write_elem(embedding, "obs", obs)
        write_elem(embedding, "var", pd.DataFrame(index=pd.Index([f"e{i}" for i in range(d)], dtype=object)))
        write_elem(embedding, "obsm", {"spatial": spots.xy})
        write_elem(embedding, "uns", uns)
    _embedding_array(embedding, "X", (n, d))
    if contract.views > 1:
        _embedding_array(embedding, "obsm/views", (n, contract.views, d))
    if spots.counts is not None and spots.genes is not None:
        expression = group.create_group("expression")
        expression.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        with _anndata_settings():
            write_elem(expression, "obs", obs)
            write_elem(expression, "var", pd.DataFrame(index=pd.Index(spots.genes, name="gene", dtype=object)))
        _write_csr(expression, "X", spots.counts.astype(np.float32))


def _embedding_array(group: zarr.Group, name: str, shape: tuple[int, ...]) -> None:
    array = group.create_array(
        name,
        shape=shape,
        chunks=(_CHUNK_TILES, *shape[1:]),
        shards=(_SHARD_TILES, *shape[1:]),
        dtype="float16",
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
    )
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _write_csr(group: zarr.Group, name: str, matrix: sp.csr_matrix) -> None:
    """Write a sparse matrix as AnnData does, in chunks of a million values: few files, however many spots."""
    target = group.create_group(name)
    target.attrs.update(
        {
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [int(side) for side in matrix.shape],
        }
    )
    for part in ("data", "indices", "indptr"):
        values: NDArray[Any] = getattr(matrix, part)
        array = target.create_array(
            part,
            shape=values.shape,
            chunks=(max(1, min(_VALUES_PER_CHUNK, len(values))),),
            dtype=values.dtype,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
        )
        array[:] = values
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _consolidate(group: zarr.Group, name: str) -> None:
    """Gather an AnnData group's metadata in one place: one request instead of thirty on a remote disk."""
    with quiet_warnings():  # consolidated metadata is not yet in the v3 standard; readers may ignore it
        zarr.consolidate_metadata(group.store, path=f"{group.path}/{name}")


@contextlib.contextmanager
def _anndata_settings() -> Iterator[None]:
    """AnnData writes the small elements: as Zarr v3, without shards of its own choosing.

    Its settings, like the warning filters, are shared by all threads: one thread at a time.
    """
    wanted = {"zarr_write_format": 3, "auto_shard_zarr_v3": False}
    known = {key: value for key, value in wanted.items() if hasattr(anndata.settings, key)}
    with quiet_warnings(), anndata.settings.override(**known):
        yield


def _lock(path: Path) -> int:
    """Take the store for one writer. The lock is the kernel's: it ends with the process, however that ends."""
    handle = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not a POSIX system: nothing to lock with
        pass
    except BlockingIOError as error:
        os.close(handle)
        raise StoreError(
            f"another nh2st-pipe embed is writing {path}; wait for it, or give this one another --store"
        ) from error
    return handle
