"""Runs side by side: paired differences over the same slides and genes, and whether chance could have made them.

Units, intervals and verdicts are those of `evaluation.statistics`: the patient where patients are told, else the slide,
else the block; Student's interval of a mean over units; the exact sign-flip test, by which no verdict is possible below
six units.
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

from nh2st_pipe.core.errors import RunError, UsageError, fault_of, listed
from nh2st_pipe.evaluation.judged import SlideFigures, by_unit, units_of
from nh2st_pipe.evaluation.statistics import FEWEST_UNITS, Verdict, figures_from, many, mean_interval, verdict
from nh2st_pipe.recipes.train import TargetRecipe, as_kept
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.folder import read_metrics

__all__ = ["FIGURES", "Comparison", "compare"]

FIGURES = {"pcc": True, "pcc_top50_train": True, "pcc_top50": True, "mse": False}
"""What is compared, and whether more of it is better."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    reference: str
    unit: str
    """"patient", "slide" or "block"."""
    n_units: int
    n_genes: int
    rows: list[dict[str, Any]]
    """One per head, the reference first: `head`, its mean figures, and `interval`, that of its mean PCC (low and high;
    None for a single unit). For the others also `difference` (by figure, a `statistics.Verdict` on the reference's less
    theirs), `units_won` by the reference, `genes_won` by it of the `genes` that have a PCC in both, and the `verdict`
    on the head of that row by PCC, in words."""
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Entry:
    """One head of one run."""

    run: Path
    name: str
    slides: dict[str, SlideFigures]
    """By name; a block of a slide has one of its own."""
    genes: dict[str, float]


def compare(runs: Sequence[str | Path], *, read: Callable[[Path], dict[str, Any]] = read_metrics) -> Comparison:
    """Hold the head of the first of `runs` against the heads of the others and the baselines of all of them.

    A baseline that several runs have is taken from the first. `read` returns a run's metrics.json; by default every
    file of the run is checked then. Raises UsageError without a run, and RunError where runs
    were judged on different targets or genes, or have no slide in common: their figures do not answer one question.
    """
    if not runs:
        raise UsageError("compare takes at least one run folder")
    found = []
    for run in runs:
        with fault_of(RunError, f"{run} cannot be compared"):
            found.append(_read(Path(run), read(Path(run))))
    with fault_of(RunError, f"{listed(runs)} cannot be compared"):
        return _compared(found)


def _compared(found: list[_Read]) -> Comparison:
    _same_question([run for run, _ in found])
    heads = [heads[0] for _, heads in found]
    twice = {head.name for head in heads if [other.name for other in heads].count(head.name) > 1}
    entries = {(f"{head.name} ({head.run})" if head.name in twice else head.name): head for head in heads}
    for _, (_, *baselines) in found:
        for baseline in baselines:
            entries.setdefault(baseline.name, baseline)
    common, notes = _common_slides(entries)
    first, *others = entries
    unit, units = units_of([entries[first].slides[name] for name in common])
    n_units = len(set(units))
    if 1 < n_units < FEWEST_UNITS:
        notes.append(
            f"{n_units} {unit}s are too few to rule out chance, whatever the difference: with {n_units} the smallest p "
            f"is {2 / 2**n_units:.3g}"
        )
    figures = {
        name: {key: by_unit([getattr(entry.slides[of], key) for of in common], units) for key in FIGURES}
        for name, entry in entries.items()
    }
    rows = [{"head": first, **_means(figures[first]), "interval": mean_interval(figures[first]["pcc"])}]
    rows += [_against(first, name, entries, figures, unit) for name in others]
    return Comparison(first, unit, n_units, len(entries[first].genes), rows, notes)


def _against(
    first: str, name: str, entries: dict[str, _Entry], figures: dict[str, dict[str, NDArray[np.float64]]], unit: str
) -> dict[str, Any]:
    mine, theirs = figures[first], figures[name]
    judged = {key: verdict(mine[key] - theirs[key]) for key in FIGURES}
    row: dict[str, Any] = {
        "head": name,
        **_means(theirs),
        "interval": mean_interval(theirs["pcc"]),
        "difference": {key: of.to_json() for key, of in judged.items()},
        "units_won": judged["pcc"].ahead,
    }
    genes = entries[first].genes.keys() & entries[name].genes.keys()
    row["genes"] = len(genes)
    row["genes_won"] = sum(entries[first].genes[gene] > entries[name].genes[gene] for gene in genes)
    row["verdict"] = in_words(judged["pcc"], unit)
    return row


def in_words(of: Verdict, unit: str) -> str:
    """Say of the other head what a verdict on the reference's PCC less its own says."""
    if of.side == "few":
        behind = of.mean is not None and of.mean > 0
        won, where = (of.ahead, "behind") if behind else (of.behind, "ahead")
        return f"{where} on {won} of {many(of.units, unit)}; too few to rule out chance"
    return {"more": "worse", "less": "better", "undefined": "undefined"}.get(of.side, "not distinguishable")


def _means(figures: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
    known = {key: _known(values) for key, values in figures.items()}
    return {key: float(values.mean()) if len(values) else None for key, values in known.items()}


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


_Read = tuple[tuple[Path, dict[str, Any], TargetRecipe], list[_Entry]]


def _read(run: Path, metrics: dict[str, Any]) -> _Read:
    """Return a run's metrics and targets, and its heads, its own first."""
    if metrics["summary"] is None:
        raise RunError(f"{run} was trained without folds: nothing in it was judged, so there is nothing to compare")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    slides = pl.read_csv(
        (run / "per_slide.csv").read_bytes(),
        infer_schema_length=None,
        schema_overrides={"slide_id": pl.String, "patient": pl.String},
    )
    genes = pl.read_csv(
        (run / "per_gene.csv").read_bytes(), infer_schema_length=None, schema_overrides={"gene": pl.String}
    )
    targets = validate(TargetRecipe, as_kept(recipe["targets"]), f"{run}/recipe.yaml, targets")
    figures: dict[str, dict[str, SlideFigures]] = {}
    for row in slides.iter_rows(named=True):
        of_slide = figures_from(row)
        figures.setdefault(str(row["head"]), {})[of_slide.name] = of_slide
    heads = []
    for name in (metrics["head"], *metrics["baselines"]):
        of = genes.filter(pl.col("head") == name)
        pcc = {gene: float(value) for gene, value in of.select("gene", "pcc").iter_rows() if value is not None}
        heads.append(_Entry(run, name, figures.get(name, {}), pcc))
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
    by_head = {name: set(entry.slides) for name, entry in entries.items()}
    common, every = set.intersection(*by_head.values()), set.union(*by_head.values())
    if not common:
        runs = sorted({str(entry.run) for entry in entries.values()})
        raise RunError(f"{' and '.join(runs)} have no held-out slide in common, so there is nothing to pair")
    left = every - common
    return sorted(common), [f"left out, for not every head was judged on them: {listed(sorted(left))}"] if left else []
