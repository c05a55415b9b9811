"""How good predictions are. PCC is Pearson's correlation of one gene over spots.

Where the truth varies and the prediction does not, it says nothing of the gene and counts as 0; where the truth does
not vary, PCC is undefined, left out of every mean, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gene_metrics", "mean_of", "summarise"]

_TOP = 50
_FLAT = 1e-7  # a spread below this share of the values' size is rounding, not variation


def gene_metrics(predicted: NDArray[Any], target: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return pcc, mse and mae of each gene, each of length G, from n × G values.

    Spots where the target is NaN are left out of their gene; NaN marks what is undefined.
    """
    seen = np.isfinite(target)
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
    pcc[says_nothing] = 0.0
    pcc[undefined | (n < 2)] = np.nan
    return {"pcc": pcc, "mse": mse, "mae": mae}


def summarise(
    predicted: NDArray[Any], target: NDArray[Any], genes: dict[str, NDArray[np.float64]] | None = None
) -> dict[str, Any]:
    """Return the figures of one fold: means over genes; `pcc_top50` is the mean of the 50 best genes.

    A figure that is undefined for every gene is None. `genes` are the genes' own figures, where they are known already.
    """
    genes = gene_metrics(predicted, target) if genes is None else genes
    defined = np.sort(genes["pcc"][np.isfinite(genes["pcc"])])[::-1]
    return {
        "pcc": float(defined.mean()) if len(defined) else None,
        "pcc_top50": float(defined[:_TOP].mean()) if len(defined) else None,
        "mse": _mean(genes["mse"]),
        "mae": _mean(genes["mae"]),
        "n_spots": int(target.shape[0]),
        "n_genes": int(np.isfinite(genes["mse"]).sum()),
        "n_genes_pcc_undefined": int(target.shape[1] - len(defined)),
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def mean_of(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over folds of every figure that is a mean, and the sum of spots and seconds.

    `pcc_sd` is the standard deviation of PCC over folds, None where fewer than two have one.
    """
    summary: dict[str, Any] = {}
    for key in ("pcc", "pcc_top50", "mse", "mae"):
        values = [fold[key] for fold in folds if fold[key] is not None]
        summary[key] = float(np.mean(values)) if values else None
    pcc = [fold["pcc"] for fold in folds if fold["pcc"] is not None]
    summary["pcc_sd"] = float(np.std(pcc, ddof=1)) if len(pcc) > 1 else None
    summary["n_spots"] = sum(fold["n_spots"] for fold in folds)
    summary["n_genes"] = round(float(np.mean([fold["n_genes"] for fold in folds]))) if folds else 0
    summary["train_seconds"] = sum(fold["train_seconds"] for fold in folds)
    return summary
