"""What a report says of predictions: what they are of, which genes to trust, and which slides are unlike others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nh2st_pipe.evaluation.reference import UNLIKE
from nh2st_pipe.reporting.asked import Asked
from nh2st_pipe.reporting.maps import SlideMaps, moran_columns, read_slides
from nh2st_pipe.reporting.tables import HALVES, GeneTable, add_moran

__all__ = ["predicted_folder"]

_OVER_SLIDES: dict[str, Callable[[Any, Any], Any]] = {"trusted": lambda a, b: a and b, "cut": max}
"""Columns of var that differ from slide to slide: a gene is trusted that is so on all of them."""

_MANY = 0.1  # share of the tiles that are unlike, from which on the verdicts on genes are put in doubt


def predicted_folder(
    folder: Path, files: Sequence[Path], asked: Asked | None = None
) -> tuple[GeneTable, list[SlideMaps], dict[str, Any]]:
    """Return the genes, the slides, and all else that the page shows of predictions, `files` of a folder."""
    slides = read_slides(files, {}, asked)
    genes = _gene_table(slides)
    about = slides[0].about
    return (
        genes,
        slides,
        {
            "run": folder.resolve().name,
            "head": str(about.get("recipe", "")),
            "about": "",
            "facts": _facts(slides),
            "warnings": _warnings(slides),
            "verdict": {"figure": None, "sentences": _sentences(slides, genes)},
            "heads": [],
            "trust": str(about.get("trusted", "")),
            "unit": str(about.get("unit", "")),
            "level": _level(about),
            "calibration": None,
            "history": [],
            "watched": "",
            "provenance": _provenance(slides),
            "recipe": "",
        },
    )


def _gene_table(slides: list[SlideMaps]) -> GeneTable:
    """Return the gene table of predictions: what each says of its genes, those first that are likeliest to hold on a
    new slide: by their PCC between halves of the training tissue, or by the lower end of its interval, or by PCC.
    """
    of: dict[str, dict[str, Any]] = {}
    for slide in slides:
        for column, values in slide.var.items():
            known, over = of.setdefault(column, {}), _OVER_SLIDES.get(column)
            for name, value in zip(slide.names, values, strict=False):  # sets of genes stand behind
                known[name] = over(known[name], value) if over is not None and name in known else value
    every = list(dict.fromkeys(name for slide in slides for name in slide.names if name not in slide.sets))
    by = next((key for key in ("half_pcc", "cv_low", "cv_pcc") if key in of), "")
    rank = {name: value for name, value in of.get(by, {}).items() if value == value}
    genes = GeneTable(sorted(every, key=lambda name: -rank.get(name, -2.0)))
    genes.sort = {"half_pcc": "half"}.get(by, by)
    judged = of.get("judged", {})  # versions before said nothing of genes without a verdict
    genes.trusted = {name: bool(value) for name, value in of.get("trusted", {}).items() if judged.get(name, True)}
    genes.column("cv_pcc", "PCC", "Mean PCC out of fold, when the head was trained", of.get("cv_pcc", {}), bar=True)
    genes.column("cv_low", "from", "Lower end of its 95 % interval", of.get("cv_low", {}))
    genes.column("cv_high", "to", "Upper end of its 95 % interval", of.get("cv_high", {}))
    genes.column("half", "halves", HALVES, of.get("half_pcc", {}))
    add_moran(genes, moran_columns(slides))
    words = "Share of its variation that was taken away, as it does not carry over between slides; the largest"
    genes.column("cut", "cut", words, of.get("cut", {}))
    return genes


def _level(about: dict[str, Any]) -> float | None:
    level = about.get("interval_level")
    return None if level is None else float(level)


def _facts(slides: list[SlideMaps]) -> list[tuple[str, str]]:
    about = slides[0].about
    tiles = sum(slide.shown["n"] for slide in slides)
    facts = [
        ("Data", f"{len(slides):,} slide{'s' * (len(slides) > 1)}, {tiles:,} tiles"),
        ("Head", str(about.get("recipe", "not recorded"))),
        ("Values", str(about.get("unit", "not recorded"))),
        ("Encoder", str(about.get("encoder", "not recorded"))),
    ]
    if about.get("intervals"):
        facts.append(("Intervals", str(about["intervals"])))
    return facts


def _sentences(slides: list[SlideMaps], genes: GeneTable) -> list[str]:
    """Say in numbers what these predictions can and cannot be used for."""
    found = []
    n = len(genes.names)
    known = [slide for slide in slides if slide.shown["percentile"]]
    if known:
        unlike = sum(len(slide.shown["unlike"]) for slide in known)
        tiles = sum(slide.shown["n"] for slide in known)
        share = unlike / max(1, tiles)
        found.append(
            f"{unlike:,} of {tiles:,} tiles ({share:.1%}) are unlike the training tiles, farther from them than "
            f"{UNLIKE:g} % of those are from other training slides; they are marked in the maps."
        )
        if share > _MANY:
            found.append(
                "Values there are extrapolated. The verdicts on genes below were found on slides like the training "
                "slides: they say little of this tissue."
            )
    if genes.trusted:
        trusted, left = sum(genes.trusted.values()), n - len(genes.trusted)
        words = str(slides[0].about.get("trusted", "")) or (
            "their PCC is surely above 0, and not surely below that of ridge-context"
        )
        unjudged = f" {left:,} were not judged, which says nothing of them." if left else ""
        found.append(
            f"{trusted:,} of {n:,} genes are to be trusted: {words}. The maps of those that failed are covered until "
            f"you ask for them.{unjudged}"
        )
    else:
        found.append(
            "Which genes to trust is not known: the head was not judged on several slides or patients that it had "
            "not seen."
        )
    return found


def _warnings(slides: list[SlideMaps]) -> list[str]:
    return [f"{slide.slide_id}: {'; '.join(slide.shown['notes'])}" for slide in slides if slide.shown["notes"]]


def _provenance(slides: list[SlideMaps]) -> list[tuple[str, str]]:
    names = {
        "recipe": "Head",
        "model": "Model",
        "model_sha256": "Model SHA-256",
        "encoder": "Encoder",
        "weights_sha256": "Weights SHA-256",
        "version": "nh2st_pipe",
    }
    found = []
    for key, label in names.items():
        values = dict.fromkeys(str(slide.about[key]) for slide in slides if key in slide.about)
        if values:
            found.append((label, ", ".join(values)))
    return found
