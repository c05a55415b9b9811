"""Writing a store: `StoreWriter` for the whole of it, one `SlideWriter` per slide.

A slide is written by whoever holds the lease on it, and what there is to do is decided under the lease. Its record
says at every moment how far it is, and the completion mark is written last, with a list of its files. What the memory
holds follows what is on disk, never the other way round: whatever strikes, the next run goes on from the record.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import Crc32cCodec, ZstdCodec

from nh2st_pipe.core.errors import LeaseError, StoreError, written_to
from nh2st_pipe.core.lease import Lease, lease_on
from nh2st_pipe.core.location import Location, Tag
from nh2st_pipe.store.elements import (
    ANNDATA,
    Files,
    anndata_dict,
    array,
    csr,
    frame,
    group,
    sharded,
    shards,
)
from nh2st_pipe.store.files import SlideFiles, list_files
from nh2st_pipe.store.format import (
    FORMAT,
    KEY,
    THUMBNAIL,
    Contract,
    ImageSource,
    ManifestRow,
    Picture,
    Resolved,
    Seen,
    SlideRecord,
    SlideState,
    signed,
    spots_fingerprint,
    to_json,
)
from nh2st_pipe.store.graph import DISTANCES, graph_of
from nh2st_pipe.store.read import Store, check_contract
from nh2st_pipe.tiles.spots import Spots

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = [
    "RecordFile",
    "SlideWriter",
    "StoreWriter",
    "as_png",
    "graph_files",
    "partial_name",
    "write_partial",
]

_CHUNK_TILES, _MOST_SHARD_TILES = 32, 4096
_SHARD_BYTES = 32 << 20  # few files, and what is written anew at every checkpoint stays small
_CHECKPOINT_SECONDS = 10.0
_SURELY_OVER_SECONDS = 3600.0  # no single write of a few kB takes as long


class StoreWriter(Store):
    """A store open for writing; made where there is none. Several processes may have the same one open."""

    def __init__(self, where: str | Path | Location, contract: Contract) -> None:
        location = Location(where)
        if location.path is not None and location.path.exists() and not location.path.is_dir():
            raise StoreError(f"{location} is a file; --store takes the folder of a Zarr store")
        with written_to(location), lease_on(location, "store"):
            if location.is_empty():
                attributes = {KEY: signed(contract.attributes())}
                zarr.create_group(location.zarr_store(), attributes=attributes, zarr_format=3)
        super().__init__(location)
        if self.format != FORMAT:
            raise StoreError(
                f"{location} has store format {self.format}; nh2st-pipe upgrade {location} makes it format {FORMAT}, "
                "in seconds and without encoding; then embed goes on with it"
            )
        check_contract(self, contract)
        for folder in ("", "slides"):  # where no lease is held: another process may be writing there
            location.sweep(folder, deep=False, older_than_s=_SURELY_OVER_SECONDS)
        self._zarr = location.zarr_store()
        with contextlib.suppress(FileExistsError, zarr.errors.ContainsGroupError):
            zarr.create_group(self._zarr, path="slides", zarr_format=3)

    def lease(self, slide_id: str) -> Lease:
        """Return the lease on a slide, not yet taken."""
        return lease_on(self.location, f"slide-{slide_id}")

    def renew_row(self, record: SlideRecord, tag: Tag | None, row: ManifestRow) -> None:
        """Take over a manifest row that has changed in what the embeddings do not depend on. Needs the lease."""
        RecordFile(self.location, row.slide_id, tag).write(record.model_copy(update={"row": row}))

    def slide(
        self,
        row: ManifestRow,
        image: ImageSource,
        spots: Spots,
        resolved: Resolved,
        expression: str | None = None,
        lease: Lease | None = None,
        seen: Mapping[str, Seen] | None = None,
    ) -> SlideWriter:
        """Return the writer of a slide whose lease is held: where it was left, if whatever decides its tiles is the
        same: image, spots, and what they were `resolved` to.

        `expression` is the fingerprint of the file the counts are from: where it alone has changed, the counts are
        written anew and the embeddings kept. `seen` are the files' sizes and times. `lease` is looked at before each
        write: it may be lost.
        """
        with written_to(self.location):
            return self._slide(row, image, spots, resolved, expression, lease, dict(seen or {}))

    def _slide(
        self,
        row: ManifestRow,
        image: ImageSource,
        spots: Spots,
        resolved: Resolved,
        expression: str | None,
        lease: Lease | None,
        seen: dict[str, Seen],
    ) -> SlideWriter:
        self.check_there()
        if lease is not None:
            lease.check()
        path = f"slides/{row.slide_id}"
        wanted = SlideRecord(
            row=row,
            image=image,
            spots=spots_fingerprint(spots.barcodes, spots.xy),
            resolved=resolved,
            seen=seen,
            lease=secrets.token_hex(8) if lease is None else lease.fence,
            state=SlideState(tiles=len(spots)),
        )
        old, tag = self.record_tagged(row.slide_id)
        kept, files = RecordFile(self.location, row.slide_id, tag), SlideFiles(self.location, path)
        if old is not None and old.state.ready and _may_go_on(old, wanted):
            same = {"row": row, "files": {}, "lease": wanted.lease, "seen": seen}
            record = old.model_copy(update=same).with_state(complete=False)
            if old.expression != expression:
                record = record.model_copy(update={"expression": None})
                kept.write(record)
                files.lay(_obs("embedding/obs", spots))
                self.location.delete(f"{path}/expression")
                files.lay(_expression(spots))
                record = record.model_copy(update={"expression": expression})
            kept.write(record)
            return SlideWriter(self, path, record, kept, files, lease)
        if old is None:
            self.location.delete(path)  # something may lie there that does not say what it is
        # A group and its record are one file: there is no moment at which a slide does not say how far it is.
        kept.write(wanted)  # not ready: whoever finds it like this begins anew
        for name in self.location.folders(path):
            self.location.delete(f"{path}/{name}")
        files.lay(chain(_skeleton(self.contract, spots), _expression(spots)))
        record = wanted.model_copy(update={"expression": expression}).with_state(ready=True)
        kept.write(record)
        return SlideWriter(self, path, record, kept, files, lease)

    def check_there(self) -> None:
        """Raise StoreError where the store is not at its place any more: writing would begin another one there."""
        if self.location.path is not None and not (self.location.path / "zarr.json").is_file():
            raise StoreError(
                f"the store {self.location} is gone: was it moved or deleted while it was written? Wherever it is now, "
                "embed goes on with it"
            )

    def group(self, path: str, within: ZarrStore | None = None) -> zarr.Group:
        """Open a group to write in it. Consolidated metadata are a copy for readers, and never what is written to."""
        return zarr.open_group(within or self._zarr, path=path, mode="r+", zarr_format=3, use_consolidated=False)


class SlideWriter:
    """Writes the embeddings of one slide, in order, whole shards at a time.

    What does not yet fill a shard is kept in an array `partial_<first row>`, renewed every ten seconds, so that a
    killed run loses ten seconds of work and every shard is written once.
    """

    def __init__(
        self,
        store: StoreWriter,
        path: str,
        record: SlideRecord,
        kept: RecordFile,
        files: SlideFiles,
        lease: Lease | None = None,
    ) -> None:
        self._store, self._path, self._record, self._kept = store, path, record, kept
        self._within, self._files, self._lease = store.location.zarr_store(alone_under=path), files, lease
        self._views = store.contract.views
        self._x = self._array("embedding/X")
        self._all_views = self._array("embedding/obsm/views") if self._views > 1 else None
        self._shard = _shard_rows(self._x)
        self._pending: list[NDArray[np.float16]] = []
        if record.state.partial:
            partial: Any = self._group[partial_name(record.state.rows)]
            self._pending.append(partial[: record.state.partial])
        self._saved = time.monotonic()
        self._broken = False

    def _array(self, name: str) -> Any:
        return zarr.open_array(self._within, path=f"{self._path}/{name}", mode="r+", zarr_format=3)

    @cached_property
    def _group(self) -> zarr.Group:
        return self._store.group(self._path, self._within)

    @property
    def rows(self) -> int:
        """Tiles that need not be encoded again."""
        return self._record.state.rows + sum(map(len, self._pending))

    @property
    def has_stain_shift(self) -> bool:
        """Whether the slide's shift under other stains is there."""
        return self._record.stain_shift is not None

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the embeddings r × V × d of `rows`, which have to be in the arrays already."""
        array = self._x if self._all_views is None else self._all_views
        values: NDArray[np.float16] = array.oindex[rows]
        return values.reshape(len(rows), self._views, -1)

    def write_stain_shift(self, shift: NDArray[np.float32], stains: str) -> None:
        """Write the mean shifts S × d of the slide's embeddings under the synthetic stains called `stains`."""
        with self._unless_broken():
            self._files.lay(array("stain_shift", shift.astype(np.float32), {}))
            record = self._record.model_copy(update={"stain_shift": stains})
            self._kept.write(record)
            self._record = record

    def write_slide_embeddings(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Write what encoders of whole slides say of it: vectors of any length, by the encoders' names."""
        with self._unless_broken():
            self._files.lay(group("slide_embedding", {}))
            for name, vector in vectors.items():
                self._files.lay(array(f"slide_embedding/{name}", vector.astype(np.float32), {}))
            record = self._record.model_copy(update={"slide_embeddings": tuple(sorted(vectors))})
            self._kept.write(record)
            self._record = record

    def append(self, embeddings: NDArray[np.float16]) -> None:
        """Take the embeddings (b × V × d) of the next b tiles."""
        with self._unless_broken():
            state = self._record.state
            pending = [*self._pending, embeddings]
            waiting = sum(map(len, pending))
            last = state.rows + waiting == state.tiles
            if waiting >= self._shard or last:
                block = np.concatenate(pending)
                whole = waiting if last else waiting - waiting % self._shard
                start, stop = state.rows, state.rows + whole
                self._write_rows("embedding/X", self._x, block[:whole, 0], start)
                if self._all_views is not None:
                    self._write_rows("embedding/obsm/views", self._all_views, block[:whole], start)
                self._mark(rows=stop, partial=0)
                pending = [block[whole:]] if whole < waiting else []
            self._pending = pending
        if time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self.checkpoint()

    def _write_rows(self, name: str, array: Any, values: NDArray[np.float16], start: int) -> None:
        if _shard_rows(array) == self._shard:
            self._files.lay(shards(name, values, start, array.chunks[0], self._shard))
        else:  # of a store that was begun when the two arrays did not have the same shards
            array[start : start + len(values)] = values

    def checkpoint(self) -> None:
        """Make what has been appended safe. Does nothing after a write that failed: the disk knows best then."""
        waiting = sum(map(len, self._pending))
        if self._broken or waiting == self._record.state.partial:
            return
        with self._unless_broken():
            values = np.concatenate(self._pending)
            write_partial(self._group, partial_name(self._record.state.rows), values, self._shard)
            self._mark(partial=waiting)

    def finish(
        self,
        neighbours: NDArray[np.int32],
        distances: NDArray[np.float64],
        thumbnail: NDArray[np.uint8],
        picture: Picture,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write what needs the whole slide (tables n × k, the spot itself first; its `thumbnail` h × w × 3), and the
        completion mark, last.

        `files` are laid beside it as they are, by name.

        Each step may be done twice: a run that is cut short in here is taken up again.
        """
        state = self._record.state
        if state.rows != state.tiles:
            raise StoreError(f"{self._path}: {state.rows} of {state.tiles} tiles are written")
        with self._unless_broken():
            location = self._store.location
            location.delete(f"{self._path}/embedding/obsp")
            self._files.lay(graph_files(neighbours, distances))
            self._files.lay({THUMBNAIL: as_png(thumbnail), **(files or {})}.items())
            for name in location.folders(self._path):
                if name.startswith("partial_"):
                    location.delete(f"{self._path}/{name}")
            self._files.consolidate(("embedding", "expression"))
            location.sweep(self._path, deep=True)
            listed = list_files(location, self._path, self._written() | self._files.listed)
            self._record = self._record.model_copy(update={"files": listed, "picture": picture, "lease": None})
            self._mark(partial=0, complete=True)

    def _written(self) -> dict[str, tuple[int, str]]:
        """Return size and checksum of what was written here by way of zarr, as far as that is known without reading it
        back: of an object store, where that would double the traffic.
        """
        written: dict[str, tuple[int, int]] = getattr(self._within, "written", {})
        start = len(self._path) + 1
        return {key[start:]: (size, f"{checksum:08x}") for key, (size, checksum) in written.items()}

    def _mark(self, **changes: Any) -> None:
        """Write the record with its state changed, then believe it."""
        record = self._record.with_state(**changes)
        self._kept.write(record)
        self._record = record
        self._saved = time.monotonic()

    @contextlib.contextmanager
    def _unless_broken(self) -> Iterator[None]:
        if self._broken:
            raise StoreError(f"{self._path}: an earlier write failed; open the slide anew")
        self._store.check_there()
        if self._lease is not None:
            self._lease.check()
        try:
            with written_to(self._store.location):
                yield
        except BaseException:
            self._broken = True
            raise


class RecordFile:
    """A slide's record where it lies, as whoever writes it knows it: by the `tag` of what was read, None of nothing.

    It is replaced in one write, the old one or the new one at any moment, and by compare-and-swap: by nobody whose
    record another has replaced.
    """

    def __init__(self, location: Location, slide_id: str, tag: Tag | None) -> None:
        self._location, self.slide_id, self._tag = location, slide_id, tag

    def write(self, record: SlideRecord) -> None:
        """Write a record. Raises LeaseError where another process has written one since."""
        name, data = f"slides/{self.slide_id}/zarr.json", to_json(record)
        known, place = self._tag, self._location
        tag = place.create(name, data) if known is None else place.swap(name, data, known)
        if tag is None:
            raise LeaseError(
                f"{self._location}: slide {self.slide_id} was written by another process, which took over its lease; "
                "what that one wrote is kept"
            )
        self._tag = tag


def _may_go_on(old: SlideRecord, wanted: SlideRecord) -> bool:
    """Whether tiles may be added to those that are there: whatever decides them is the same, and who reads them."""
    assert wanted.resolved is not None
    if not old.image.same(wanted.image) or old.spots != wanted.spots:
        return False
    if old.resolved is None:
        return False
    if old.state.rows == old.state.tiles:  # none is added
        return not old.resolved.differences(wanted.resolved)
    return old.resolved.mixes_with(wanted.resolved)


def partial_name(rows: int) -> str:
    """Return the name of the array of tiles that follow the first `rows` and do not fill a shard yet."""
    return f"partial_{rows}"


def write_partial(group: zarr.Group, name: str, values: NDArray[np.float16], shard: int) -> None:
    """Write fewer tiles than a `shard` (b × V × d) as one chunk of its size, in place of those that are there."""
    shape = (shard, *values.shape[1:])
    if name not in group:
        group.create_array(
            name, shape=shape, chunks=shape, dtype="float16", compressors=[ZstdCodec(level=1), Crc32cCodec()]
        )
    padded = np.zeros(shape, np.float16)
    padded[: len(values)] = values
    partial: Any = group[name]
    partial[:] = padded


def graph_files(neighbours: NDArray[np.int32], distances: NDArray[np.float64]) -> Files:
    """Yield n × k neighbours as a sparse matrix of their distances, as squidpy has it."""
    yield from anndata_dict("embedding/obsp")
    yield from csr(f"embedding/obsp/{DISTANCES}", graph_of(neighbours, distances)[1])


def as_png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture h × w × 3 as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def _obs(name: str, spots: Spots) -> Files:
    on_lattice = {"array_row": spots.array_row, "array_col": spots.array_col}
    return frame(name, spots.barcodes, "barcode", {name: each for name, each in on_lattice.items() if each is not None})


def _skeleton(contract: Contract, spots: Spots) -> Files:
    """Yield everything of a slide's embedding that is known before its tiles are encoded."""
    n, d = len(spots), contract.dim
    yield from group("embedding", ANNDATA)
    yield from _obs("embedding/obs", spots)
    yield from anndata_dict("embedding/obsm")
    yield from array("embedding/obsm/spatial", spots.xy)
    shard = _shard_tiles(n, contract.views * d)
    yield from sharded("embedding/X", (n, d), "float16", _CHUNK_TILES, shard)
    if contract.views > 1:
        yield from sharded("embedding/obsm/views", (n, contract.views, d), "float16", _CHUNK_TILES, shard)


def _expression(spots: Spots) -> Files:
    """Yield the counts; nothing where the spots have none."""
    if spots.counts is None or spots.genes is None:
        return
    yield from group("expression", ANNDATA)
    yield from frame("expression/obs", spots.barcodes, "barcode", {})
    yield from frame("expression/var", spots.genes, "gene", {})
    yield from csr("expression/X", spots.counts.astype(np.float32))


def _shard_tiles(tiles: int, values: int) -> int:
    """Return how many tiles a shard has where each has so many values: a whole number of chunks, no more than tiles."""
    fit = _SHARD_BYTES // (2 * values)
    chunks = max(1, min(fit, _MOST_SHARD_TILES, tiles + _CHUNK_TILES - 1) // _CHUNK_TILES)
    return chunks * _CHUNK_TILES


def _shard_rows(array: Any) -> int:
    return int((array.shards or array.chunks)[0])
