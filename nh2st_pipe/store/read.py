"""Reading a store: which slides it holds, and one slide as stage two sees it.

Nothing about one slide lies outside its folder, so what is damaged there hurts that slide alone: it is named, and the
others can be used. A slide is held against the list of its files before a value of it is believed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import DamageError, ResourceError, StoreError, for_want_of, reason_of
from nh2st_pipe.core.location import Location, Tag
from nh2st_pipe.core.names import part_name
from nh2st_pipe.store import legacy
from nh2st_pipe.store.files import faults_of
from nh2st_pipe.store.format import FORMAT, KEY, THUMBNAIL, Contract, SlideRecord, read_signed, tile_words
from nh2st_pipe.store.graph import DISTANCES, squidpy_graph, table_of

__all__ = ["SlideData", "Store", "StoredCounts", "check_contract", "open_store", "read_root"]


_LEAST_ROWS = 1024  # at once, a whole number of shards of earlier formats


@dataclass(frozen=True, repr=False)
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
    """n × g raw counts; None where there are none, or they were left in the store (`stored`)."""
    genes: list[str]
    uns: dict[str, Any] = field(default_factory=dict)
    """`image`, what is known of it, and `spatial`, its thumbnail as scanpy and squidpy draw on it."""
    stain_shift: NDArray[np.float32] | None = None
    """S × d: mean shift of the embeddings under synthetic stains."""
    block: int | None = None
    """Which block of the slide these spots are (`data.blocks`); None for all of it."""
    slide_vector: NDArray[np.float32] | None = None
    """What an encoder of whole slides says of it; None where the store has no such vector, or several."""
    slide_vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """All such vectors, by the encoders' names."""
    stored: StoredCounts | None = None
    """Where its raw counts are, if they were left in the store."""

    def __len__(self) -> int:
        return len(self.barcodes)

    def __repr__(self) -> str:
        n, views, dim = self.views.shape
        return f"SlideData({self.slide_id!r}: {n:,} tiles, {views} views of {dim} values, {len(self.genes):,} genes)"

    @property
    def name(self) -> str:
        """The slide's, with the number of the block where it is one: for keys and messages."""
        return part_name(self.slide_id, self.block)

    @property
    def measured(self) -> bool:
        """Whether there are counts of its spots, in memory or in the store."""
        return self.counts is not None or self.stored is not None

    def counted(self) -> sp.csr_matrix:
        """Return its raw counts n × g, read anew where they were left in the store. Raises StoreError without any."""
        if self.counts is not None:
            return self.counts
        if self.stored is None:
            raise StoreError(f"slide {self.slide_id} has no expression in the store")
        return self.stored.read()

    @property
    def image_fingerprint(self) -> str:
        """The image file's; empty where the store does not know it."""
        return str(self.uns.get("image", {}).get("fingerprint") or "")

    @property
    def mpp(self) -> float | None:
        """µm per level-0 px, None where it is not known."""
        value = self.uns.get("image", {}).get("mpp")
        return None if value is None else float(value)

    @property
    def grid(self) -> NDArray[np.int64] | None:
        """n × 2: array_row and array_col, None where the slide has not both."""
        if self.array_row is None or self.array_col is None:
            return None
        return np.column_stack((self.array_row, self.array_col))

    def graph(self) -> tuple[dict[str, sp.csr_matrix], dict[str, Any]]:
        """Return what squidpy keeps of the neighbours: two matrices n × n for obsp, and uns["spatial_neighbors"]."""
        return squidpy_graph(self.neighbours, np.linalg.norm(self.xy[self.neighbours] - self.xy[:, None], axis=2))

    def anndata(self) -> anndata.AnnData:
        """Return the slide as scanpy and squidpy know it: X n × d (view 0), all views in obsm, neighbours in obsp, the
        thumbnail in uns.
        """
        obs = pd.DataFrame(index=pd.Index(self.barcodes, name="barcode", dtype=object))
        for name in ("array_row", "array_col"):
            if getattr(self, name) is not None:
                obs[name] = getattr(self, name)
        obsm = {"spatial": self.xy, **({"views": self.views} if self.views.shape[1] > 1 else {})}
        obsp, note = self.graph()
        var = pd.DataFrame(index=pd.Index([f"e{i}" for i in range(self.views.shape[2])], dtype=object))
        uns = {**self.uns, "spatial_neighbors": note}
        return anndata.AnnData(self.views[:, 0], obs=obs, var=var, obsm=obsm, obsp=obsp, uns=uns)


