"""One self-contained page on a finished run: figures, genes, true and predicted maps, training, provenance.

The page is report_template.html with the run's data put in as JSON; its script builds everything else, so that
no text of the data is ever read as HTML. It needs no network and opens from disk.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import yaml

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.reporting.maps import slide_maps
from nh2st_pipe.runs.folder import read_metrics

__all__ = ["report"]

_MARK = "@@DATA@@"
_FIGURES = ("pcc", "pcc_sd", "pcc_top50", "mse", "mae", "train_seconds")


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html for the finished run folder `run`, at `out` or inside it, and return its path.

    Raises RunError where `run` is not finished or not as training writes it, or `out` is a folder.
    """
    run = Path(run)
    metrics = read_metrics(run)
    target = Path(out) if out is not None else run / "report.html"
    if target.is_dir():
        raise RunError(f"{target} is a folder; give the report a file name, for example {target / 'report.html'}")
    try:
        data = _page_data(run, metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run} cannot be reported on: a file in it lacks {error} or is not as training writes it; was it changed, "
            "or written by another version?"
        ) from error
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # "<" is what could end the script element (</script>) or change how it is read (<!--).
    text = text.replace("<", "\\u003c")
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    with written_whole(target) as part:
        part.write_text(template.replace(_MARK, text), encoding="utf-8")
    return target


