"""Reading a store: which slides it holds, and one slide as stage two sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.store.format import FORMAT, KEY, Contract, SlideState, tile_words

__all__ = ["SlideData", "Store", "check_contract", "open_root", "open_store"]

_ROWS_AT_ONCE = 1024  # a whole number of shards


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

    @property
    def grid(self) -> NDArray[np.int64] | None:
        """n × 2: array_row and array_col, None where the slide has not both."""
        if self.array_row is None or self.array_col is None:
            return None
        return np.column_stack((self.array_row, self.array_col))


def open_store(path: str | Path) -> Store:
    """Open a store for reading. Raises StoreError where there is none, or one of a newer format."""
    return Store(Path(path), open_root(Path(path), "r"))


def open_root(path: Path, mode: str) -> zarr.Group:
    """Open the root group. Raises StoreError where there is no store, or one of another format."""
    if not path.exists():
        raise StoreError(f"there is no store at {path}; make one with nh2st-pipe embed")
    try:
        root = zarr.open_group(path, mode=mode)  # type: ignore[arg-type]
        attributes = root.attrs.asdict()[KEY]
    except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is not an embedding store (no '{KEY}' attribute at its root)") from error
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
        attributes: Any = root.attrs.asdict()[KEY]
        self.contract = Contract.from_attributes(attributes)
        self.manifest: dict[str, dict[str, Any]] = attributes.get("manifest", {})

    def __repr__(self) -> str:
        c = self.contract
        return (
            f"Store({str(self.path)!r}: {len(self.slides())} slides, {c.identity['name']}, {c.dim} values, "
            f"{c.views} views, tiles of {tile_words(c.tile)})"
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

    def read(
        self, slide_id: str, *, first_view_only: bool = False, into: NDArray[np.float16] | None = None
    ) -> SlideData:
        """Read one slide to memory, its embeddings `into` an array of n × V × d where one is given.

        Raises StoreError where it is incomplete or does not fit together.
        """
        n = self.tiles(slide_id)
        group: Any = self._root[f"slides/{slide_id}"]
        try:
            emb = group["embedding"]
            obs = read_elem(emb["obs"])
            use_views = "views" in emb["obsm"] and not first_view_only
            views = _read_embeddings(emb["obsm/views"] if use_views else emb["X"], into)
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


def _read_embeddings(array: Any, into: NDArray[np.float16] | None) -> NDArray[np.float16]:
    """Return n × V × d, read shard by shard, so that only one shard of it is ever in memory twice."""
    n, d = array.shape[0], array.shape[-1]
    views = array.shape[1] if len(array.shape) == 3 else 1
    out = np.empty((n, views, d), np.float16) if into is None else into
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, n))
        out[rows] = array[rows].reshape(-1, views, d)
    return out


def check_contract(store: Store, wanted: Contract) -> None:
    """Raise StoreError naming both sides where `store` was made in another way than `wanted`."""
    differences = store.contract.differences(wanted)
    if differences:
        raise StoreError(
            f"{store.path} was made with {'; '.join(differences)}; embeddings of the two must not mix. "
            "Give another --store, or the options this one was made with"
        )
