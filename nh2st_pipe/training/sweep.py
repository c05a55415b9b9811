"""One recipe in many settings on the same kept embeddings: a run for each, and a table of them all."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

import nh2st_pipe
from nh2st_pipe.core.errors import NH2STError, RunError, UsageError, listed, reason_of
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.evaluation.statistics import FIGURES
from nh2st_pipe.recipes.train import TrainRecipe, set_in
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.store.read import Store, open_store
from nh2st_pipe.training.engine import training_engine
from nh2st_pipe.training.run import resolve, train

__all__ = ["Swept", "parse_grid", "sweep"]

_LONGEST_NAME = 120
_QUESTION = ("targets", "folds", "protocol")  # fields that decide what is predicted, and how it is judged


@dataclass
class Swept:
    """What `sweep` made."""

    out: Path
    keys: list[str] = field(default_factory=list)
    """What was varied."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per cell, the best PCC first: `cell` (its run's folder in `out`), the values of `keys`, its figures, the
    `version` that made it, and, last, those that `failed`, each with its cause."""
    done: list[str] = field(default_factory=list)
    """Cells trained by this call."""
    kept: list[str] = field(default_factory=list)
    """Cells that were there."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cells that could not be trained, each with its cause."""
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "out": str(self.out)}


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return key → values from "key=a,b,c": commas inside brackets are no borders, and each value is read as YAML."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip()
        if not sign or not key or not values.strip():
            raise UsageError(f"--grid takes key=a,b,c (for example head.alpha=300,1000), not '{text}'")
        if key in grid:
            raise UsageError(f"--grid: '{key}' is given twice; put all of its values behind one")
        try:
            read = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise UsageError(f"--grid {text}: '{values}' are not YAML values with commas between them") from error
        if len({json.dumps(value, default=str) for value in read}) < len(read):
            raise UsageError(f"--grid {text}: a value is there twice")
        grid[key] = read
    return grid


def sweep(
    recipe: str | Path | TrainRecipe,
    embeddings: str | Path,
    grid: Mapping[str, Sequence[Any]] | Iterable[str],
    *,
    genes: int | str | Path | Sequence[str] | None = None,
    folds: str | int | None = None,
    out: str | Path | None = None,
    settings: Iterable[str] = (),
    seed: int | None = None,
    device: str = "auto",
    jobs: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    actors: int | None = None,
    progress: Progress | None = None,
) -> Swept:
    """Train `recipe` with every combination of the values in `grid` (dotted key → values, or "key=a,b,c").

    Each is a run in `out` (sweeps/<recipe>), without baselines; those that are there already are kept, so that a sweep
    that was cut short goes on. The other arguments are those of `train`, whose `jobs` folds go side by side.

    Raises UsageError and RecipeError for any cell before the first is trained, RunError where `out` is of another
    recipe or other slides. What fails in a cell is in what is returned.
    """
    of = dict(grid) if isinstance(grid, Mapping) else parse_grid(grid)
    if not of or not all(of.values()):
        raise UsageError("a sweep varies something: --grid head.alpha=300,1000,3000")
    base = resolve(recipe, settings, genes, folds, seed).model_copy(update={"baselines": ()})
    if base.folds == "none":
        raise UsageError("a sweep compares what is judged, and --folds none judges nothing")
    cells = _cells(base, of)
    store, progress = open_store(embeddings), progress or Progress()
    found = Swept(Path(out) if out is not None else Path("sweeps") / base.name, list(of))
    found.out.mkdir(parents=True, exist_ok=True)
    _same_question(found.out, base, store)
    metrics: dict[str, dict[str, Any]] = {}
    with training_engine(engine, device, address, actors, jobs) as cluster:
        on = "local" if cluster is None else cluster
        for number, (name, cell) in enumerate(cells.items(), start=1):
            place = found.out / name
            try:
                if place.exists():
                    metrics[name] = read_metrics(place)
                    found.kept.append(name)
                else:
                    progress.say(f"cell {number} of {len(cells)}: {name}")
                    metrics[name] = train(
                        embeddings,
                        recipe=cell.recipe,
                        out=place,
                        device=device,
                        jobs=jobs,
                        engine=on,
                        progress=progress,
                    ).metrics
                    found.done.append(name)
            except NH2STError as error:
                found.failed[name] = str(error)
    rows = [
        {"cell": name, **cells[name].values, **_figures(of_cell), "version": _version(of_cell), "failed": None}
        for name, of_cell in metrics.items()
    ]
    rows = sorted(rows, key=lambda row: (row["pcc"] is None, -(row["pcc"] or 0.0)))
    empty = dict.fromkeys((*FIGURES, "version"))
    found.rows = [
        *rows,
        *({"cell": name, **cells[name].values, **empty, "failed": cause} for name, cause in found.failed.items()),
    ]
    older = sorted(name for name, of_cell in metrics.items() if _version(of_cell) != nh2st_pipe.__version__)
    if older:
        made = sorted({str(_version(metrics[name])) for name in older})
        found.notes.append(
            f"{listed(older)} {'was' if len(older) == 1 else 'were'} made by version {listed(made)} of nh2st-pipe, and "
            f"this is {nh2st_pipe.__version__}: figures of the two may be of other definitions; delete "
            f"{'it' if len(older) == 1 else 'them'} to train anew"
        )
    said = [set(of_cell["notes"]) for of_cell in metrics.values()]
    found.notes += (
        [note for note in next(iter(metrics.values()))["notes"] if all(note in each for each in said)] if said else []
    )
    apart = [key for key in of if key.partition(".")[0] in _QUESTION and len(of[key]) > 1]
    if apart:
        found.notes.append(
            f"cells differ in {listed(apart)}: their figures answer different questions, and are not to be compared"
        )
    if len(rows) > 1:
        found.notes.append(
            f"the first of {len(rows)} is the best on the slides it is judged by: its figure is too good for "
            "others. `choose` in a recipe chooses where training slides are left out"
        )
    _write(found)
    return found


