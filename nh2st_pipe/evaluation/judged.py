"""A slide that was held out, judged: what every figure of a run is made from, by pure functions.

Letters: n spots, G genes of the slide's panel, P points of a sketch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.names import part_name
from nh2st_pipe.evaluation.intervals import POINTS, sketch
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of_known, top_mean
from nh2st_pipe.evaluation.null import moved_pcc

__all__ = ["Judged", "Place", "SlideFigures", "by_unit", "judge", "units_of"]


class Place(Protocol):
    """What says which unit a judged slide is of."""

    @property
    def slide_id(self) -> str:
        """The slide."""
        ...

    @property
    def patient(self) -> str:
        """Its patient; the slide's own name where none is told."""
        ...

    @property
    def block(self) -> int | None:
        """Which block of the slide was held out; None for all of it."""
        ...


@dataclass(frozen=True)
class SlideFigures:
    """A judged slide's figures, a row of per_slide.csv; None is undefined."""

    slide_id: str
    patient: str
    fold: str = ""
    block: int | None = None
    pcc: float | None = None
    """Mean over the genes whose truth varies."""
    pcc_top50: float | None = None
    """Mean of the 50 best genes, chosen by these very PCCs, as papers report it."""
    pcc_top50_null: float | None = None
    """What that is where predictions have no tie to the truth; see `evaluation.null`."""
    pcc_top50_train: float | None = None
    """Mean over 50 genes that were chosen on training slides."""
    mse: float | None = None
    mae: float | None = None
    n_spots: int = 0
    n_genes: int = 0
    """Genes of the panel that the slide has."""
    n_genes_pcc_undefined: int = 0
    """Of these, how many have no PCC, since their truth does not vary here."""
    likeness: float | None = None

    @property
    def name(self) -> str:
        """The slide's, with the number of the block where it is one."""
        return part_name(self.slide_id, self.block)


@dataclass(frozen=True)
class Judged:
    """A slide, or a block of one, that was held out, and what its prediction reached."""

    slide_id: str
    patient: str
    fold: str
    block: int | None
    genes: tuple[str, ...]
    n_spots: int
    pcc: NDArray[np.float64]
    """G: NaN where the truth does not vary."""
    mse: NDArray[np.float64]
    mae: NDArray[np.float64]
    mean: NDArray[np.float64]
    """G: of the truth; NaN where the slide lacks the gene."""
    picked: NDArray[np.int64]
    """Places of the genes that were chosen on training slides."""
    null_spread: NDArray[np.float64]
    """G: root mean square of the PCC with the truth moved away (`evaluation.null`); NaN where there is none."""
    null_top50: float | None
    """Mean of the 50 best genes with the truth moved away."""
    off: NDArray[np.float32] | None
    """G × P: how far predictions were off (`intervals.sketch`); None where it is not kept."""
    likeness: float | None = None

    @property
    def name(self) -> str:
        """The slide's, with the number of the block where it is one."""
        return part_name(self.slide_id, self.block)

    @cached_property
    def figures(self) -> SlideFigures:
        """The slide's figures, means over genes."""
        return SlideFigures(
            slide_id=self.slide_id,
            patient=self.patient,
            fold=self.fold,
            block=self.block,
            pcc=mean_of_known(self.pcc),
            pcc_top50=top_mean(self.pcc),
            pcc_top50_null=self.null_top50,
            pcc_top50_train=mean_of_known(self.pcc[self.picked]),
            mse=mean_of_known(self.mse),
            mae=mean_of_known(self.mae),
            n_spots=self.n_spots,
            n_genes=int(np.isfinite(self.mean).sum()),
            n_genes_pcc_undefined=int((np.isfinite(self.mean) & ~np.isfinite(self.pcc)).sum()),
            likeness=self.likeness,
        )


def judge(
    predicted: NDArray[np.float32],
    target: NDArray[np.float32],
    xy: NDArray[np.float64],
    *,
    slide_id: str,
    patient: str,
    genes: Iterable[str],
    fold: str = "",
    block: int | None = None,
    picked: NDArray[np.int64] | None = None,
    points: int = POINTS,
    likeness: float | None = None,
) -> Judged:
    """Hold predictions n × G of the spots at `xy` (n × 2) against the truth n × G, NaN where that is not known.

    How far they are off is kept as `points` quantiles of each gene; 0 keeps nothing of it.
    """
    found = gene_metrics(predicted, target)
    known = np.isfinite(target)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, target, 0.0).sum(axis=0, dtype=np.float64) / known.sum(axis=0)
    # The same moves for every head, whatever order slides are judged in.
    null = moved_pcc(predicted, target, xy, zlib.crc32(f"{slide_id} {block}".encode()))
    tops = [top for row in null.astype(np.float64) if (top := top_mean(row)) is not None]
    moved = np.isfinite(null)
    squares = np.square(np.where(moved, null, 0.0)).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(squares / np.where(moved.any(axis=0), moved.sum(axis=0), np.nan))
    return Judged(
        slide_id=slide_id,
        patient=patient,
        fold=fold,
        block=block,
        genes=tuple(genes),
        n_spots=len(target),
        pcc=found["pcc"],
        mse=found["mse"],
        mae=found["mae"],
        mean=mean,
        picked=np.empty(0, np.int64) if picked is None else picked,
        null_spread=spread,
        null_top50=float(np.mean(tops)) if tops else None,
        off=sketch(predicted - target, points) if points else None,
        likeness=likeness,
    )


def units_of(slides: Sequence[Place]) -> tuple[str, list[str]]:
    """Return what the units of judged slides are, "patient", "slide" or "block", and the unit of each.

    Patients where several are told apart from slides, else slides where there are several, else blocks of the one
    slide.
    """
    patients = {each.patient for each in slides}
    if len(patients) > 1 and any(each.patient not in ("", each.slide_id) for each in slides):
        return "patient", [each.patient for each in slides]
    if len({each.slide_id for each in slides}) > 1 or all(each.block is None for each in slides):
        return "slide", [each.slide_id for each in slides]
    return "block", [part_name(each.slide_id, each.block) for each in slides]


def by_unit(values: Sequence[float | None], units: Sequence[str]) -> NDArray[Any]:
    """Return the mean of what is known of each unit, in the order in which units first stand; NaN where nothing is."""
    of: dict[str, list[float]] = {unit: [] for unit in units}
    for unit, value in zip(units, values, strict=True):
        if value is not None and np.isfinite(value):
            of[unit].append(float(value))
    return np.array([np.mean(known) if known else np.nan for known in of.values()])
