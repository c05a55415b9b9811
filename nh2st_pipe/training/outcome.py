"""What one head reached, fold by fold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.evaluation.intervals import Intervals, intervals, mean_interval, sketch
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of, summarise
from nh2st_pipe.training.fold import FoldResult

__all__ = ["Outcome"]


class Outcome:
    """What one head reached, fold by fold; with `keep_off` also how far off it was, by slide and gene."""

    def __init__(self, keep_off: bool = True) -> None:
        self._keep_off = keep_off
        self.folds: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.history: list[dict[str, Any]] = []
        self.notices: list[str] = []
        """What has to be known of how the head was trained."""
        self.cautions: dict[str, str] = {}
        """Why a test slide's prediction should be believed less, by slide_id."""
        self._genes: dict[str, list[dict[str, float]]] = {}
        self._slides: list[dict[str, Any]] = []
        self._off: list[NDArray[np.float32]] = []
        """Of each test slide, by gene, how far it was off (`sketch`)."""
        self._pcc: list[tuple[str, str, list[str], NDArray[np.float64]]] = []
        """Of each test slide: its name and patient, its genes and their PCC."""

    def add(
        self,
        result: FoldResult,
    ) -> None:
        """Judge the predictions of one test fold, its spots pooled."""
        fold, predicted, target = result.fold, result.predicted, result.target
        p = np.concatenate([predicted[name].values for name in fold.test])
        t = np.concatenate([target[name] for name in fold.test])
        by_gene = gene_metrics(p, t)
        figures = {
            "fold": fold.name,
            "test_slides": list(fold.test),
            **summarise(p, t, by_gene),
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
        for i, gene in enumerate(result.panel):
            row = {key: float(values[i]) for key, values in by_gene.items()}
            row["target_mean"] = float(np.mean(t[:, i])) if len(t) else float("nan")
            self._genes.setdefault(gene, []).append(row)
        for name in fold.test:
            if self._keep_off:
                self._off.append(sketch(predicted[name].values - target[name]))
            of_slide = gene_metrics(predicted[name].values, target[name])
            self._pcc.append((name, result.patients[name], list(result.panel), of_slide["pcc"]))
            row = summarise(predicted[name].values, target[name], of_slide)
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

    def _held_out(self) -> tuple[str, dict[str, list[int]]]:
        """Return what was held out, and the rows of `_pcc` of each: patients where there are several and all slides of
        one were held out together, else slides.
        """
        of_patients, of_slides = dict[str, list[int]](), dict[str, list[int]]()
        folds = {row["slide_id"]: row["fold"] for row in self._slides}
        whole = {(patient, folds[name]) for name, patient, *_ in self._pcc}
        for i, (name, patient, *_) in enumerate(self._pcc):
            of_patients.setdefault(patient, []).append(i)
            of_slides.setdefault(name, []).append(i)
        if 1 < len(of_patients) == len(whole):
            return "patient", of_patients
        return "block" if any("#" in name for name in of_slides) else "slide", of_slides

    def intervals(self) -> Intervals:
        """Return how far predictions were off on what was held out (see `evaluation.intervals`)."""
        by, groups = self._held_out()
        genes = list(dict.fromkeys(gene for _, _, panel, _ in self._pcc for gene in panel))
        place = {gene: i for i, gene in enumerate(genes)}
        found = []
        for rows in groups.values():
            points = np.full((len(genes), len(rows), self._off[0].shape[1]), np.nan, np.float32)
            for j, i in enumerate(rows):
                points[[place[gene] for gene in self._pcc[i][2]], j] = self._off[i]
            found.append(points[:, 0] if len(rows) == 1 else sketch(points.reshape(len(genes), -1).T))
        return intervals(by, found, genes)

    def pcc_intervals(self) -> dict[str, tuple[float, float] | None]:
        """Return each gene's PCC as an interval over what was held out, at 95 %; None where there is a single one."""
        return {gene: mean_interval(values) for gene, values in self._pcc_by_group().items()}

    def pcc_against(self, rival: Outcome) -> dict[str, tuple[float, float] | None]:
        """Return each gene's PCC less the rival's on the same slides, as `pcc_intervals`; undefined ones count as 0."""
        theirs = rival._pcc_by_group()
        found = {}
        for gene, groups in self._pcc_by_group().items():
            other = theirs.get(gene, {})
            apart = {
                group: (np.nan_to_num(values) - np.nan_to_num(other[group])).tolist()
                for group, values in groups.items()
                if group in other
            }
            found[gene] = mean_interval(apart)
        return found

    def _pcc_by_group(self) -> dict[str, dict[str, list[float]]]:
        """Return each gene's PCCs by what was held out, slide by slide."""
        _, groups = self._held_out()
        of_gene = dict[str, dict[str, list[float]]]()
        for group, rows in groups.items():
            for i in rows:
                for gene, value in zip(self._pcc[i][2], self._pcc[i][3], strict=True):
                    of_gene.setdefault(gene, {}).setdefault(group, []).append(float(value))
        return of_gene

    def record(self) -> dict[str, Any]:
        """Return `summary` (None without folds) and `folds`."""
        return {"summary": mean_of(self.folds) if self.folds else None, "folds": self.folds}