@dataclass(frozen=True, eq=False)
class StoredCounts:
    """Raw counts of a slide, or of some of its spots, that lie in the store: `read` gives them, each time anew."""

    store: Store = field(repr=False)
    slide_id: str
    shape: tuple[int, int]
    """Of all of the slide's counts."""
    rows: NDArray[np.int64] | None = field(default=None, repr=False)
    """Which of the slide's spots; None for all."""

    def read(self) -> sp.csr_matrix:
        """Return n × g. Raises DamageError where they cannot be read, or are of another shape than they were."""
        counts = self.store.read_counts(self.slide_id, self.shape)
        return counts if self.rows is None else sp.csr_matrix(counts[self.rows])

    def take(self, rows: NDArray[np.int64]) -> StoredCounts:
        """Return the counts of some of these spots."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])


def open_store(where: str | Path | Location) -> Store:
    """Open a store for reading. Raises StoreError where there is none, or one of a newer format."""
    return Store(Location(where))


def read_root(location: Location) -> tuple[int, dict[str, Any]]:
    """Return a store's format and its root attributes. Raises StoreError where there is none that can be read."""
    if not location.exists():
        raise StoreError(f"there is no store at {location}; make one with nh2st-pipe embed")
    try:
        node = json.loads(location.read("zarr.json"))
        attributes = node["attributes"][KEY]
        if node["zarr_format"] != 3:
            raise KeyError("zarr_format")
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{location} is not an embedding store (no Zarr v3 group with the attribute '{KEY}' at its root)"
        ) from error
    found = attributes.get("format") if isinstance(attributes, dict) else attributes
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise StoreError(
            f"{location} has store format {found}, and this version of nh2st-pipe reads format {FORMAT} and older; "
            "a newer version may read it"
        )
    return found, attributes


