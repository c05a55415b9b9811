"""What a report says of a run: its figures against the baselines', its genes, its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.recipes.train import TargetRecipe, as_kept
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.reporting import words
from nh2st_pipe.reporting.asked import Asked
from nh2st_pipe.reporting.maps import SlideMaps, moran_columns, read_slides
from nh2st_pipe.reporting.tables import HALVES, GeneTable, add_moran, heads_of, history_of, number, table
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.folder import FoundRun

__all__ = ["judged_run"]

_LEVEL = "0.9"  # of the intervals that maps and scatter show


def judged_run(found: FoundRun, asked: Asked | None = None) -> tuple[GeneTable, list[SlideMaps], dict[str, Any]]:
    """Return the genes, the slides, and all else that the page shows of a run."""
    run, metrics = found.path, found.metrics
    recipe_text, recipe = _recipe(run)
    unit = _unit(recipe)
    heads = heads_of(metrics)
    rows = table(run / "per_gene.csv")
    listed = list(dict.fromkeys(row["gene"] for row in rows))
    about, order = About.of_run(run), {name: i for i, name in enumerate(listed)}
    verdicts = None if about is None else about.trusted
    slides = read_slides(sorted((run / "predictions").glob("*.h5ad")), order, asked, verdicts)
    genes = _genes(rows, listed, [head["name"] for head in heads], slides, metrics, about)
    if about is not None:
        genes.trusted = about.trusted
    comparison = words.comparison_of(run, metrics) if not found.missing else None
    against = {} if comparison is None else {row["head"]: row for row in comparison.rows}
    for head in heads:
        head["against"] = against.get(head["name"])
    chosen = {fold["fold"]: fold["epochs"] for fold in heads[0]["folds"] if fold["epochs"]}
    level = None if about is None else about.intervals.levels.get(_LEVEL)
    for slide in slides:
        if level is not None and not slide.half_width:
            slide.half_width = [level.half_width.get(slide.names[i]) for i in slide.kept]
    data = {
        "run": found.name,
        "head": metrics["head"],
        "about": str(recipe.get("about") or ""),
        "facts": words.facts(metrics, unit),
        "warnings": [*found.missing, *words.warnings(metrics)],
        "verdict": {
            "figure": words.figure(metrics, comparison),
            "sentences": words.verdict(heads, comparison, finished=not found.missing),
        },
        "heads": heads,
        "trust": "" if about is None else about.trusted_in_words,
        "unit": unit,
        "level": float(_LEVEL) if level is not None else None,
        "calibration": None if about is None else _calibration(about),
        "history": history_of(table(run / "history.csv"), chosen),
        "watched": "the test fold" if metrics["protocol"] == "paper" else "a held-out training slide",
        "provenance": words.provenance(metrics, recipe),
        "recipe": recipe_text,
    }
    return genes, slides, data


def _recipe(run: Path) -> tuple[str, dict[str, Any]]:
    """Return recipe.yaml as it stands, and as values (empty where it is not there)."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {reason_of(error)}") from error
    return text, values if isinstance(values, dict) else {}


def _unit(recipe: Mapping[str, Any]) -> str:
    """Say what a target is a number of."""
    targets = recipe.get("targets")
    return "" if targets is None else validate(TargetRecipe, as_kept(targets), "recipe.yaml, targets").unit()


def _genes(
    rows: list[dict[str, str]],
    names: list[str],
    heads: list[str],
    slides: list[SlideMaps],
    metrics: Mapping[str, Any],
    about: About | None,
) -> GeneTable:
    """Return the gene table: the PCC of every head, and of the run's own what halves of the tissue say."""
    cells = {(row["head"], row["gene"]): row for row in rows}

    def of(head: str, key: str) -> dict[str, float | None]:
        return {name: number(cells.get((head, name), {}).get(key)) for name in names}

    genes = GeneTable(names)
    own = heads[0]
    unit = (metrics["summary"] or {}).get("unit")
    words_of_pcc = f"PCC by slide, mean over {unit}s" if unit else "PCC, mean over the folds that had the gene"
    if rows:
        genes.column("cv_pcc", "PCC", f"{words_of_pcc}, of {own}", of(own, "pcc"), bar=True)
    else:
        per_slide: dict[str, list[float]] = {}
        for slide in slides:
            for i, value in zip(slide.kept, slide.pcc, strict=False):
                if value is not None:
                    per_slide.setdefault(slide.names[i], []).append(value)
        means = {name: float(np.mean(values)) for name, values in per_slide.items()}
        genes.add(sorted(means, key=lambda name: -means[name]))
        done = "out of fold, mean over the slides that are there" if metrics["folds"] else "in-sample"
        genes.column("cv_pcc", "PCC", f"PCC {done}, of {own}", means, bar=True)
    if about is not None:
        genes.column("cv_low", "from", "Lower end of Student's 95 % interval of the PCC", about.cv_low, note=False)
        genes.column("cv_high", "to", "Upper end of Student's 95 % interval of the PCC", about.cv_high, note=False)
    half = of(own, "half_pcc") if rows else {} if about is None else about.half_pcc
    genes.column("half", "halves", HALVES, half)
    for head in heads[1:]:
        pcc = of(head, "pcc")
        if any(pcc.values()):  # a head whose predictions do not vary, as the mean's, would be a column of zeros
            genes.column(f"head {head}", head, f"{head}: {words_of_pcc}", pcc, note=False)
    add_moran(genes, moran_columns(slides))
    genes.column("mean", "mean", "Mean of the measured values", of(own, "target_mean"))
    genes.column("folds", "folds", "Number of folds whose panel had the gene", of(own, "n_folds"), digits=0)
    return genes


def _calibration(about: About) -> dict[str, Any] | None:
    """Return what intervals promised and reached on what was held out."""
    known = [
        {"level": float(level), "reached": each.coverage, "promised": each.promised}
        for level, each in about.intervals.levels.items()
        if each.coverage is not None
    ]
    genes = max((len(each.half_width) for each in about.intervals.levels.values()), default=0)
    of = about.intervals
    return {"by": of.by, "groups": of.groups, "genes": genes, "levels": known} if known else None
