"""The embedding store: what stage one writes and stage two reads. Its format is in stages/embed/STORE.md.

`open_store` reads; `StoreWriter` writes, under a lock, one `SlideWriter` per slide. A slide counts as present
only when its completion mark is written, last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.spots import Spots

__all__ = [
    "Contract",
    "SlideData",
    "SlideState",
    "SlideWriter",
    "Store",
    "StoreWriter",
    "check_contract",
    "fingerprint",
    "open_store",
]

FORMAT = 1
_KEY = "nh2st_pipe"
_CHUNK_TILES, _SHARD_TILES = 32, 256
_CHECKPOINT_SECONDS = 10.0
_VALUES_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class Contract:
    """What all slides of a store have in common: if any of it differs, the embeddings are others."""

    encoder: dict[str, Any]
    """The recipe, whole."""
    identity: dict[str, Any]
    """The recipe's fields that decide the numbers."""
    weights_sha256: str
    weights_source: str
    precision: str
    tile: dict[str, float | None]
    views: int

    def attributes(self) -> dict[str, Any]:
        """Return the root attributes, without the manifest."""
        return {
            "format": FORMAT,
            "encoder": self.encoder,
            "identity": self.identity,
            "weights": {"sha256": self.weights_sha256, "source": self.weights_source},
            "precision": self.precision,
            "tile": self.tile,
            "views": self.views,
            "sub_tiles": 0,
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> Contract:
        """Return the contract written in a store's root."""
        return cls(
            encoder=attributes["encoder"],
            identity=attributes["identity"],
            weights_sha256=attributes["weights"]["sha256"],
            weights_source=attributes["weights"]["source"],
            precision=attributes["precision"],
            tile=attributes["tile"],
            views=attributes["views"],
        )

    @property
    def dim(self) -> int:
        """Values per embedding."""
        return int(self.encoder["dim"])

    def differences(self, other: Contract, *, views: bool = True) -> list[str]:
        """Return in words where `other` differs, so that both values are named."""
        found = []
        mine, theirs = self.identity, other.identity
        if mine["name"] != theirs["name"]:
            found.append(f"encoder {mine['name']}, not {theirs['name']}")
        else:
            found += [
                f"encoder {mine['name']} with {key} {mine.get(key)!r}, not {theirs.get(key)!r}"
                for key in sorted(mine.keys() | theirs.keys())
                if mine.get(key) != theirs.get(key)
            ]
            if self.weights_sha256 != other.weights_sha256:
                found.append(f"weights with SHA-256 {self.weights_sha256[:12]}…, not {other.weights_sha256[:12]}…")
        if self.tile != other.tile:
            found.append(f"tiles of {_tile_words(self.tile)}, not {_tile_words(other.tile)}")
        if self.precision != other.precision:
            found.append(f"precision {self.precision}, not {other.precision}")
        if views and self.views != other.views:
            found.append(f"{self.views} views, not {other.views}")
        return found


def _tile_words(tile: dict[str, float | None]) -> str:
    return f"{tile['size_um']:g} µm" if tile["size_um"] is not None else f"{tile['size_level0_px']:g} px"


@dataclass(frozen=True)
class SlideState:
    """How far a slide is; see STORE.md."""

    complete: bool
    rows: int
    partial: int
    tiles: int
    source: dict[str, Any]


@dataclass(frozen=True)
class SlideData:
    """One slide as stage two sees it. n tiles, V views, d values, k neighbours, g genes."""

    slide_id: str
    patient: str
    extra: dict[str, str]
    barcodes: list[str]
    xy: NDArray[np.float64]
    """n × 2, level-0 px."""
    array_row: NDArray[np.int64] | None
    array_col: NDArray[np.int64] | None
    views: NDArray[np.float16]
    """n × V × d."""
    neighbours: NDArray[np.int32]
    """n × k rows, the spot itself first; -1 where there is none."""
    counts: sp.csr_matrix | None
    """n × g raw counts."""
    genes: list[str]
    uns: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.barcodes)


