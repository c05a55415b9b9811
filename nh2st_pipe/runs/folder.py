"""The run folder: what training leaves behind, and how it is read back.

    recipe.yaml      the recipe as it was used, with every default; training again from it repeats the run
    metrics.json     summary and folds of the head and of every baseline, protocol, store, versions
    per_gene.csv     head, gene, folds it was judged in, and its mean figures over them
    per_slide.csv    head, fold, slide, figures
    history.csv      one row per epoch
    predictions/     <slide_id>.h5ad, out of fold: X predicted, layers["target"]
    model/           the head trained on all slides
    log.jsonl        what happened when

A run is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from nh2st_pipe.core.errors import RunError

__all__ = ["RunFolder", "read_metrics"]


class RunFolder:
    """A run being written. `commit` makes it appear; until then it is called <name>.part."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise RunError(f"{path} exists already; give another --out, or move it away")
        self.path = path
        self.part = path.with_name(path.name + ".part")
        if self.part.exists():
            shutil.rmtree(self.part)
        (self.part / "predictions").mkdir(parents=True)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to log.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with (self.part / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": event, **values}) + "\n")

    def write_yaml(self, name: str, values: dict[str, Any]) -> None:
        """Write a mapping as YAML, in its own order."""
        (self.part / name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a mapping as JSON; a number that is not finite is an error, never NaN in a file."""
        text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False)
        (self.part / name).write_text(text + "\n", encoding="utf-8")

    def write_table(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Write records as CSV; what is undefined is an empty cell."""
        table = pl.DataFrame(list(records), infer_schema_length=None)
        floats = [column for column, kind in table.schema.items() if kind.is_float()]
        table.with_columns(pl.col(floats).fill_nan(None)).write_csv(self.part / name)

    def commit(self) -> None:
        """Make the run appear under its name."""
        if self.path.exists():
            raise RunError(f"{self.path} appeared while training; the finished run is at {self.part}")
        self.part.rename(self.path)


def read_metrics(run: str | Path) -> dict[str, Any]:
    """Return a run's metrics.json. Raises RunError where `run` is no finished run."""
    path = Path(run) / "metrics.json"
    if not path.is_file():
        raise RunError(f"{run} is not a finished run (there is no metrics.json in it)")
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return metrics
