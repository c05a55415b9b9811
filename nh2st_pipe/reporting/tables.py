"""The tables of a report: heads, genes, training."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.evaluation.statistics import FIGURES

__all__ = ["HALVES", "GeneTable", "add_moran", "heads_of", "history_of", "number", "table"]

HALVES = "PCC between halves of the training tissue: the better guide to a new slide"


@dataclass
class GeneTable:
    """The gene table by column; a gene has None where a column does not know it."""

    names: list[str]
    columns: list[dict[str, Any]] = field(default_factory=list)
    """key, label, what it is in words, digits, and values by gene."""
    trusted: Mapping[str, bool] = field(default_factory=dict)
    """Gene → verdict; those that were not judged are not in it."""
    sort: str = "cv_pcc"
    """Key of the column by which the table is sorted at first, falling."""

    def __post_init__(self) -> None:
        self.place = {name: i for i, name in enumerate(self.names)}

    def column(
        self,
        key: str,
        label: str,
        words: str,
        values: Mapping[str, float | None],
        digits: int = 3,
        *,
        bar: bool = False,
        note: bool = True,
    ) -> None:
        """Add a column; one that no gene has a value in is left out. `bar` draws its values as bars too; `note` puts
        its words below the table.
        """
        known = {gene: value for gene, value in values.items() if value is not None and math.isfinite(value)}
        if known:
            about = {"key": key, "label": label, "words": words, "digits": digits, "bar": bar, "note": note}
            self.columns.append({**about, "of": known})

    def add(self, names: Iterable[str]) -> None:
        """Add genes that are not there yet, at the end."""
        for name in names:
            if name not in self.place:
                self.place[name] = len(self.place)
                self.names.append(name)

    def record(self) -> dict[str, Any]:
        """Return it for the page."""
        columns = [
            {**{key: value for key, value in column.items() if key != "of"}, "values": self._values(column["of"])}
            for column in self.columns
        ]
        trusted = [self.trusted.get(name) for name in self.names] if self.trusted else []
        return {"names": self.names, "columns": columns, "trusted": trusted, "sort": self.sort}

    def _values(self, of: Mapping[str, float]) -> list[float | None]:
        return [round(of[name], 5) if name in of else None for name in self.names]


def add_moran(genes: GeneTable, of: Mapping[str, Mapping[str, float | None]]) -> None:
    """Add Moran's I of measured and predicted maps."""
    words = "Moran's I of its {} map, mean over slides: the share of it that is structure"
    genes.column("moran_target", "I measured", words.format("measured"), of.get("target", {}), 2, note=False)
    genes.column("moran", "I predicted", words.format("predicted"), of.get("predicted", {}), 2, note=False)


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where it is empty or not there, as in a run without folds."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: {reason_of(error)}") from error
    return list(csv.DictReader(io.StringIO(text, newline="")))


def number(text: str | None) -> float | None:
    """Return a cell's number, None where it holds none."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def heads_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the run's head and its baselines: name, figures over all folds (None without folds), by fold."""
    found = []
    for name, record in ((metrics["head"], metrics), *metrics["baselines"].items()):
        summary = record["summary"]
        found.append(
            {
                "name": name,
                "summary": None if summary is None else {key: summary.get(key) for key in FIGURES},
                "folds": [
                    {
                        "fold": fold["fold"],
                        "slides": len(fold["test_slides"]),
                        **{key: fold.get(key) for key in (*FIGURES, "n_spots", "n_genes", "n_genes_pcc_undefined")},
                        "epochs": fold.get("epochs"),
                    }
                    for fold in record["folds"]
                ],
            }
        )
    return found


def history_of(rows: Sequence[dict[str, str]], chosen: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return one curve per fold and phase: its epochs, losses and watched PCCs (None where there is none).

    `chosen` is each fold's epoch, marked on the curve along which it was chosen.
    """
    curves: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if number(row.get("epoch")) is not None:
            curves.setdefault((row.get("fold") or "", row.get("phase") or ""), []).append(row)
    loss = next((name for name in (rows[0] if rows else ()) if name.startswith("loss")), "loss")
    return [
        {
            "fold": fold,
            "phase": phase,
            "epoch": [number(row["epoch"]) for row in part],
            "loss": [number(row.get(loss)) for row in part],
            "pcc": [number(row.get("watched_pcc")) for row in part],
            "chosen": chosen.get(fold) if phase != "train" else None,
        }
        for (fold, phase), part in curves.items()
    ]
