"""How good predictions are. PCC is Pearson's correlation of one gene over the spots of one slide.

Where the truth varies and the prediction does not, or is not a number, it says nothing of the gene and counts as 0;
where the truth does not vary, PCC is undefined, left out of every mean, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOP", "gene_metrics", "mean_of_known", "mean_pcc", "top_mean"]

TOP = 50
_FLAT = 1e-7  # a spread below this share of the values' size is rounding, not variation


def gene_metrics(predicted: NDArray[Any], target: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return pcc, mse and mae of each gene, each of length G, from n × G values.

    Spots where the target is NaN are left out of their gene; NaN marks what is undefined. A gene with a prediction that
    is not a number has a PCC of 0, and errors over the other spots.
    """
    known = np.isfinite(target)
    finite = np.isfinite(predicted)
    seen = known & finite
    lost = (known & ~finite).any(axis=0)
    n = seen.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(seen, predicted, 0.0).astype(np.float64)
        t = np.where(seen, target, 0.0).astype(np.float64)
        mse = np.where(seen, (p - t) ** 2, 0.0).sum(axis=0) / n
        mae = np.where(seen, np.abs(p - t), 0.0).sum(axis=0) / n
        mean_p, mean_t = p.sum(axis=0) / n, t.sum(axis=0) / n
        dp, dt = np.where(seen, p - mean_p, 0.0), np.where(seen, t - mean_t, 0.0)
        spread_p, spread_t = np.sqrt((dp**2).sum(axis=0) / n), np.sqrt((dt**2).sum(axis=0) / n)
        pcc = (dp * dt).sum(axis=0) / n / (spread_p * spread_t)
        says_nothing = spread_p <= _FLAT * np.maximum(np.abs(mean_p), 1)
        undefined = spread_t <= _FLAT * np.maximum(np.abs(mean_t), 1)
    if lost.any():
        says_nothing |= lost
        undefined[lost], n[lost] = _flat(target[:, lost]), known[:, lost].sum(axis=0)
    pcc[says_nothing] = 0.0
    pcc[undefined | (n < 2)] = np.nan
    return {"pcc": pcc, "mse": mse, "mae": mae}


def _flat(target: NDArray[Any]) -> NDArray[np.bool_]:
    """Return whether the known values of each gene do not vary."""
    found = np.ones(target.shape[1], dtype=np.bool_)
    for i in range(target.shape[1]):
        values = target[np.isfinite(target[:, i]), i].astype(np.float64)
        found[i] = not len(values) or values.std() <= _FLAT * max(abs(values.mean()), 1)
    return found


def mean_of_known(values: NDArray[np.float64]) -> float | None:
    """Return the mean of what is defined; None where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def mean_pcc(predicted: NDArray[Any], target: NDArray[Any], slides: Sequence[slice]) -> float | None:
    """Return the mean over slides, each some rows of n × G, of their mean PCC over genes; None if undefined."""
    found = [mean_of_known(gene_metrics(predicted[rows], target[rows])["pcc"]) for rows in slides or [slice(None)]]
    known = [pcc for pcc in found if pcc is not None]
    return float(np.mean(known)) if known else None


def top_mean(pcc: NDArray[np.float64]) -> float | None:
    """Return the mean of the 50 best genes *by these very values*, as papers report it; None where none is defined."""
    return mean_of_known(np.sort(pcc[np.isfinite(pcc)])[::-1][:TOP])
