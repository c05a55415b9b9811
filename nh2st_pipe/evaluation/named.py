"""Figures that papers report besides PCC, MSE and MAE, by name: each with its definition and where it is from.

All take predictions and truth n × G (NaN where the truth is not known) and return one number, None where it is
undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError, nearest, reason_of
from nh2st_pipe.evaluation.metrics import gene_metrics

__all__ = ["NAMED", "Named", "gene_set_pcc", "named", "read_gmt"]

_SOME = 50
_FEWEST_GENES = 2  # of a set


@dataclass(frozen=True)
class Named:
    """A figure."""

    of: Callable[[NDArray[Any], NDArray[Any]], float | None]
    definition: str
    source: str


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _spearman(predicted: NDArray[Any], target: NDArray[Any]) -> float | None:
    from scipy.stats import rankdata

    known = np.isfinite(target)
    masked = np.where(known, predicted, np.nan), np.where(known, target, np.nan)
    ranks = [rankdata(values, axis=0, nan_policy="omit") for values in masked]
    return _mean(gene_metrics(*ranks)["pcc"])


def _of_genes(predicted: NDArray[Any], target: NDArray[Any]) -> float | None:
    return _mean(gene_metrics(predicted, target)["pcc"])


def _of_spots(predicted: NDArray[Any], target: NDArray[Any]) -> float | None:
    return _mean(gene_metrics(predicted.T, target.T)["pcc"])


def _of_most(rank: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[NDArray[Any], NDArray[Any]], float | None]:
    def of(predicted: NDArray[Any], target: NDArray[Any]) -> float | None:
        known = np.flatnonzero(np.isfinite(target).any(axis=0))
        if not len(known):
            return None
        order = known[np.argsort(rank(target[:, known]), kind="stable")[::-1][:_SOME]]
        return _mean(gene_metrics(predicted[:, order], target[:, order])["pcc"])

    return of


NAMED: dict[str, Named] = {
    "spearman": Named(_spearman, "mean over genes of Spearman's rank correlation over spots", "Spearman 1904"),
    "pcc_gene": Named(
        _of_genes,
        "mean over genes of Pearson's correlation over spots: the PCC of every table here",
        "PCC-F, by feature, of SpaRED (Mejia et al. 2024)",
    ),
    "pcc_spot": Named(
        _of_spots,
        "mean over spots of Pearson's correlation over genes: does a spot have the right profile",
        "PCC-P, by patch, of SpaRED (Mejia et al. 2024)",
    ),
    "pcc_heg": Named(
        _of_most(lambda target: np.nanmean(target, axis=0)),
        "mean PCC of the 50 genes with the highest mean of the truth",
        "highly expressed genes, as in TRIPLEX (Chung et al. 2024)",
    ),
    "pcc_hvg": Named(
        _of_most(lambda target: np.nanvar(target, axis=0)),
        "mean PCC of the 50 genes whose truth varies most over the spots",
        "highly variable genes, as in BLEEP (Xie et al. 2023)",
    ),
}


def named(name: str) -> Named:
    """Return the figure called `name`. Raises UsageError where there is none."""
    if name not in NAMED:
        raise UsageError(f"no figure is called '{name}'{nearest(name, NAMED)} (there is {', '.join(NAMED)})")
    return NAMED[name]


def read_gmt(path: Path) -> dict[str, tuple[str, ...]]:
    """Read gene sets of a GMT file: a line each, its name, a description, and its genes, parted by tabs.

    Raises UsageError naming the line that is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as gene sets: {reason_of(error)}") from error
    sets = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\n").split("\t")
        genes = tuple(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not genes:
            raise UsageError(f"{path}, line {number}: a name, a description and genes are expected, parted by tabs")
        if name in sets:
            raise UsageError(f"{path}, line {number}: the set {name} stands twice")
        sets[name] = genes
    if not sets:
        raise UsageError(f"{path} holds no gene sets")
    return sets


def gene_set_pcc(
    predicted: NDArray[Any], target: NDArray[Any], genes: Sequence[str], sets: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """Return for each set the PCC over spots of its mean z-score, each of its genes centred and scaled over the spots.

    Sets of which fewer than two genes are predicted are left out; None is one whose truth does not vary. A program of
    genes is predicted better than its genes are, where their noise is their own.
    """
    place = {gene: i for i, gene in enumerate(genes)}
    found: dict[str, float | None] = {}
    for name, members in sets.items():
        at = [place[gene] for gene in members if gene in place]
        at = [i for i in at if np.isfinite(target[:, i]).all() and np.std(target[:, i]) > 0]
        if len(at) < _FEWEST_GENES:
            continue
        scores = [_score(values[:, at].astype(np.float64)) for values in (predicted, target)]
        value = float(gene_metrics(scores[0][:, None], scores[1][:, None])["pcc"][0])
        found[name] = value if np.isfinite(value) else None
    return found


def _score(values: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = values.std(axis=0)
    z = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    mean: NDArray[np.float64] = z.mean(axis=1)
    return mean
