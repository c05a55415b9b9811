"""What a report says of a run in words: the verdict first, what its figures are not, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.evaluation.compare import Comparison, compare
from nh2st_pipe.evaluation.statistics import FEWEST_UNITS, many, over_genes

__all__ = ["comparison_of", "facts", "figure", "provenance", "verdict", "warnings"]


def comparison_of(run: Path, metrics: dict[str, Any]) -> Comparison | None:
    """Hold a run's head against its baselines; None where nothing was judged, or an earlier version kept too little.

    `metrics` are those of the run, whose files have been checked by then.
    """
    try:
        return compare([run], read=lambda _: metrics)
    except RunError:
        return None


def figure(metrics: Mapping[str, Any], comparison: Comparison | None) -> dict[str, Any] | None:
    """Return the run's figure: its mean PCC, its 95 % interval over units where there are several, and over how many
    genes it is, in words.
    """
    summary = metrics["summary"]
    if summary is None or summary.get("pcc") is None:
        return None
    interval = comparison.rows[0]["interval"] if comparison is not None else None
    over = "" if comparison is None else many(comparison.n_units, comparison.unit)
    return {
        "pcc": summary["pcc"],
        "mse": summary.get("mse"),
        "interval": interval,
        "over": over,
        "genes": over_genes(summary) if summary.get("n_genes") else "",
    }


def verdict(heads: Sequence[Mapping[str, Any]], comparison: Comparison | None, *, finished: bool = True) -> list[str]:
    """Say which head is best by mean PCC, whoever that is, and which differences are more than chance."""
    if not finished and heads[0]["summary"] is None:
        return [f"Nothing has been judged yet: no fold of {heads[0]['name']} is done."]
    if comparison is None or len(comparison.rows) < 2:
        return [_best(heads)]
    found = [_best(heads)]
    own, *others = comparison.rows
    over = many(comparison.n_units, comparison.unit)
    few = comparison.n_units < FEWEST_UNITS
    for key, title, better_is_more in (("pcc", "PCC", True), ("mse", "MSE", False)):
        if own.get(key) is None:
            continue
        said: dict[str, list[str]] = {}
        for row in others:
            said.setdefault(_standing(row["difference"][key], better_is_more, comparison), []).append(row["head"])
        clauses = [f"{standing} {_and(names)}" for standing, names in sorted(said.items(), key=_order) if standing]
        if clauses:
            chance = f"; {over} are too few to rule out chance" if few and comparison.n_units > 1 else ""
            paired = f"By {title}, with differences paired over {over}, {own['head']} is"
            found.append(f"{paired} {'; '.join(clauses)}{chance}.")
    rivals = [row for row in others if row.get("pcc") is not None]
    if rivals:
        rival = max(rivals, key=lambda row: row["pcc"])
        parts = [
            f"{_signed(difference['mean'], digits)} {title}"
            + ("" if difference["low"] is None else
               f" (95 % interval {_signed(difference['low'], digits)} to {_signed(difference['high'], digits)})")
            for key, title, digits in (("pcc", "PCC", 3), ("mse", "MSE", 4))
            if (difference := rival["difference"][key])["mean"] is not None
        ]  # fmt: skip
        if parts:
            found.append(f"Against {rival['head']}, the best of the baselines: {' and '.join(parts)}.")
    left_out = [note for note in comparison.notes if note.startswith("left out")]
    return found + [note[0].upper() + note[1:] + "." for note in left_out]


def _standing(difference: Mapping[str, Any], more_is_better: bool, comparison: Comparison) -> str:
    """Say how the run's head stands to another, as far as can be said; empty where nothing can."""
    side = difference["side"]
    if side == "few" and difference["mean"] is not None:
        won, lost = (difference[key] for key in (("ahead", "behind") if more_is_better else ("behind", "ahead")))
        word, of = ("ahead", won) if won >= lost else ("behind", lost)
        return f"{word} on {of} of {many(difference['units'], comparison.unit)} of"
    if side in ("more", "less"):
        return "better than" if (side == "more") is more_is_better else "worse than"
    return "not distinguishable from" if side == "unclear" else ""


def _order(pair: tuple[str, list[str]]) -> tuple[int, str]:
    """What is won stands first."""
    words = ("better", "ahead", "not", "behind", "worse")
    return next((i for i, word in enumerate(words) if pair[0].startswith(word)), len(words)), pair[0]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _best(heads: Sequence[Mapping[str, Any]]) -> str:
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


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """Say what a reader could take these figures for and must not."""
    notes = [str(note) for note in metrics.get("notes", ())]
    if metrics["summary"] is None:
        return notes
    found: list[str] = []
    if metrics["protocol"] == "paper":
        found.append(
            "The figures on this page are optimistic. Protocol “paper”: the gene panel comes from all slides and the "
            "epoch kept is the best on the test fold. Use them to compare with published tables, not to say how "
            "good the head is on a new slide."
        )
    if metrics["n_patients"] == 1:
        if not any("are of one patient" in note for note in notes):  # as a run of before does not say
            found.append("All slides are of one patient; the figures say nothing about new patients.")
    elif (
        str(metrics["folds_by"]).partition(":")[0] == "slide"
        and metrics["n_patients"] < metrics["n_slides"]
        and not any("on both sides of a fold" in note for note in notes)
    ):  # a run of before, which did not say so itself
        found.append(
            "Folds leave out slides, not patients: slides of one patient stand on both sides, and the figures are "
            "likely too good for a new patient."
        )
    return found + notes


def facts(metrics: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    """Return what was trained and how it was judged, as label and words."""
    store, views = metrics["store"], metrics["views"]
    by = str(metrics["folds_by"])
    folds = {
        "patient": "one patient left out in turn",
        "slide": "one slide left out in turn",
        "block": "one block (a quarter) of every slide left out in turn",
        "none": "none: nothing was judged",
    }.get(by, f"{by} folds of whole patients" if by.isdecimal() else f"by {by.replace(':', ', in folds: ')}")
    count, patients, model = len(metrics["folds"]), metrics["n_patients"], metrics.get("model")
    found = [
        ("Data", f"{many(metrics['n_slides'], 'slide')}, {many(patients, 'patient')}, {metrics['n_spots']:,} spots"),
    ]
    if model is None:
        found.append(("Targets", unit))
    else:
        found.append(("Targets", f"{many(model['genes'], 'gene')} in the model (a fold's panel can differ); {unit}"))
    found += [
        ("Encoder", f"{store['encoder']}, {store['dim']} values per tile, {many(views, 'view')} used"),
        ("Folds", f"{folds} ({many(count, 'fold')})" if count else folds),
    ]
    if count:  # a protocol says what test folds may decide, and without folds there are none
        found.append(("Protocol", f"{metrics['protocol']}: {metrics['protocol_in_words']}"))
    if model is not None:
        epochs = f", {model['epochs']} epochs" if model["epochs"] else ""
        found.append(("Model", f"model/ is trained on all slides ({len(model['slides'])}){epochs}"))
    return found


def provenance(metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where everything came from, as label and words."""
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
