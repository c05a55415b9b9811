"""How far a prediction may be off on a slide of someone new: intervals from what was held out.

Spots of one slide are alike, so the unit is a patient or a slide, and not the spot. The half width at a level is that
quantile of the absolute residuals of all K units together, each unit weighing as much: one rule at every level, so that
no interval at a higher level is narrower. They are the residuals of heads that left a unit out, put around the
prediction of a head that left none out, as the jackknife does; nothing is promised of them but what was found: the
coverage.

Coverage: each unit's residuals against the width that the other units give. With K − 1 units the shortfall below the
level is larger than with the K that are delivered. It lies, to first order in 1/K, between none where units are alike
and level / (units + 1) where each has a size of its own; in both it is K / (K + 1) as large with K units, by which it
is corrected. Above K / (K + 1) not even a unit beyond all others would be covered often enough: such a level is marked
as not promised (compare hierarchical conformal prediction: Lee, Barber & Willett, arXiv 2306.06342).

Letters: K units, G genes, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LEVELS", "POINTS", "Intervals", "Level", "intervals", "joined_sketch", "sketch"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
POINTS = 200
"""P, where it is not said otherwise."""

_POINTS_AT_ONCE = 1 << 22


class Level(BaseModel):
    """Intervals at one level."""

    model_config = ConfigDict(frozen=True)
    half_width: dict[str, float]
    """Gene → how far above and below a prediction its interval reaches."""
    coverage: float | None
    """Share of a new unit's values that they cover, found by leaving one unit out; None with a single unit."""
    promised: bool
    """Whether there are enough units for the level to be promised at all."""


class Intervals(BaseModel):
    """Intervals at several levels."""

    model_config = ConfigDict(frozen=True)
    by: str = ""
    """What the units are: patient, slide or block."""
    groups: int = 0
    """How many there are."""
    levels: dict[str, Level] = Field(default_factory=dict)
    """Level, as "0.9"."""


def sketch(residuals: NDArray[Any], points: int = POINTS) -> NDArray[np.float32]:
    """Return G × P quantiles of the absolute residuals n × G, which stand for them; NaN for genes without any."""
    at = (np.arange(points) + 0.5) / points
    out = np.full((residuals.shape[1], points), np.nan, np.float32)
    known = np.isfinite(residuals)
    whole = known.all(axis=0) & (len(residuals) > 0)
    if whole.any():
        out[whole] = np.quantile(np.abs(residuals[:, whole]), at, axis=0).T
    for i in np.flatnonzero(~whole & known.any(axis=0)):
        out[i] = np.quantile(np.abs(residuals[known[:, i], i]), at)
    return out


def joined_sketch(sketches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return one sketch G × P of several slides', each weighing as much."""
    if len(sketches) == 1:
        return sketches[0]
    return sketch(np.concatenate(sketches, axis=1).T, sketches[0].shape[1])


def intervals(by: str, units: Sequence[NDArray[np.float32]], genes: Sequence[str]) -> Intervals:
    """Return intervals of `genes` from the sketches G × P of units that were held out; NaN where one lacks a gene.

    Time and memory grow linearly with the units.
    """
    if not units:
        return Intervals()
    k = len(units)
    widths = np.full((len(LEVELS), len(genes)), np.nan)
    covered, counted = np.zeros((len(LEVELS), k)), np.zeros(k)
    step = max(1, _POINTS_AT_ONCE // (k * units[0].shape[1]))
    for start in range(0, len(genes), step):
        block = slice(start, min(start + step, len(genes)))
        points = np.stack([unit[block] for unit in units], axis=1)  # G × K × P
        known: NDArray[np.bool_] = np.asarray(np.isfinite(points).all(axis=2))
        _of_block(points, known, widths[:, block], covered)
        counted += (known & (known.sum(axis=1) > 1)[:, None]).sum(axis=0)
    levels = {}
    for level, width, of_units in zip(LEVELS, widths, covered, strict=True):
        of_genes = {gene: round(float(w), 6) for gene, w in zip(genes, width, strict=True) if np.isfinite(w)}
        coverage = None
        if (counted > 0).any():
            left_out = float(np.mean(of_units[counted > 0] / counted[counted > 0]))
            coverage = level - (level - left_out) * k / (k + 1)
        promised = level * (k + 1) <= k + 1e-9
        levels[f"{level:g}"] = Level(half_width=of_genes, coverage=coverage, promised=promised)
    return Intervals(by=by, groups=k, levels=levels)


def _of_block(
    points: NDArray[np.float32], known: NDArray[np.bool_], widths: NDArray[np.float64], covered: NDArray[np.float64]
) -> None:
    """Fill in the widths (levels × G) of a block of genes, G × K × P points, and add to `covered` (levels × K) the
    share of each unit's points that the width made of the other units reaches.

    A single sort does for all units: of a gene's points in order, the r-th of those that are not of unit u stands at
    r + m, where m are the points of u before it; and m of P is just what it covers.
    """
    genes, k, each = points.shape
    flat = np.where(known[:, :, None], points, np.inf).reshape(genes, k * each)
    order = np.argsort(flat, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(k * each)[None], axis=1)
    # Of each point, how many points of other units stand before it; the points of a unit are in order already.
    others_before = np.sort(rank.reshape(genes, k, each), axis=2) - np.arange(each)
    have = known.sum(axis=1)
    gene = np.arange(genes)
    for row, level in enumerate(LEVELS):
        at = _at(level, have * each)
        value = flat[gene, order[gene, np.maximum(at, 0)]]
        widths[row] = np.where(have > 0, value, np.nan)
        without = _at(level, np.maximum(have - 1, 1) * each)
        reached = (others_before <= without[:, None, None]).mean(axis=2)
        covered[row] += np.where(known & (have > 1)[:, None], reached, 0.0).sum(axis=0)


def _at(level: float, n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place (from 0) of a level's quantile among n points: the smallest that has that share up to it."""
    return np.ceil(np.round(level * n, 6)).astype(np.int64) - 1
