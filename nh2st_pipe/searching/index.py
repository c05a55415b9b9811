"""An index of stores: every tile's embedding as it is compared, laid down beside the store, a file a slide.

Embeddings of pathology encoders point nearly the same way, and a part of what they tell apart is the stain: so they are
centred, the directions in which synthetic stains move them are taken out, and what is left is of length 1. The cosine
between two tiles is then their product. The mean and the directions are those of the index's first day, until it is
made anew: tiles that are added later are comparable with those that are there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import StoreError, UsageError, fault_of
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.recipes.values import Strict
from nh2st_pipe.searching.stores import Stores, together
from nh2st_pipe.store.format import Count, crc32c
from nh2st_pipe.store.read import Store

__all__ = ["AGAIN", "COARSE", "Index", "IndexedSlide", "Space", "index_of", "index_path"]

_FORMAT = 1
_SAMPLE = 32  # tiles of a slide that the mean is of
_SPACE, _LIST = "space.npz", "index.json"
AGAIN = "is damaged; nh2st-pipe index --anew makes it again"
"""What is said of any file of an index."""

COARSE = ("coarse.faiss", "coarse.json")
"""Files of the coarse index, which goes with it."""


@dataclass(frozen=True)
class Space:
    """How embeddings are compared."""

    mean: NDArray[np.float32]
    """d."""
    taken_out: NDArray[np.float32]
    """r × d, orthonormal: the directions of stains; none where the stores have no stain shifts."""

    def of(self, values: NDArray[Any]) -> NDArray[np.float16]:
        """Return embeddings n × d as they are compared, of length 1."""
        moved = values.astype(np.float32) - self.mean
        moved -= (moved @ self.taken_out.T) @ self.taken_out
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        return np.asarray(moved / np.maximum(length, 1e-12), np.float16)


class _Listed(Strict):
    """What an index says of a slide."""

    made_of: str
    tiles: Count


class _About(Strict):
    """What an index says of itself."""

    format: int
    store: str
    slides: dict[str, _Listed]


@dataclass(frozen=True)
class IndexedSlide:
    """A slide in an index."""

    slide_id: str
    patient: str
    tiles: int
    dim: int
    file: Path
    made_of: str = ""
    """What its vectors were made of."""

    def vectors(self) -> NDArray[np.float16]:
        """Return its tiles as they are compared, n × d, mapped from the disk. Raises StoreError where it is damaged."""
        with fault_of(StoreError, f"{self.file} {AGAIN}"):
            found: NDArray[np.float16] = np.load(self.file, mmap_mode="r")
            if found.shape != (self.tiles, self.dim) or found.dtype != np.float16:
                raise ValueError(
                    f"it holds {found.dtype} of {found.shape}, and {self.tiles:,} tiles of {self.dim:,} are expected"
                )
        return found

    def places(self) -> tuple[NDArray[np.float64], list[str]]:
        """Return the centres of its tiles (n × 2, level-0 px) and their names. Raises StoreError as `vectors`."""
        file = self.file.with_suffix(".tiles.npz")
        with fault_of(StoreError, f"{file} {AGAIN}"), np.load(file) as held:
            xy, names = held["xy"], [str(name) for name in held["names"]]
            if xy.shape != (self.tiles, 2) or len(names) != self.tiles:
                raise ValueError(f"it holds {len(names):,} tiles, and {self.tiles:,} are expected")
            return xy, names


@dataclass(frozen=True)
class Index:
    """An index that is open."""

    path: Path
    space: Space
    slides: dict[str, IndexedSlide]
    renewed: tuple[str, ...] = ()
    """Slides whose vectors were made by this call."""

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return len(self.space.mean)

    def __len__(self) -> int:
        return sum(slide.tiles for slide in self.slides.values())


def index_path(store: Store | Stores) -> Path:
    """Return where a store's index lies: beside it. Raises StoreError for a store that is no folder, UsageError for
    several.
    """
    if isinstance(store, Stores) and store.several:
        raise UsageError("an index of several stores lies where --index FOLDER says")
    if store.location.path is None:
        raise StoreError(f"{store.location} is no folder: an index lies beside a store on a disk; --index says where")
    folder = store.location.path.resolve()
    return folder.with_name(f"{folder.name}.search")


def index_of(
    store: Store | Stores, where: str | Path | None = None, *, anew: bool = False, progress: Progress | None = None
) -> Index:
    """Make or renew the index of a store, at `where` or beside it, or of several, at `where`, and open it.

    Slides that have changed since, or are new, are taken in, and those that are gone left out; what is there stays.
    `anew` makes all of it again, as after many new slides. Raises StoreError where it is of another encoder.
    """
    store = together(store)
    path = index_path(store) if where is None else Path(where)
    identity = store.identity
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in (_SPACE, _LIST)):
        raise StoreError(f"{path} is there already and is no index; --index takes another folder")
    if anew:
        shutil.rmtree(path / "slides", ignore_errors=True)
        for name in (_SPACE, _LIST, *COARSE):
            (path / name).unlink(missing_ok=True)
    known = _known(path, store, identity)
    names = store.slides()
    if not names:
        raise StoreError(f"{store.location} holds no complete slide; run nh2st-pipe embed first")
    (path / "slides").mkdir(parents=True, exist_ok=True)
    if not (path / _SPACE).is_file():
        known = {}
        _write_space(path, _space_of(store, names))
    with fault_of(StoreError, f"{path} {AGAIN}"), np.load(path / _SPACE) as held:
        space, dim = Space(held["mean"], held["taken_out"]), store.contract.dim
        if space.mean.shape != (dim,) or space.taken_out.ndim != 2 or space.taken_out.shape[1] != dim:
            raise ValueError(f"its mean is of {space.mean.shape}, and embeddings have {dim:,} values")
        if not (np.isfinite(space.mean).all() and np.isfinite(space.taken_out).all()):
            raise ValueError("its mean or the stains' directions are no numbers")
    progress = progress or Progress()
    progress.start("indexing", len(names), "slides")
    slides, listed, renewed = dict[str, IndexedSlide](), dict[str, Any](), list[str]()
    for number, name in enumerate(names):
        progress.advance(number, len(names), name)
        record = store.record(name)
        assert record is not None
        made_of = crc32c(json.dumps([record.image.model_dump(), record.spots, record.files], default=str).encode())
        file = path / "slides" / f"{name}.npy"
        if name not in known or known[name].made_of != made_of or not file.is_file():
            data = store.read(name)
            with written_whole(file) as part, part.open("wb") as out:
                np.save(out, space.of(data.views[:, 0]))
            with written_whole(file.with_suffix(".tiles.npz")) as part, part.open("wb") as out:
                np.savez_compressed(out, xy=data.xy, names=np.array(data.barcodes, dtype=np.str_))
            renewed.append(name)
        tiles = record.state.tiles
        slides[name] = IndexedSlide(name, record.row.patient, tiles, store.contract.dim, file, made_of)
        listed[name] = {"made_of": made_of, "tiles": tiles}
    for gone in known.keys() - slides.keys():
        for ending in (".npy", ".tiles.npz"):
            (path / "slides" / f"{gone}{ending}").unlink(missing_ok=True)
    about = {"format": _FORMAT, "store": identity, "slides": listed}
    with written_whole(path / _LIST) as part:
        part.write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Index(path, space, slides, tuple(renewed))


def _known(path: Path, store: Stores, identity: str) -> dict[str, _Listed]:
    """Return what an index says of its slides. Raises StoreError where it is of something else."""
    if not (path / _LIST).is_file():
        return {}
    with fault_of(StoreError, f"{path} {AGAIN}"):
        said = _About.model_validate_json((path / _LIST).read_bytes())
        strange = [name for name in said.slides if Path(name).name != name]
        if strange:
            raise ValueError(f"it names a slide {strange[0]}")
        if said.format != _FORMAT:
            raise StoreError(f"{path} is an index of format {said.format}; nh2st-pipe index --anew makes it again")
        if said.store != identity:
            raise StoreError(
                f"{path} is the index of another store than {store.location}: its encoder, weights or tiles differ; "
                "nh2st-pipe index --anew makes it again"
            )
        return said.slides


def _space_of(store: Stores, names: list[str]) -> Space:
    """Return the mean of some tiles of each slide, and the directions in which stains move embeddings."""
    total, shifts = np.zeros(store.contract.dim), list[NDArray[np.float32]]()
    for name in names:
        data = store.read(name)
        rows = np.unique(np.linspace(0, len(data) - 1, _SAMPLE).astype(int))
        total += data.views[rows, 0].astype(np.float64).mean(axis=0)
        if data.stain_shift is not None:
            shifts.append(data.stain_shift)
    directions = np.zeros((0, store.contract.dim), np.float32)
    if shifts:
        mean = np.mean(shifts, axis=0, dtype=np.float64)
        _, size, found = np.linalg.svd(mean, full_matrices=False)
        directions = found[size > 1e-6 * max(size.max(), 1e-30)].astype(np.float32)
    return Space((total / len(names)).astype(np.float32), directions)


def _write_space(path: Path, space: Space) -> None:
    with written_whole(path / _SPACE) as part, part.open("wb") as out:
        np.savez(out, mean=space.mean, taken_out=space.taken_out)
