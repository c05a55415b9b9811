"""What a notebook shows of a run, of predictions, and of a page: HTML without a script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nh2st_pipe.evaluation.statistics import headline, many

__all__ = ["Page", "predictions_html", "run_html"]

_COLUMNS = {"pcc": "PCC", "pcc_low": "from", "pcc_high": "to", "pcc_top50_train": "best 50", "mse": "MSE", "mae": "MAE"}
_MOST = 20


@dataclass(frozen=True)
class Page:
    """A page that was written; a notebook shows it in place."""

    path: Path

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text("utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 800px; border: 1px solid #ccc"></iframe>'

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def run_html(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Return a run's table, and what has to be known of it."""
    title = f"<b>{html.escape(str(metrics['head']))}</b>: {html.escape(str(path))}"
    if not metrics["summary"]:
        return f"<p>{title}; trained without folds, nothing is judged</p>{_list(metrics['notes'])}"
    head = "".join(f"<th>{name}</th>" for name in ("head", *_COLUMNS.values()))
    body = "".join(
        f"<tr><td>{html.escape(str(row['head']))}</td>"
        + "".join(f"<td>{_number(row.get(key))}</td>" for key in _COLUMNS)
        + "</tr>"
        for row in rows
    )
    said = f"{many(len(metrics['folds']), 'fold')} by {metrics['folds_by']}; {headline(metrics['summary'])}"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{title}</p>{table}<p>{html.escape(said)}</p>{_list(metrics['notes'])}"


def predictions_html(files: Mapping[str, Path], failed: Mapping[str, str], notices: Sequence[str]) -> str:
    """Return what was predicted, what failed and why, and what should be known."""
    said = [f"{name}: {path}" for name, path in files.items()]
    wrong = [f"{name}: failed, {why}" for name, why in failed.items()]
    return f"<p>{many(len(files), 'slide')} predicted</p>{_list([*wrong, *notices, *said])}"


def _list(lines: Sequence[str]) -> str:
    shown = [html.escape(str(line)) for line in lines[:_MOST]]
    if len(lines) > _MOST:
        shown.append(f"and {len(lines) - _MOST:,} more")
    return "<ul>" + "".join(f"<li>{line}</li>" for line in shown) + "</ul>" if shown else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "–"
