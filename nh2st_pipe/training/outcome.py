"""What one head reached, fold by fold."""

from __future__ import annotations

from typing import Any

import numpy as np

from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of, summarise
from nh2st_pipe.training.fold import FoldResult

__all__ = ["Outcome"]


class Outcome:
    """What one head reached, fold by fold."""

    def __init__(self) -> None:
        self.folds: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.history: list[dict[str, Any]] = []
        self.notices: list[str] = []
        """What has to be known of how the head was trained."""
        self.cautions: dict[str, str] = {}
        """Why a test slide's prediction should be believed less, by slide_id."""
        self._genes: dict[str, list[dict[str, float]]] = {}
        self._slides: list[dict[str, Any]] = []

    def add(
        self,
        result: FoldResult,
    ) -> None:
        """Judge the predictions of one test fold, its spots pooled."""
        fold, predicted, target = result.fold, result.predicted, result.target
        p = np.concatenate([predicted[name].values for name in fold.test])
        t = np.concatenate([target[name] for name in fold.test])
        figures = {
            "fold": fold.name,
            "test_slides": list(fold.test),
            **summarise(p, t),
            "train_seconds": result.train_seconds,
        }
        if result.best_epoch:
            figures["epochs"] = result.best_epoch
            self.epochs.append(result.best_epoch)
        if result.chosen:
            figures["chosen"] = result.chosen
        self.folds.append(figures)
        self.cautions |= result.cautions
        if result.notice:
            self.notices.append(f"{result.head}, {fold.name}: {result.notice}")
        self.history += [{"fold": fold.name, **row} for row in result.history]
        by_gene = gene_metrics(p, t)
        for i, gene in enumerate(result.panel):
            row = {key: float(values[i]) for key, values in by_gene.items()}
            row["target_mean"] = float(np.mean(t[:, i])) if len(t) else float("nan")
            self._genes.setdefault(gene, []).append(row)
        for name in fold.test:
            row = summarise(predicted[name].values, target[name])
            like = predicted[name].likeness
            likeness = None if like is None else float(np.median(like))
            place = {"fold": fold.name, "slide_id": name, "patient": result.patients[name]}
            self._slides.append({**place, **row, "likeness": likeness})

    def per_gene(self, head: str) -> list[dict[str, Any]]:
        """Return one row per gene: the number of folds it was in, and means over those where it is defined."""
        rows = []
        for gene, folds in self._genes.items():
            row: dict[str, Any] = {"head": head, "gene": gene, "n_folds": len(folds)}
            for key in folds[0]:
                values = [fold[key] for fold in folds if np.isfinite(fold[key])]
                row[key] = float(np.mean(values)) if values else None
            rows.append(row)
        return sorted(rows, key=lambda row: (row["pcc"] is None, -(row["pcc"] or 0.0)))

    def per_slide(self, head: str) -> list[dict[str, Any]]:
        """Return one row per test slide."""
        return [{"head": head, **row} for row in self._slides]

    def likeness(self) -> dict[str, float]:
        """Return the median likeness of each slide to the slides it was held out from, where the head can tell."""
        return {row["slide_id"]: row["likeness"] for row in self._slides if row["likeness"] is not None}

    def record(self) -> dict[str, Any]:
        """Return `summary` (None without folds) and `folds`."""
        return {"summary": mean_of(self.folds) if self.folds else None, "folds": self.folds}
