"""One definition of each statement about figures: means over units with their interval, and verdicts between heads.

Unit: the patient where patients are told, else the slide, else the block of the one slide (`judged.units_of`); slides
of one unit are averaged first, for they are not independent.

- Interval of a mean over K units: Student's, at 95 %. A percentile bootstrap cannot draw what it has not seen: with
  four units it excludes the truth in a fifth of all cases.
- Verdict between two heads on the same units: the exact sign-flip test (Fisher 1935) of the mean difference, all 2^K
  assignments of signs, of which 10,000 are drawn where there are more. Its smallest two-sided p is 2 / 2^K: below six
  units no difference, however large, can be told from chance at 5 %.

Letters: K units, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.evaluation.intervals import Intervals, intervals, joined_sketch
from nh2st_pipe.evaluation.judged import Judged, Place, SlideFigures, by_unit, units_of

__all__ = [
    "ALPHA",
    "FEWEST_UNITS",
    "FIGURES",
    "MEANS",
    "GeneFigures",
    "Verdict",
    "figures_from",
    "fold_figures",
    "gene_figures",
    "gene_pcc",
    "headline",
    "intervals_of",
    "many",
    "mean_interval",
    "mean_over_units",
    "over_genes",
    "sign_flip",
    "summary",
    "verdict",
]

ALPHA = 0.05
FEWEST_UNITS = 6
"""Units from which on a difference can be told from chance at 5 %."""

MEANS = ("pcc", "pcc_top50_train", "pcc_top50", "pcc_top50_null", "mse", "mae")
"""A slide's figures that means over units are taken of."""

FIGURES = ("pcc", "pcc_low", "pcc_high", *MEANS[1:], "train_seconds")
"""A head's figures (`summary`) as tables show them, in their order."""

_EXACT_UP_TO = 13  # units: 8,192 assignments of signs
_DRAWN = 10_000
_VALUES_AT_ONCE = 1 << 24