class Store:
    """A store open for reading. `len`, iteration and `[]` go over its complete slides."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.format, attributes = read_root(location)
        try:
            if self.format == 1:
                self.contract = Contract.model_validate(attributes)
            else:
                self.contract = read_signed(Contract, attributes)
        except ValueError as error:
            raise StoreError(f"{location} is damaged: its root's attribute '{KEY}' {error}") from error
        self._rows = attributes.get("manifest", {}) if self.format == 1 else {}

    def __repr__(self) -> str:
        return self.in_words(len(self.slides()))

    def in_words(self, slides: int) -> str:
        """Return in a line what the store is, with so many complete slides."""
        c = self.contract
        return (
            f"Store({str(self.location)!r}: {slides} slides, {c.identity['name']}, {c.dim} values, {c.views} views, "
            f"tiles of {tile_words(c.tile)})"
        )

    def __len__(self) -> int:
        return len(self.slides())

    def __bool__(self) -> bool:
        return True  # a store none of whose slides is complete is a store

    def __iter__(self) -> Iterator[str]:
        return iter(self.slides())

    def __getitem__(self, slide_id: str) -> SlideData:
        return self.read(slide_id)

    def record(self, slide_id: str) -> SlideRecord | None:
        """Return what is known of a slide, None where the store does not hold it.

        Raises DamageError where it cannot be read.
        """
        return self.record_tagged(slide_id)[0]

    def record_tagged(self, slide_id: str) -> tuple[SlideRecord | None, Tag | None]:
        """Return what is known of a slide, and what that is known by to whoever writes it anew. See `record`."""
        try:
            data, tag = self.location.read_tagged(f"slides/{slide_id}/zarr.json")
            node = json.loads(data)
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError, RecursionError) as error:
            raise self._unread(slide_id, f"its zarr.json cannot be read ({reason_of(error)})", error) from error
        try:
            attributes = node["attributes"]
            if self.format == 1 and KEY not in attributes:  # else an upgrade is under way
                return legacy.record_of(attributes, self._rows.get(slide_id, {}), slide_id), tag
            return read_signed(SlideRecord, attributes[KEY]), tag
        except KeyError:
            raise self._damage(slide_id, "its zarr.json holds no record") from None
        except ValueError as error:  # in our own words
            raise self._damage(slide_id, f"its record {error}") from error
        except Exception as error:
            raise self._damage(slide_id, f"its record: {reason_of(error)}") from error

    def _damage(self, slide_id: str, what: str) -> DamageError:
        return DamageError(self.location, slide_id, what)

    def _unread(self, slide_id: str, what: str, error: Exception) -> DamageError | ResourceError:
        """Return what has to be raised where reading failed: damage, but for want of resources, which is none."""
        lacking = for_want_of(error)
        if lacking is None:
            return self._damage(slide_id, what)
        return ResourceError(
            f"{self.location}, slide {slide_id} could not be read for want of resources: {lacking}. That says nothing "
            "of the slide; give this process more, or run less beside it"
        )

    def _records(self) -> Iterator[tuple[str, SlideRecord | None]]:
        """Yield every slide with its record, None where that is damaged."""
        for name in self.location.folders("slides"):
            try:
                record = self.record(name)
            except DamageError:
                yield name, None
                continue
            if record is not None:
                yield name, record
            elif self.format > 1 and self.location.files(f"slides/{name}"):
                yield name, None  # something is there, and nothing says what

    def survey(self) -> tuple[dict[str, SlideRecord], list[str], list[str]]:
        """Return the records of complete slides, and the ids of unfinished and of damaged ones: each is read once."""
        every = list(self._records())
        whole = {name: record for name, record in every if record is not None and record.state.complete}
        begun = [name for name, record in every if record is not None and not record.state.complete]
        return whole, begun, [name for name, record in every if record is None]

    def records(self) -> dict[str, SlideRecord]:
        """Return the records of the complete slides by their ids, sorted: each is read once."""
        return self.survey()[0]

    def slides(self) -> list[str]:
        """Return the ids of the complete slides, sorted."""
        return list(self.records())

    def incomplete(self) -> list[str]:
        """Return the ids of slides that were begun and not finished, sorted."""
        return self.survey()[1]

    def damaged(self) -> list[str]:
        """Return the ids of slides that do not say what they are, sorted. `read` finds what is damaged inside one."""
        return self.survey()[2]

    def complete(self, slide_id: str) -> SlideRecord:
        """Return a complete slide's record. Raises StoreError where it is not there or not complete."""
        record = self.record(slide_id)
        if record is None or not record.state.complete:
            raise StoreError(f"{self.location} holds no complete slide {slide_id}; run nh2st-pipe embed again")
        return record

    def has_expression(self, slide_id: str) -> bool:
        """Whether the raw counts of a complete slide are in the store."""
        return self.complete(slide_id).expression is not None

    def tiles(self, slide_id: str) -> int:
        """Return a complete slide's number of tiles."""
        return self.complete(slide_id).state.tiles

    def read(
        self,
        slide_id: str,
        *,
        first_view_only: bool = False,
        into: NDArray[np.float16] | None = None,
        leave_counts: bool = False,
    ) -> SlideData:
        """Read one slide to memory, its embeddings `into` an array of n × V × d where one is given.

        With `leave_counts` its counts stay in the store until they are asked for (`StoredCounts`). Raises StoreError
        where it is incomplete, DamageError where it is not as it was written.
        """
        record = self.complete(slide_id)
        n = record.state.tiles
        self._check_files(slide_id, record.files)
        try:
            group: Any = zarr.open_group(
                self.location.zarr_store(read_only=True), path=f"slides/{slide_id}", mode="r", zarr_format=3
            )
            emb = group["embedding"]
            obs = read_elem(emb["obs"])
            use_views = "views" in emb["obsm"] and not first_view_only
            views = _read_embeddings(emb["obsm/views"] if use_views else emb["X"], into)
            xy, uns = emb["obsm/spatial"][:], self._uns(record, emb)
            vectors = {name: group[f"slide_embedding/{name}"][:] for name in record.slide_embeddings}
            shift = group["stain_shift"][:] if record.stain_shift is not None else None
            barcodes = [str(name) for name in obs.index]
            if DISTANCES in emb.get("obsp", ()):
                neighbours = table_of(sp.csr_matrix(read_elem(emb[f"obsp/{DISTANCES}"])))
            else:
                neighbours = emb["obsm/neighbors"][:]
            counts, stored, genes = None, None, list[str]()
            if record.expression is not None:
                obs_names, var_names = (read_elem(group[f"expression/{name}"]).index for name in ("obs", "var"))
                if [str(name) for name in obs_names] != barcodes:
                    raise ValueError("embedding and expression name different spots")
                genes = [str(name) for name in var_names]
                if leave_counts:
                    stored = StoredCounts(self, slide_id, (n, len(genes)))
                else:
                    counts = _matrix(group["expression/X"], (n, len(genes)))
        except Exception as error:  # a missing element, a failed checksum, an unreadable chunk
            raise self._unread(slide_id, reason_of(error), error) from error
        if not len(barcodes) == len(views) == len(xy) == len(neighbours) == n:
            raise self._damage(slide_id, "its elements have different lengths")
        if (
            neighbours.min(initial=0) < -1
            or neighbours.max(initial=-1) >= n
            or (neighbours[:, 0] != np.arange(n)).any()
        ):
            raise self._damage(slide_id, "its neighbours are not spots of it")
        if shift is not None and not (shift.shape[1:] == views.shape[2:] and np.isfinite(shift).all()):
            raise self._damage(slide_id, "its stain shift is not one of its embeddings")
        for name, vector in vectors.items():
            if vector.ndim != 1 or not np.isfinite(vector).all():
                raise self._damage(slide_id, f"slide_embedding/{name} is no vector of numbers")
        if not np.isfinite(xy).all():
            raise self._damage(slide_id, "places of its spots are not numbers")
        return SlideData(
            slide_id=slide_id,
            patient=record.row.patient,
            extra=record.row.extra,
            barcodes=barcodes,
            xy=xy,
            array_row=obs["array_row"].to_numpy() if "array_row" in obs else None,
            array_col=obs["array_col"].to_numpy() if "array_col" in obs else None,
            views=views,
            neighbours=neighbours,
            counts=counts,
            genes=genes,
            uns=uns,
            stain_shift=shift,
            slide_vector=next(iter(vectors.values())) if len(vectors) == 1 else None,
            slide_vectors=vectors,
            stored=stored,
        )

    def _check_files(self, slide_id: str, files: Mapping[str, tuple[int, str]], under: str = "") -> None:
        """Raise DamageError where a slide has not the `files` of its record that are `under` a place in it."""
        asked = {name: known for name, known in files.items() if name.startswith(under)}
        faults = faults_of(self.location, f"slides/{slide_id}", asked, deep=False) if asked else []
        if faults:
            raise self._damage(slide_id, faults[0])

    def read_counts(self, slide_id: str, shape: tuple[int, int]) -> sp.csr_matrix:
        """Read the raw counts of a complete slide, of `shape`; DamageError where they are not as they were written."""
        self._check_files(
            slide_id, self.complete(slide_id).files, "expression/"
        )  # of a chunk that is missing, zarr makes zeros
        try:
            group = zarr.open_group(
                self.location.zarr_store(read_only=True), path=f"slides/{slide_id}/expression", mode="r", zarr_format=3
            )
            return _matrix(group["X"], shape)
        except Exception as error:
            raise self._unread(slide_id, reason_of(error), error) from error

    def n_genes(self, slide_id: str) -> int:
        """Return how many genes a complete slide has counts of; 0 where it has none."""
        if self.complete(slide_id).expression is None:
            return 0
        try:
            var: Any = zarr.open_group(
                self.location.zarr_store(read_only=True),
                path=f"slides/{slide_id}/expression/var",
                mode="r",
                zarr_format=3,
            )
            return int(var[var.attrs["_index"]].shape[0])
        except Exception as error:
            raise self._unread(slide_id, reason_of(error), error) from error

    def counts_size(self, slide_id: str) -> int:
        """Return how many bytes the counts of a complete slide take in memory; 0 where it has none."""
        if self.complete(slide_id).expression is None:
            return 0
        try:
            group: Any = zarr.open_group(
                self.location.zarr_store(read_only=True), path=f"slides/{slide_id}/expression", mode="r", zarr_format=3
            )
            names = ("X/data", "X/indices") if "X/data" in group else ("X",)
            arrays = [group[name] for name in names]
            return sum(int(array.size) * array.dtype.itemsize for array in arrays)
        except Exception as error:
            raise self._unread(slide_id, reason_of(error), error) from error

    def _uns(self, record: SlideRecord, embedding: Any) -> dict[str, Any]:
        """Return what is known of a slide's image, and its thumbnail, from its record or as earlier formats keep it."""
        if record.resolved is None:
            uns: dict[str, Any] = read_elem(embedding["uns"])
            return uns
        slide_id, found = record.row.slide_id, record.resolved.model_dump(exclude_none=True)
        uns = {"image": {**found, "path": record.row.slide, "fingerprint": record.image.image}}
        if record.picture is not None:
            png = self.location.read(f"slides/{slide_id}/{THUMBNAIL}")
            scales = {
                "tissue_hires_scalef": record.picture.scale,
                "spot_diameter_fullres": record.picture.spot_px,
            }
            hires = np.asarray(Image.open(io.BytesIO(png)))
            uns["spatial"] = {slide_id: {"images": {"hires": hires}, "scalefactors": scales}}
        return uns