def fingerprint(path: Path) -> str:
    """Return a fingerprint of a file's content: its size and SHA-256, of sixteen samples where it is large.

    It survives copying and moving; up to 16 MiB it sees every byte.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= 1 << 24:
            digest.update(file.read())
        else:
            block = 1 << 18
            for start in np.linspace(0, size - block, 16).astype(int):
                file.seek(int(start))
                digest.update(file.read(block))
    return f"{size}-{digest.hexdigest()[:32]}"


def open_store(path: str | Path) -> Store:
    """Open a store for reading. Raises StoreError where there is none, or one of a newer format."""
    return Store(Path(path), _open_root(Path(path), "r"))


def _open_root(path: Path, mode: str) -> zarr.Group:
    if not path.exists():
        raise StoreError(f"there is no store at {path}; make one with nh2st-pipe embed")
    try:
        root = zarr.open_group(path, mode=mode)  # type: ignore[arg-type]
        attributes = root.attrs.asdict()[_KEY]
    except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is not an embedding store (no '{_KEY}' attribute at its root)") from error
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        found = attributes.get("format") if isinstance(attributes, dict) else attributes
        raise StoreError(
            f"{path} has store format {found}, and this version of nh2st-pipe reads format {FORMAT}; "
            "a newer version may read it"
        )
    return root


class Store:
    """A store open for reading."""

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self.path = path
        self._root = root
        attributes: Any = root.attrs.asdict()[_KEY]
        self.contract = Contract.from_attributes(attributes)
        self.manifest: dict[str, dict[str, Any]] = attributes.get("manifest", {})

    def __repr__(self) -> str:
        c = self.contract
        return (
            f"Store({str(self.path)!r}: {len(self.slides())} slides, {c.identity['name']}, {c.dim} values, "
            f"{c.views} views, tiles of {_tile_words(c.tile)})"
        )

    def state(self, slide_id: str) -> SlideState | None:
        """Return how far a slide is, None where the store does not hold it."""
        group = self._root.get(f"slides/{slide_id}")
        state: Any = group.attrs.get("state") if isinstance(group, zarr.Group) else None
        return None if state is None else SlideState(**state)

    def slides(self) -> list[str]:
        """Return the ids of the complete slides, sorted."""
        return [slide_id for slide_id, state in self._states() if state is not None and state.complete]

    def incomplete(self) -> list[str]:
        """Return the ids of slides that were begun and not finished, sorted."""
        return [slide_id for slide_id, state in self._states() if state is None or not state.complete]

    def _states(self) -> Iterator[tuple[str, SlideState | None]]:
        slides = self._root.get("slides")
        names = sorted(slides.group_keys()) if isinstance(slides, zarr.Group) else []
        for name in names:
            yield name, self.state(name)

    def has_expression(self, slide_id: str) -> bool:
        """Whether the raw counts of a slide are in the store."""
        return f"slides/{slide_id}/expression" in self._root

    def tiles(self, slide_id: str) -> int:
        """Return a complete slide's number of tiles."""
        state = self.state(slide_id)
        if state is None or not state.complete:
            raise StoreError(f"{self.path} holds no complete slide {slide_id}; run nh2st-pipe embed again")
        return state.tiles

    def read(self, slide_id: str, *, first_view_only: bool = False) -> SlideData:
        """Read one slide to memory. Raises StoreError where it is incomplete or does not fit together."""
        n = self.tiles(slide_id)
        group: Any = self._root[f"slides/{slide_id}"]
        try:
            emb = group["embedding"]
            obs = read_elem(emb["obs"])
            use_views = "views" in emb["obsm"] and not first_view_only
            views = emb["obsm/views"][:] if use_views else emb["X"][:][:, None]
            xy, neighbours = emb["obsm/spatial"][:], emb["obsm/neighbors"][:]
            uns = read_elem(emb["uns"])
            barcodes = [str(name) for name in obs.index]
            counts, genes = None, []
            if "expression" in group:
                expression = read_elem(group["expression"])
                if [str(name) for name in expression.obs_names] != barcodes:
                    raise StoreError(f"{self.path}, slide {slide_id}: embedding and expression name different spots")
                counts, genes = sp.csr_matrix(expression.X), [str(name) for name in expression.var_names]
        except StoreError:
            raise
        except Exception as error:  # a missing element, a failed checksum, an unreadable chunk
            raise StoreError(
                f"{self.path}, slide {slide_id} is damaged: {' '.join(str(error).split())[:200]}; "
                "delete its folder under slides/ and run nh2st-pipe embed again"
            ) from error
        if not len(barcodes) == len(views) == len(xy) == len(neighbours) == n:
            raise StoreError(f"{self.path}, slide {slide_id} is damaged: its elements have different lengths")
        row = self.manifest.get(slide_id, {})
        return SlideData(
            slide_id=slide_id,
            patient=row.get("patient") or slide_id,
            extra=row.get("extra", {}),
            barcodes=barcodes,
            xy=xy,
            array_row=obs["array_row"].to_numpy() if "array_row" in obs else None,
            array_col=obs["array_col"].to_numpy() if "array_col" in obs else None,
            views=views,
            neighbours=neighbours,
            counts=counts,
            genes=genes,
            uns=uns,
        )


def check_contract(store: Store, wanted: Contract) -> None:
    """Raise StoreError naming both sides where `store` was made in another way than `wanted`."""
    differences = store.contract.differences(wanted)
    if differences:
        raise StoreError(
            f"{store.path} was made with {'; '.join(differences)}; embeddings of the two must not mix. "
            "Give another --store, or the options this one was made with"
        )


class StoreWriter(Store):
    """A store open for writing, locked against a second writer until it is closed."""

    def __init__(self, path: Path, contract: Contract) -> None:
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; --store takes the folder of a Zarr store")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            if not any(path.iterdir()):
                zarr.create_group(path, attributes={_KEY: {**contract.attributes(), "manifest": {}}})
            super().__init__(path, _open_root(path, "r+"))
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
            self._root.attrs[_KEY] = {**self.contract.attributes(), "manifest": merged}

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