def _page_data(run: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return all that the page shows, ready for JSON."""
    recipe_text, recipe = _recipe(run)
    heads = _heads(metrics)
    genes = _genes(_table(run / "per_gene.csv"), [head["name"] for head in heads])
    slides = slide_maps(run / "predictions", genes)
    return {
        "run": run.resolve().name,
        "head": metrics["head"],
        "about": str(recipe.get("about") or ""),
        "facts": _facts(metrics, recipe),
        "warnings": _warnings(metrics),
        "verdict": _verdict(heads),
        "heads": heads,
        "genes": genes,
        "unit": _unit(recipe),
        "slides": slides,
        "history": _history(_table(run / "history.csv")),
        "watched": "the test fold" if metrics["protocol"] == "paper" else "a held-out training slide",
        "provenance": _provenance(metrics, recipe),
        "recipe": recipe_text,
    }


def _recipe(run: Path) -> tuple[str, dict[str, Any]]:
    """Return recipe.yaml as it stands, and as values (empty where it is not there)."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return text, values if isinstance(values, dict) else {}


def _table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where it is empty or not there, as in a run without folds."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _heads(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the run's head and its baselines: name, figures over all folds (None without folds), by fold."""
    found = []
    for name, record in ((metrics["head"], metrics), *metrics["baselines"].items()):
        summary = record["summary"]
        found.append(
            {
                "name": name,
                "summary": None if summary is None else {key: summary.get(key) for key in _FIGURES},
                "folds": [
                    {
                        "fold": fold["fold"],
                        "slides": len(fold["test_slides"]),
                        **{key: fold.get(key) for key in (*_FIGURES, "n_spots", "n_genes", "n_genes_pcc_undefined")},
                    }
                    for fold in record["folds"]
                ],
            }
        )
    return found


def _verdict(heads: list[dict[str, Any]]) -> str:
    """Say in one or two sentences which head is best by mean PCC, whoever that is."""
    own = heads[0]
    if own["summary"] is None:
        return (
            "Nothing was judged: this run was trained on all slides, without folds, so there are no figures and no "
            "out-of-fold predictions. Train with --folds patient to learn how good the head is on slides it has not "
            "seen."
        )
    known = [(head["summary"]["pcc"], head["name"]) for head in heads if (head["summary"] or {}).get("pcc") is not None]
    if not known:
        return "No head has a defined PCC: predictions or targets do not vary."
    best, name = max(known, key=lambda pair: pair[0])  # of equals the first, which is the run's own
    mine = own["summary"]["pcc"]
    if mine is None:
        return (
            f"Best by mean PCC is the baseline {name} ({best:.3f}). The PCC of the run's own head, {own['name']}, is "
            "undefined: its predictions do not vary."
        )
    if len(known) == 1:
        return f"{own['name']} reaches a mean PCC of {mine:.3f}; no baseline with a defined PCC stands beside it."
    if name == own["name"]:
        second, runner_up = max((pair for pair in known if pair[1] != name), key=lambda pair: pair[0])
        return f"Best by mean PCC is {name} ({best:.3f}); the best baseline is {runner_up} ({second:.3f})."
    better = [each for pcc, each in sorted(known, reverse=True) if pcc > mine]
    return (
        f"Best by mean PCC is the baseline {name} ({best:.3f}). The run's own head, {own['name']} ({mine:.3f}), is "
        f"beaten by {len(better)} of the {len(heads) - 1} baselines: {', '.join(better)}."
    )


def _warnings(metrics: dict[str, Any]) -> list[str]:
    """Say what a reader could take these figures for and must not."""
    found: list[str] = []
    if metrics["summary"] is None:
        return [str(note) for note in metrics.get("notes", ())]
    if metrics["protocol"] == "paper":
        found.append(
            "The figures on this page are optimistic. Protocol “paper”: the gene panel comes from all slides and the "
            "epoch kept is the best on the test fold. Use them to compare with published tables, not to say how "
            "good the head is on a new slide."
        )
    if metrics["n_patients"] == 1:
        found.append("All slides are of one patient; the figures say nothing about new patients.")
    elif str(metrics["folds_by"]).partition(":")[0] == "slide" and metrics["n_patients"] < metrics["n_slides"]:
        found.append(
            "Folds leave out slides, not patients: slides of one patient stand on both sides, and the figures are "
            "likely too good for a new patient."
        )
    return found + [str(note) for note in metrics.get("notes", ())]


def _facts(metrics: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was trained and how it was judged, as label and words."""
    store, views = metrics["store"], metrics["views"]
    by = str(metrics["folds_by"])
    folds = {
        "patient": "one patient left out in turn",
        "slide": "one slide left out in turn",
        "block": "one block (a quarter) of every slide left out in turn",
        "none": "none: nothing was judged",
    }.get(by, f"{by} folds of whole patients" if by.isdecimal() else f"by {by.replace(':', ', in folds: ')}")
    count, patients = len(metrics["folds"]), metrics["n_patients"]
    model = metrics["model"]
    epochs = f", {model['epochs']} epochs" if model["epochs"] else ""
    facts = [
        ("Data", f"{_many(metrics['n_slides'], 'slide')}, {_many(patients, 'patient')}, {metrics['n_spots']:,} spots"),
        ("Targets", f"{_many(model['genes'], 'gene')} in the model (a fold's panel can differ); {_unit(recipe)}"),
        ("Encoder", f"{store['encoder']}, {store['dim']} values per tile, {_many(views, 'view')} used"),
        ("Folds", f"{folds} ({_many(count, 'fold')})" if count else folds),
        ("Model", f"model/ is trained on all slides ({len(model['slides'])}){epochs}"),
    ]
    if count:  # a protocol says what test folds may decide, and without folds there are none
        facts.insert(-1, ("Protocol", f"{metrics['protocol']}: {metrics['protocol_in_words']}"))
    return facts


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _unit(recipe: dict[str, Any]) -> str:
    """Say what a target is a number of."""
    targets = recipe.get("targets")
    return "" if targets is None else validate(TargetRecipe, targets, "recipe.yaml, targets").unit()


def _genes(rows: list[dict[str, str]], heads: list[str]) -> dict[str, Any]:
    """Return the gene table by column: names, mean target, folds of the run's own head, and PCC per head."""
    names = list(dict.fromkeys(row["gene"] for row in rows))
    cells = {(row["head"], row["gene"]): row for row in rows}
    own = [cells.get((heads[0], name), {}) for name in names]
    return {
        "names": names,
        "mean": [_number(row.get("target_mean")) for row in own],
        "folds": [_number(row.get("n_folds")) for row in own],
        "half": [_number(row.get("half_pcc")) for row in own],
        "pcc": [[_number(cells.get((head, name), {}).get("pcc")) for name in names] for head in heads],
    }


def _history(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return one curve per fold and phase: its epochs, losses and watched PCCs (None where there is none)."""
    curves: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if _number(row.get("epoch")) is not None:
            curves.setdefault((row.get("fold") or "", row.get("phase") or ""), []).append(row)
    loss = next((name for name in (rows[0] if rows else ()) if name.startswith("loss")), "loss")
    return [
        {
            "fold": fold,
            "phase": phase,
            "epoch": [_number(row["epoch"]) for row in part],
            "loss": [_number(row.get(loss)) for row in part],
            "pcc": [_number(row.get("watched_pcc")) for row in part],
        }
        for (fold, phase), part in curves.items()
    ]


def _provenance(metrics: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    store, software = metrics["store"], metrics["software"]
    tile = store["tile"]
    size = f"{tile['size_um']:g} µm" if tile.get("size_um") is not None else f"{tile['size_level0_px']:g} px (level 0)"
    return [
        ("Store", str(store["path"])),
        ("Encoder", f"{store['encoder']}, {store['dim']} values"),
        ("Weights", str(store["weights_source"])),
        ("Weights SHA-256", str(store["weights_sha256"])),
        ("Tile", size),
        ("Views", str(store["views"])),
        ("Precision", str(store["precision"])),
        ("Seed", str(recipe.get("seed", "not recorded"))),
        *((str(name), str(value)) for name, value in software.items()),
    ]
