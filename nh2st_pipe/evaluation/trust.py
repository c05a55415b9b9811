"""Which genes are predicted usefully well on slides that a head has not seen: a verdict on each, and what it rests on.

A gene is trusted where chance is ruled out that its PCC lies below a useful bound, with 5 % of the genes that are named
being wrong at most (Benjamini & Hochberg 1995), and its PCC is not worse than ridge-context's by the sign-flip verdict.
The p of a gene is the larger of two, one-sided: Student's over units, of Fisher's z of the PCC against that of the
bound; and the normal tail of what the mean PCC has above the bound, in standard deviations of a mean without any tie
(`evaluation.null`): with few units their spread can be small by chance, while that of unrelated maps is known from
many moves. A gene with a PCC on fewer than three units is not judged, which is no verdict either way.

Letters: K units, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.evaluation.judged import Judged, units_of
from nh2st_pipe.evaluation.statistics import ALPHA, gene_pcc, sign_flip

__all__ = ["FEWEST_UNITS_OF_A_GENE", "USEFUL", "Trust", "trust", "trusted_p"]

USEFUL = 0.2
"""PCC from which on a gene's map says something: half of what is good is still far above it."""

FEWEST_UNITS_OF_A_GENE = 3

_LARGEST = 1 - 1e-7  # Fisher's z of 1 is infinite
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Trust:
    """The verdicts."""

    unit: str = "slide"
    units: int = 0
    bound: float = USEFUL
    rival: str | None = None
    """The head that a trusted gene is not predicted worse than by; None where it was not among the baselines."""
    verdicts: dict[str, bool] = field(default_factory=dict)
    """Gene → whether it is trusted; genes that were not judged are not in it."""

    def words(self) -> str:
        """Say what the verdict means, as a clause."""
        than = (
            f", and {self.rival} is not better beyond chance"
            if self.rival is not None
            else "; no baseline was there to hold them against"
        )
        return (
            f"on {self.units} {self.unit}s held out, chance is ruled out that their PCC is below {self.bound:g} (of "
            f"those named {ALPHA:.0%} at most are wrong on average){than}"
        )


def trust(
    slides: Sequence[Judged], rival: Sequence[Judged] | None = None, *, bound: float = USEFUL, rival_name: str = ""
) -> Trust:
    """Return the verdicts on the genes of `slides` that were held out; `rival` are the same of another head.

    Empty where there are fewer than three units.
    """
    if not slides:
        return Trust(bound=bound)
    unit, _ = units_of(slides)
    genes, units, pcc = gene_pcc(slides)
    spread = _null_spread(slides, genes)
    p = trusted_p(pcc, spread, bound)
    judged = np.isfinite(p)
    good = np.zeros(len(genes), np.bool_)
    if judged.any():
        from scipy.stats import false_discovery_control

        good[judged] = false_discovery_control(p[judged]) <= ALPHA
    if rival and good.any():
        theirs_of, their_units, theirs = gene_pcc(rival)
        place = {gene: i for i, gene in enumerate(theirs_of)}
        both = np.array([i for i in np.flatnonzero(good) if genes[i] in place], dtype=np.int64)
        mine = [i for i, each in enumerate(units) if each in their_units]  # joined by name, in whatever order
        if len(both) and mine:
            rows = [their_units.index(units[i]) for i in mine]
            apart = pcc[mine][:, both] - theirs[rows][:, [place[genes[i]] for i in both]]
            good[both[(sign_flip(apart) <= ALPHA) & (np.nan_to_num(apart).sum(axis=0) < 0)]] = False
    verdicts = {genes[i]: bool(good[i]) for i in np.flatnonzero(judged)}
    return Trust(unit, len(pcc), bound, (rival_name or None) if rival else None, verdicts)


def trusted_p(pcc: NDArray[np.float64], spread: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """Return each gene's one-sided p that its PCC over units, K × G, is not above `bound`; NaN where it is not judged.

    `spread` (G) is the standard deviation of a unit's PCC without any tie.
    """
    from scipy.stats import norm, t

    known = np.isfinite(pcc)
    k = known.sum(axis=0)
    judged = (k >= FEWEST_UNITS_OF_A_GENE) & np.isfinite(spread)
    some = np.maximum(k, 2)
    z = np.where(known, np.arctanh(np.clip(pcc, -_LARGEST, _LARGEST)), 0.0)
    mean_z = z.sum(axis=0) / some
    sd = np.sqrt(np.where(known, (z - mean_z) ** 2, 0.0).sum(axis=0) / (some - 1))
    student = t.sf((mean_z - np.arctanh(bound)) / (np.maximum(sd, _SMALLEST_SPREAD) / np.sqrt(some)), some - 1)
    mean = np.where(known, pcc, 0.0).sum(axis=0) / some
    null = norm.sf((mean - bound) / (np.maximum(spread, _SMALLEST_SPREAD) / np.sqrt(some)))
    return np.where(judged, np.maximum(student, null), np.nan)


def _null_spread(slides: Sequence[Judged], genes: list[str]) -> NDArray[np.float64]:
    """Return the root mean square of each gene's PCC without any tie, over slides; NaN where none is known.

    The mean over slides, and so not less where a patient has several: they may be wrong together.
    """
    place = {gene: i for i, gene in enumerate(genes)}
    squares, count = np.zeros(len(genes)), np.zeros(len(genes))
    for each in slides:
        known = np.isfinite(each.null_spread)
        at = np.array([place[gene] for gene in each.genes], dtype=np.int64)[known]
        squares[at] += np.square(each.null_spread[known])
        count[at] += 1
    mean: NDArray[np.float64] = np.divide(squares, count, out=np.full(len(genes), np.nan), where=count > 0)
    return np.sqrt(mean)