@dataclass(frozen=True)
class _Cell:
    values: dict[str, Any]
    recipe: TrainRecipe


def _cells(base: TrainRecipe, grid: Mapping[str, Sequence[Any]]) -> dict[str, _Cell]:
    """Return every combination by its name, checked. Keys are whole in it: `out` may hold cells of other keys too."""
    cells: dict[str, _Cell] = {}
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        data = base.model_dump(mode="json")
        for key, value in values.items():
            try:
                set_in(data, key, value)
            except KeyError as error:
                raise UsageError(f"--grid {key}: '{error.args[0]}' is a value, not a group of keys") from error
        words = ",".join(f"{key}={_plain(value)}" for key, value in values.items())
        name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", words)
        if name != words or len(name) > _LONGEST_NAME:  # two cells must not have one name
            name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"
        if name in cells:
            raise UsageError(f"--grid: a value is there twice, in {words}")
        cells[name] = _Cell(values, validate(TrainRecipe, data, f"cell {words}"))
    return cells


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _same_question(out: Path, base: TrainRecipe, store: Store) -> None:
    """Keep in `out` what its cells have in common. Raises RunError where it is there and another."""
    slides = []
    for name in store.slides():
        record = store.complete(name)
        slides.append([name, record.image.image, record.spots, record.expression, record.stain_shift])
    contract = store.contract
    common = {
        "recipe": base.model_dump(mode="json"),
        "slides": slides,
        "encoder": [contract.identity, contract.weights.sha256, contract.precision, contract.views],
    }
    common = json.loads(json.dumps(common))
    path = out / "sweep.json"
    if path.is_file():
        try:
            kept = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged: {reason_of(error)}; give another --out") from error
        other = [key for key in common if kept.get(key) != common[key]]
        if other:
            raise RunError(f"the sweep in {out} was made with other {' and '.join(other)}; give another --out")
        return
    if any(out.iterdir()):
        raise RunError(f"{out} holds something that is no sweep; give another --out")
    with written_whole(path) as part:
        part.write_text(json.dumps(common, indent=2) + "\n", "utf-8")


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    summary = metrics["summary"] or {}
    return {key: summary.get(key) for key in FIGURES}


def _version(metrics: Mapping[str, Any]) -> str | None:
    known = metrics.get("software", {}).get("nh2st_pipe")
    return None if known is None else str(known)


def _write(found: Swept) -> None:
    if not found.rows:
        return
    table = pl.DataFrame([{key: _cell_text(value) for key, value in row.items()} for row in found.rows], strict=False)
    with written_whole(found.out / "sweep.csv") as part:
        table.write_csv(part)


def _cell_text(value: Any) -> float | str | None:
    """Return what stands in a table: numbers as they are, and all else in words."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    return value if isinstance(value, str) else json.dumps(value)
