"""Runs side by side: paired differences over the same slides and genes, and whether chance could have made them.

The unit is the patient, or the slide where there is one patient: slides of one patient are not independent. A unit's
figure is the mean over its slides. The interval of a mean difference is a percentile bootstrap over units, of 10,000
resamples with a fixed seed; where it covers zero, the two are not distinguishable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, UsageError, listed
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.folder import read_metrics

__all__ = ["FIGURES", "Comparison", "bootstrap", "compare"]

FIGURES = {"pcc": True, "pcc_top50": True, "mse": False}
"""What is compared, and whether more of it is better."""

_RESAMPLES, _SEED = 10_000, 0
_LEVEL = 0.95
_FEW = 6  # units below which an interval is too narrow to lean on: the bootstrap cannot draw what it has not seen


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    reference: str
    unit: str
    """"patient" or "slide"."""
    n_units: int
    n_genes: int
    rows: list[dict[str, Any]]
    """One per head, the reference first: `head`, its mean figures, and `interval`, that of its mean PCC (low and high;
    None for a single unit). For the others also `difference` (by figure:
    mean, low, high of the reference's less theirs), `units_won`, `genes_won` of the `genes` that have a PCC in both,
    and `verdict`."""
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Entry:
    """One head of one run."""

    run: Path
    name: str
    slides: pl.DataFrame
    genes: dict[str, float]


def compare(runs: Sequence[str | Path], *, read: Callable[[Path], dict[str, Any]] = read_metrics) -> Comparison:
    """Hold the head of the first of `runs` against the heads of the others and the baselines of all of them.

    A baseline that several runs have is taken from the first. `read` returns a run's metrics.json; by default every
    file of the run is checked then. Raises UsageError without a run, and RunError where runs
    were judged on different targets or genes, or have no slide in common: their figures do not answer one question.
    """
    if not runs:
        raise UsageError("compare takes at least one run folder")
    found = [_read(Path(run), read(Path(run))) for run in runs]
    _same_question([run for run, _ in found])
    heads = [heads[0] for _, heads in found]
    twice = {head.name for head in heads if [other.name for other in heads].count(head.name) > 1}
    entries = {(f"{head.name} ({head.run})" if head.name in twice else head.name): head for head in heads}
    for _, (_, *baselines) in found:
        for baseline in baselines:
            entries.setdefault(baseline.name, baseline)
    common, notes = _common_slides(entries)
    patients = _patients(next(iter(entries.values())).slides)
    several = len({patients.get(name) for name in common}) > 1
    unit = {name: patients[name] if several else name for name in common}
    units = sorted(set(unit.values()))
    if 1 < len(units) < _FEW:
        notes.append(
            f"only {len(units)} {'patients' if several else 'slides'}: the intervals are too narrow to lean on"
        )
    first, *others = entries
    figures = {name: _by_unit(entry.slides, unit, units) for name, entry in entries.items()}
    rows = [{"head": first, **_means(figures[first]), "interval": bootstrap(_known(figures[first]["pcc"]))}]
    rows += [_against(first, name, entries, figures) for name in others]
    n_genes = len(entries[first].genes)
    return Comparison(first, "patient" if several else "slide", len(units), n_genes, rows, notes)


def bootstrap(differences: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the interval that covers the mean of paired `differences` at 95 %; None for fewer than two of them."""
    n = len(differences)
    if n < 2:
        return None
    draws = np.random.default_rng(_SEED).integers(n, size=(_RESAMPLES, n))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(differences[draws].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def _against(
    first: str, name: str, entries: dict[str, _Entry], figures: dict[str, dict[str, NDArray[np.float64]]]
) -> dict[str, Any]:
    mine, theirs = figures[first], figures[name]
    row: dict[str, Any] = {
        "head": name,
        **_means(theirs),
        "interval": bootstrap(_known(theirs["pcc"])),
        "difference": {},
    }
    for key in FIGURES:
        differences = _known(mine[key] - theirs[key])
        interval = bootstrap(differences)
        mean = float(differences.mean()) if len(differences) else None
        row["difference"][key] = {"mean": mean, "low": interval and interval[0], "high": interval and interval[1]}
        if key == "pcc":
            row["units_won"] = int((differences > 0).sum())
    genes = entries[first].genes.keys() & entries[name].genes.keys()
    row["genes"] = len(genes)
    row["genes_won"] = sum(entries[first].genes[gene] > entries[name].genes[gene] for gene in genes)
    row["verdict"] = _verdict(row["difference"]["pcc"])
    return row


def _verdict(difference: dict[str, float | None]) -> str:
    low, high = difference["low"], difference["high"]
    if difference["mean"] is None:
        return "undefined"
    if low is None or high is None or low <= 0 <= high:
        return "not distinguishable"
    return "worse" if low > 0 else "better"


def _means(figures: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
    known = {key: _known(values) for key, values in figures.items()}
    return {key: float(values.mean()) if len(values) else None for key, values in known.items()}


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _by_unit(slides: pl.DataFrame, unit: dict[str, str], units: list[str]) -> dict[str, NDArray[np.float64]]:
    """Return each figure by unit, in the order of `units`; NaN where it is undefined."""
    out = {}
    for key in FIGURES:
        of: dict[str, list[float]] = {name: [] for name in units}
        for slide_id, value in slides.select("slide_id", key).iter_rows():
            if slide_id in unit and value is not None:
                of[unit[slide_id]].append(float(value))
        out[key] = np.array([np.mean(of[name]) if of[name] else np.nan for name in units])
    return out


def _read(run: Path, metrics: dict[str, Any]) -> tuple[tuple[Path, dict[str, Any], TargetRecipe], list[_Entry]]:
    """Return a run's metrics and targets, and its heads, its own first."""
    if metrics["summary"] is None:
        raise RunError(f"{run} was trained without folds: nothing in it was judged, so there is nothing to compare")
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        slides = pl.read_csv(
            (run / "per_slide.csv").read_bytes(), infer_schema_length=None, schema_overrides={"slide_id": pl.String}
        )
        genes = pl.read_csv(
            (run / "per_gene.csv").read_bytes(), infer_schema_length=None, schema_overrides={"gene": pl.String}
        )
        targets = validate(TargetRecipe, recipe["targets"], f"{run}/recipe.yaml, targets")
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{run} cannot be compared: {' '.join(str(error).split())[:200]}") from error
    heads = []
    for name in (metrics["head"], *metrics["baselines"]):
        of = genes.filter(pl.col("head") == name)
        pcc = {gene: float(value) for gene, value in of.select("gene", "pcc").iter_rows() if value is not None}
        heads.append(_Entry(run, name, slides.filter(pl.col("head") == name), pcc))
    every = tuple(sorted(genes.filter(pl.col("head") == metrics["head"])["gene"]))
    return (run, {**metrics, "genes": every}, targets), heads


def _same_question(runs: list[tuple[Path, dict[str, Any], TargetRecipe]]) -> None:
    first, metrics, targets = runs[0]
    for run, other, theirs in runs[1:]:
        if targets.unit() != theirs.unit():
            raise RunError(
                f"{first} predicts {targets.unit()}, and {run} {theirs.unit()}: their figures cannot be compared"
            )
        apart = sorted(set(metrics["genes"]) ^ set(other["genes"]))
        if apart:
            raise RunError(
                f"{first} and {run} were judged on different genes ({listed(apart)}); train both with the same --genes "
                "FILE"
            )


def _common_slides(entries: dict[str, _Entry]) -> tuple[list[str], list[str]]:
    """Return the slides that every head was judged on, and what has to be said about the others."""
    by_head = {name: set(entry.slides["slide_id"]) for name, entry in entries.items()}
    common, every = set.intersection(*by_head.values()), set.union(*by_head.values())
    if not common:
        runs = sorted({str(entry.run) for entry in entries.values()})
        raise RunError(f"{' and '.join(runs)} have no held-out slide in common, so there is nothing to pair")
    left = every - common
    return sorted(common), [f"left out, for not every head was judged on them: {listed(sorted(left))}"] if left else []


def _patients(slides: pl.DataFrame) -> dict[str, str]:
    """Return each slide's patient; empty for runs of versions that did not keep it."""
    if "patient" not in slides.columns:
        return {}
    return dict(slides.select("slide_id", pl.col("patient").cast(pl.String)).iter_rows())
