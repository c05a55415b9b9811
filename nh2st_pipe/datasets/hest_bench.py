"""HEST-Benchmark (Jaume et al. 2024) as it is downloaded: tasks of patches, their counts, splits and genes.

    <task>/patches/<id>.h5        img n × 224 × 224 × 3; barcode n × 1; coords n × 2, level-0 px of the upper left
                                  corner; img's attributes: patch_size_src (px of the slide), …
    <task>/adata/<id>.h5ad        raw counts, of more spots than there are patches
    <task>/splits/train_<k>.csv, test_<k>.csv    sample_id, …
    <task>/var_50genes.json       the genes of the task

The slides are not part of it. Each is put together from its patches, at their places, farther apart where they would
overlap, so that a tile of 224 px (--tile-px 224) is a patch as it was published; what surrounds a spot stays what it
was, as distances are counted in pitches. A task is taken with --where task=NAME.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import ExpressionError, UsageError, listed, reason_of
from nh2st_pipe.core.h5ad import read_h5ad
from nh2st_pipe.core.hdf5 import opened_h5
from nh2st_pipe.datasets.common import (
    PATCH,
    Found,
    Made,
    Section,
    files_of,
    needed,
    put_together,
    read_frame,
    whole_numbers,
)

__all__ = ["Split", "Task", "find_hest_bench", "tasks_of"]

_UM_PER_PX = 0.5
_FARTHEST = 8.0  # times farther apart; beyond, patches lie on each other


@dataclass(frozen=True)
class Split:
    """One of a task's folds, by sample."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task of the benchmark."""

    name: str
    folder: Path
    splits: tuple[Split, ...]
    genes: Path
    """Its list of genes."""

    @property
    def samples(self) -> list[str]:
        """Every sample of a split."""
        return sorted({name for split in self.splits for name in (*split.train, *split.test)})


def tasks_of(folder: Path) -> list[Task]:
    """Return the tasks below `folder`, or the one that it is. Raises ExpressionError where there is none, or one has no
    genes, or a split without its other half, or a sample on both sides of one.
    """
    found = []
    for place in sorted({file.parent.parent for file in files_of(folder, "**/splits/test_*.csv")}):
        splits = []
        for test in sorted(place.glob("splits/test_*.csv"), key=_number):
            name = test.stem.removeprefix("test_")
            train = place / f"splits/train_{name}.csv"
            if not train.is_file():
                raise ExpressionError(f"{train} is missing: {test.name} does not say what was trained on")
            split = Split(name, _samples(train), _samples(test))
            both = sorted(set(split.train) & set(split.test))
            if both:
                raise ExpressionError(f"{listed(both)} stand both in {train} and in {test.name}")
            splits.append(split)
        genes = place / "var_50genes.json"
        if not genes.is_file():
            raise ExpressionError(f"{genes} is missing: the genes of the task {place.name} are not known")
        found.append(Task(place.name, place, tuple(splits), genes))
    if not found:
        raise ExpressionError(f"there is no task of HEST-Benchmark (<task>/splits/test_<k>.csv) in {folder}")
    return found


def _number(file: Path) -> tuple[int, str]:
    name = file.stem.rpartition("_")[2]
    return (int(name) if name.isdecimal() else 0, name)


def _samples(file: Path) -> tuple[str, ...]:
    table = read_frame(file)
    needed(table, ("sample_id",), file)
    return tuple(dict.fromkeys(table["sample_id"].cast(str)))


def find_hest_bench(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find the samples of all tasks below `folder`. Raises what `tasks_of` raises."""
    tasks = tasks_of(folder)
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError(f"{folder} holds tasks of one name in several places; give the folder of one")
    found = []
    for task in tasks:
        judged = {name: split.name for split in task.splits for name in split.test}
        for name in task.samples:
            patches, counts = task.folder / f"patches/{name}.h5", task.folder / f"adata/{name}.h5ad"
            extra = {"task": task.name, **({"fold": judged[name]} if name in judged else {})}
            found.append(Found(name, partial(_read, name, patches, counts, extra), {"task": task.name}))
        say(f"task {task.name}: {len(task.samples)} samples; --where task={task.name} takes it")
    return found


def _read(name: str, patches: Path, counts: Path, extra: dict[str, str]) -> Section:
    for file in (patches, counts):
        if not file.is_file():
            raise ExpressionError(f"{file} is missing")
    try:
        with opened_h5(patches) as opened:
            image = np.asarray(opened["img"])
            corner = np.asarray(opened["coords"], np.float64)
            barcodes = [_text(each) for each in np.asarray(opened["barcode"]).ravel()]
            side = float(opened["img"].attrs["patch_size_src"])
    except (OSError, KeyError, ValueError) as error:
        raise ExpressionError(
            f"{patches} cannot be read as img, coords, barcode, patch_size_src: {reason_of(error)}"
        ) from error
    if image.shape[1:] != (PATCH, PATCH, 3) or image.dtype != np.uint8:
        raise ExpressionError(f"{patches}: img is {image.shape} {image.dtype}, and n × 224 × 224 × 3 uint8 is expected")
    if not len(image) == len(corner) == len(barcodes) or side <= 0:
        raise ExpressionError(
            f"{patches}: {len(image)} patches, {len(corner)} places and {len(barcodes)} barcodes, {side:g} px each"
        )
    data = read_h5ad(counts)
    place = {_text(barcode): i for i, barcode in enumerate(data.obs_names)}
    kept = [i for i, barcode in enumerate(barcodes) if barcode in place]
    if not kept:
        raise ExpressionError(f"{patches} and {counts} have no spot in common")
    notes = [f"{len(barcodes) - len(kept)} patches without counts left out"] if len(kept) < len(barcodes) else []
    of = data[[place[barcodes[i]] for i in kept]]
    centre: NDArray[np.float64] = corner[kept] + side / 2
    xy, farther = _apart(centre * (PATCH / side))
    if farther > 1:
        notes.append(f"patches put {farther:.2f} times farther apart than they were, so that none covers another")
    made = Made(f"{name}.tif", partial(put_together, xy, image[kept]))
    rows, cols = (whole_numbers(of.obs[key]) if key in of.obs else None for key in ("array_row", "array_col"))
    return Section(
        image=made,
        counts=sp.csr_matrix(of.X),
        barcodes=[barcodes[i] for i in kept],
        genes=[_text(each) for each in of.var_names],
        xy=xy.astype(np.float64),
        array_row=rows,
        array_col=cols,
        patient=str(of.obs["patient"].iloc[0]) if "patient" in of.obs else name,
        mpp=_UM_PER_PX,
        mpp_source="HEST-Benchmark's patches",
        notes=[f"{made.name} put together from its patches", *notes],
        extra=extra,
    )


def _apart(xy: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """Return whole px of patches' centres, farther apart by one factor where two of them would overlap, and that."""
    away = np.asarray(cKDTree(xy).query(xy, k=2, p=np.inf)[0]) if len(xy) > 1 else np.full((1, 2), np.inf)
    nearest = float(away[:, 1].min())
    farther = max(1.0, (PATCH + 2) / nearest) if nearest > 0 else np.inf  # a px for each end that is rounded
    if farther > _FARTHEST:
        raise ExpressionError(f"two patches are {nearest:g} px apart: they are of one place")
    placed = xy * farther
    return np.rint(placed + PATCH - placed.min(0)).astype(np.int64), farther


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