def mean_interval(values: NDArray[Any] | Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean of independent `values`; None for fewer than two that are known."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return None
    half = _students(0.5 + level / 2, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return float(known.mean() - half), float(known.mean() + half)


@cache
def _students(share: float, freedom: int) -> float:
    """Return a quantile of Student's distribution: the same for thousands of genes."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))


def sign_flip(differences: NDArray[Any]) -> NDArray[np.float64]:
    """Return the two-sided p of the mean of paired differences K × G, each of length G: the exact sign-flip test.

    As `scipy.stats.permutation_test((x,), np.mean, permutation_type="samples")`, for all genes with the same signs. A
    unit whose difference is not known takes no part. Beyond 13 units 10,000 assignments are drawn, with a fixed seed,
    and p is (b + 1) / (10,001).
    """
    values = np.nan_to_num(np.asarray(differences, dtype=np.float64))
    k, genes = values.shape
    exact = k <= _EXACT_UP_TO
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(1 << k)[:, None] >> np.arange(k)) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_DRAWN, k))
    out = np.empty(genes)
    step = max(1, _VALUES_AT_ONCE // len(signs))
    for start in range(0, genes, step):
        block = values[:, start : start + step]
        seen = np.abs(block.sum(axis=0))
        reached = (np.abs(signs @ block) >= seen * (1 - 1e-12) - 1e-300).sum(axis=0)
        out[start : start + step] = reached / len(signs) if exact else (reached + 1) / (len(signs) + 1)
    return out


@dataclass(frozen=True)
class Verdict:
    """What can be said of a mean difference over units."""

    mean: float | None
    low: float | None
    """Of Student's 95 % interval; None with a single unit."""
    high: float | None
    p: float | None
    """Of the sign-flip test."""
    ahead: int
    """Units on which the difference is above 0."""
    behind: int
    units: int
    side: Literal["more", "less", "unclear", "few", "undefined"]
    """"more" and "less" where chance is ruled out at 5 %; "few" where there are too few units to rule it out."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def verdict(differences: NDArray[Any]) -> Verdict:
    """Judge paired differences, one per unit; those that are not known are left out."""
    known = np.asarray(differences, dtype=np.float64)
    known = known[np.isfinite(known)]
    k = len(known)
    if not k:
        return Verdict(None, None, None, None, 0, 0, 0, "undefined")
    low, high = mean_interval(known) or (None, None)
    p = float(sign_flip(known[:, None])[0])
    mean = float(known.mean())
    side: Literal["more", "less", "unclear", "few"] = "unclear"
    if k < FEWEST_UNITS:
        side = "few"
    elif p <= ALPHA:
        side = "more" if mean > 0 else "less"
    return Verdict(mean, low, high, p, int((known > 0).sum()), int((known < 0).sum()), k, side)


def fold_figures(slides: Sequence[SlideFigures]) -> dict[str, Any]:
    """Return what slides reached, by slide and then unit: the means, spots, and how many genes have a PCC."""
    _, units = units_of(slides)
    found: dict[str, Any] = {key: _mean([getattr(each, key) for each in slides], units) for key in MEANS}
    found["n_spots"] = sum(each.n_spots for each in slides)
    found["n_genes"] = max((each.n_genes for each in slides), default=0)
    undefined = [each.n_genes_pcc_undefined for each in slides]
    found["n_genes_pcc_undefined"] = max(undefined, default=0)
    found["n_genes_pcc_undefined_least"] = min(undefined, default=0)
    return found


def summary(slides: Sequence[SlideFigures], train_seconds: float = 0.0) -> dict[str, Any] | None:
    """Return what a head reached over all judged slides; None without any.

    Besides the means (`fold_figures`) the `unit` they are over, `n_units`, and `pcc_low` and `pcc_high`, Student's 95 %
    interval of the PCC over units, None for a single one.
    """
    if not slides:
        return None
    unit, units = units_of(slides)
    of_units = by_unit([each.pcc for each in slides], units)
    low, high = mean_interval(of_units) or (None, None)
    return {
        **fold_figures(slides),
        "pcc_low": None if low is None else max(-1.0, low),
        "pcc_high": None if high is None else min(1.0, high),
        "unit": unit,
        "n_units": len(of_units),
        "train_seconds": train_seconds,
    }


def headline(figures: Mapping[str, Any]) -> str:
    """Say a PCC with what it is over: "PCC 0.125 over 28 genes; 222 of 250 do not vary on these spots".

    `figures` are those of `summary` or of a slide; of earlier versions too.
    """
    pcc, low, high = (figures.get(key) for key in ("pcc", "pcc_low", "pcc_high"))
    said = "PCC undefined" if pcc is None else f"PCC {pcc:.3f}"
    if low is not None and high is not None:
        said += f" (95 % interval {low:.3f} to {high:.3f}, over {many(figures['n_units'], figures['unit'])})"
    return f"{said} {over_genes(figures)}"


def over_genes(figures: Mapping[str, Any]) -> str:
    """Say over how many genes a PCC is, and how many have none: "over 28 genes; 222 of 250 do not vary …"."""
    genes, most = figures.get("n_genes") or 0, figures.get("n_genes_pcc_undefined") or 0
    least = figures.get("n_genes_pcc_undefined_least", most)
    if not most:
        return f"over {many(genes, 'gene')}"
    if least == most:
        return f"over {many(genes - most, 'gene')}; {most:,} of {genes:,} do not vary on these spots"
    over = f"over {genes - most:,} to {many(genes - least, 'gene')} a slide"
    return f"{over}; {least:,} to {most:,} of {genes:,} do not vary there"


def many(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def mean_over_units(values: Sequence[float | None], slides: Sequence[Place]) -> float | None:
    """Return the mean over units of the means of their slides' values; None where none is known."""
    return _mean(values, units_of(slides)[1])


def _mean(values: Sequence[float | None], units: Sequence[str]) -> float | None:
    of_units = by_unit(values, units)
    known = of_units[np.isfinite(of_units)]
    return float(known.mean()) if len(known) else None


@dataclass(frozen=True)
class GeneFigures:
    """A gene's figures over units, a row of per_gene.csv; None is undefined."""

    gene: str
    n_folds: int
    n_units: int
    """Units in which it has a PCC."""
    pcc: float | None
    pcc_low: float | None
    """Of Student's 95 % interval over units; None for fewer than two."""
    pcc_high: float | None
    mse: float | None
    mae: float | None
    target_mean: float | None


def gene_matrices(
    slides: Sequence[Judged], *attributes: str
) -> tuple[list[str], list[str], dict[str, NDArray[np.float64]]]:
    """Return genes, units, and by attribute ("pcc", "mse" …) K × G means over each unit's slides of what is known."""
    genes = list(dict.fromkeys(gene for each in slides for gene in each.genes))
    place = {gene: i for i, gene in enumerate(genes)}
    _, unit_of = units_of(slides)
    row = {unit: i for i, unit in enumerate(dict.fromkeys(unit_of))}
    total, count = ({key: np.zeros((len(row), len(genes))) for key in attributes} for _ in range(2))
    for each, unit in zip(slides, unit_of, strict=True):
        columns = np.array([place[gene] for gene in each.genes], dtype=np.int64)
        for key in attributes:
            values = np.asarray(getattr(each, key), dtype=np.float64)
            known = np.isfinite(values)
            total[key][row[unit], columns[known]] += values[known]
            count[key][row[unit], columns[known]] += 1
    with np.errstate(invalid="ignore"):
        means = {key: np.where(count[key] > 0, total[key] / count[key], np.nan) for key in attributes}
    return genes, list(row), means


def gene_pcc(slides: Sequence[Judged]) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return genes, units, and the genes' PCC by unit, K × G: over a slide's spots, then the mean over its unit's."""
    genes, units, means = gene_matrices(slides, "pcc")
    return genes, units, means["pcc"]


def gene_figures(slides: Sequence[Judged]) -> list[GeneFigures]:
    """Return each gene's figures, in the order in which genes first stand."""
    genes, _, means = gene_matrices(slides, "pcc", "mse", "mae", "mean")
    pcc = means["pcc"]
    folds: dict[str, set[str]] = {gene: set() for gene in genes}
    for each in slides:
        for gene in each.genes:
            folds[gene].add(each.fold)
    rows = []
    for i, gene in enumerate(genes):
        known = pcc[np.isfinite(pcc[:, i]), i]
        low, high = mean_interval(known) or (None, None)
        rows.append(
            GeneFigures(
                gene=gene,
                n_folds=len(folds[gene]),
                n_units=len(known),
                pcc=float(known.mean()) if len(known) else None,
                pcc_low=None if low is None else max(-1.0, low),
                pcc_high=None if high is None else min(1.0, high),
                **{
                    name: _known_mean(means[key][:, i])
                    for name, key in (("mse", "mse"), ("mae", "mae"), ("target_mean", "mean"))
                },
            )
        )
    return rows


def _known_mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def intervals_of(slides: Sequence[Judged]) -> Intervals:
    """Return how far predictions were off on what was held out, unit by unit (see `evaluation.intervals`)."""
    unit, units = units_of(slides)
    genes = list(dict.fromkeys(gene for each in slides for gene in each.genes))
    place = {gene: i for i, gene in enumerate(genes)}
    of_unit: dict[str, list[NDArray[np.float32]]] = {name: [] for name in units}
    for each, name in zip(slides, units, strict=True):
        if each.off is not None:
            points = np.full((len(genes), each.off.shape[1]), np.nan, np.float32)
            points[[place[gene] for gene in each.genes]] = each.off
            of_unit[name].append(points)
    return intervals(unit, [joined_sketch(points) for points in of_unit.values() if points], genes)


def figures_from(row: Mapping[str, Any]) -> SlideFigures:
    """Return a slide's figures from a row of per_slide.csv or a run's log, of this version or an earlier one."""
    known = {name: row[name] for name in SlideFigures.__dataclass_fields__ if row.get(name) is not None}
    slide_id = str(known.pop("slide_id"))
    patient = str(known.pop("patient", "") or slide_id)
    block = known.pop("block", None)
    return SlideFigures(slide_id, patient, block=None if block is None else int(block), **known)
