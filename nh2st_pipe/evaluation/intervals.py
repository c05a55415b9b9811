"""How far a prediction may be off on a slide of someone new: intervals from what was held out.

Spots of one slide are alike, so the unit is the group that was held out, a patient or a slide, and not the spot. With K
groups, each group's absolute residuals weigh 1/(K + 1) together, and 1/(K + 1) lies at infinity; the half width at a
level is that quantile (hierarchical conformal prediction: Lee, Barber, Willett, arXiv 2306.06342). An interval then
covers a spot of a new group with at least that probability, if groups are exchangeable. Above K/(K + 1) no finite
interval does: the quantile of the residuals alone is given then, without the promise.

Letters: K groups, G genes, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LEVELS", "Intervals", "Level", "intervals", "mean_interval", "sketch"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
_POINTS = 200


class Level(BaseModel):
    """Intervals at one level."""

    model_config = ConfigDict(frozen=True)
    half_width: dict[str, float]
    """Gene → how far above and below a prediction its interval reaches."""
    coverage: float | None
    """Share of the held-out values that intervals made from the other groups cover; None with a single group."""
    promised: bool
    """Whether there are enough groups for the level to hold on a new one."""


class Intervals(BaseModel):
    """Intervals at several levels."""

    model_config = ConfigDict(frozen=True)
    by: str = ""
    """What was held out: patient, slide or block."""
    groups: int = 0
    levels: dict[str, Level] = Field(default_factory=dict)
    """Level, as "0.9"."""


def sketch(residuals: NDArray[Any]) -> NDArray[np.float32]:
    """Return G × P quantiles of the absolute residuals n × G, which stand for them; NaN for genes without any."""
    at = (np.arange(_POINTS) + 0.5) / _POINTS
    out = np.full((residuals.shape[1], _POINTS), np.nan, np.float32)
    known = np.isfinite(residuals).any(axis=0)
    if known.any():
        out[known] = np.nanquantile(np.abs(residuals[:, known]), at, axis=0).T
    return out


def intervals(by: str, groups: Sequence[NDArray[np.float32]], genes: Sequence[str]) -> Intervals:
    """Return intervals of `genes` from the sketches G × P of groups that were held out."""
    if not groups:
        return Intervals()
    levels = {}
    for level in LEVELS:
        width, promised = _half_width(groups, level)
        covered = list[float]()
        for i, own in enumerate(groups):
            others = [*groups[:i], *groups[i + 1 :]]
            if not others:
                continue
            reach, _ = _half_width(others, level)
            known = np.isfinite(own).all(axis=1) & np.isfinite(reach)
            if known.any():
                covered.append(float(np.mean(own[known] <= reach[known, None])))
        coverage = float(np.mean(covered)) if covered else None
        of_genes = {gene: round(float(w), 6) for gene, w in zip(genes, width, strict=True) if np.isfinite(w)}
        levels[f"{level:g}"] = Level(half_width=of_genes, coverage=coverage, promised=promised)
    return Intervals(by=by, groups=len(groups), levels=levels)


def _half_width(groups: Sequence[NDArray[np.float32]], level: float) -> tuple[NDArray[np.float64], bool]:
    """Return each gene's half width, NaN where no group has it, and whether the level is kept for all others."""
    points = np.sort(np.concatenate(groups, axis=1), axis=1)  # NaN last
    k = np.isfinite(np.stack(groups)).all(axis=2).sum(axis=0)
    kept = np.ceil(np.round(level * (k + 1) * _POINTS, 6)).astype(int)
    most = k * _POINTS
    promised = bool((kept <= most)[k > 0].all()) if (k > 0).any() else False
    row = np.where(kept <= most, kept, np.ceil(np.round(level * most, 6)).astype(int)) - 1
    width = points[np.arange(len(points)), np.clip(row, 0, points.shape[1] - 1)].astype(np.float64)
    return np.where(k > 0, width, np.nan), promised


def mean_interval(by_group: Mapping[str, Sequence[float]], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean over groups of each group's mean; None for fewer than two groups."""
    known = ([each for each in values if np.isfinite(each)] for values in by_group.values())
    means = [np.mean(values) for values in known if values]
    if len(means) < 2:
        return None
    half = _students(0.5 + level / 2, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means))
    return max(-1.0, float(np.mean(means) - half)), min(1.0, float(np.mean(means) + half))


@cache
def _students(share: float, freedom: int) -> float:
    """Return a quantile of Student's distribution: the same for thousands of genes."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))