def _matrix(element: Any, shape: tuple[int, int]) -> sp.csr_matrix:
    """Return counts. Raises ValueError where they are of another shape, or no matrix."""
    counts = sp.csr_matrix(read_elem(element))
    if counts.shape != shape:
        raise ValueError(f"its counts are {counts.shape[0]} × {counts.shape[1]}, and {shape[0]} × {shape[1]} are named")
    counts.check_format(full_check=True)
    return counts


def _read_embeddings(array: Any, into: NDArray[np.float16] | None) -> NDArray[np.float16]:
    """Return n × V × d, read shard by shard, so that only one shard of it is ever in memory twice."""
    n, d = array.shape[0], array.shape[-1]
    most = max((array.shards or array.chunks)[0], _LEAST_ROWS)
    views = array.shape[1] if len(array.shape) == 3 else 1
    out = np.empty((n, views, d), np.float16) if into is None else into
    for start in range(0, n, most):
        rows = slice(start, min(start + most, n))
        out[rows] = array[rows].reshape(-1, views, d)
        if not np.isfinite(out[rows]).all():
            raise ValueError("it holds embeddings that are not numbers")
    return out


def check_contract(store: Store, wanted: Contract) -> None:
    """Raise StoreError naming both sides where `store` was made in another way than `wanted`."""
    differences = store.contract.differences(wanted)
    if differences:
        raise StoreError(
            f"{store.location} was made with {'; '.join(differences)}; embeddings of the two must not mix. "
            "Give another --store, or the options this one was made with"
        )
