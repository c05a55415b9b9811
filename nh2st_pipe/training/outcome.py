"""What one head reached: the slides that were judged, fold by fold, and what has to be known of its training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nh2st_pipe.evaluation.judged import Judged
from nh2st_pipe.evaluation.statistics import fold_figures, gene_figures, summary
from nh2st_pipe.training.fold import FoldResult

__all__ = ["Outcome"]


class Outcome:
    """What one head reached, gathered fold by fold. Every figure is made from `slides` by `evaluation.statistics`."""

    def __init__(self) -> None:
        self.slides: list[Judged] = []
        self.folds: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.history: list[dict[str, Any]] = []
        self.notices: list[str] = []
        """What has to be known of how the head was trained."""
        self.cautions: dict[str, str] = {}
        """Why a test slide's prediction should be believed less, by its name."""
        self.unseen: dict[str, list[Judged]] = {}
        """Slides judged by genes that were left out, by what predicted them (`evaluation.unseen`)."""

    def add(self, result: FoldResult) -> None:
        """Take in the judged slides of one test fold."""
        fold = result.fold
        self.slides += result.judged
        for of, judged in result.unseen.items():
            self.unseen.setdefault(of, []).extend(judged)
        figures = {
            "fold": fold.name,
            "test_slides": list(fold.test),
            **fold_figures([each.figures for each in result.judged]),
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

    def per_gene(self, head: str) -> list[dict[str, Any]]:
        """Return one row per gene: its figures over units (`statistics.GeneFigures`), the best PCC first."""
        rows = [{"head": head, **asdict(each)} for each in gene_figures(self.slides)]
        return sorted(rows, key=lambda row: (row["pcc"] is None, -(row["pcc"] or 0.0)))

    def per_slide(self, head: str) -> list[dict[str, Any]]:
        """Return one row per judged slide, or block of one (`judged.SlideFigures`)."""
        return [{"head": head, **asdict(each.figures)} for each in self.slides]

    def likeness(self) -> dict[str, float]:
        """Return the median likeness of each slide to the slides it was held out from, where the head can tell."""
        return {each.name: each.likeness for each in self.slides if each.likeness is not None}

    def record(self) -> dict[str, Any]:
        """Return `summary` (None without folds) and `folds`."""
        seconds = sum(fold["train_seconds"] for fold in self.folds)
        return {"summary": summary([each.figures for each in self.slides], seconds), "folds": self.folds}
