"""What a report says of predictions: what they are of, which genes to trust, and which slides are unlike others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nh2st_pipe.evaluation.reference import UNLIKE
from nh2st_pipe.reporting.maps import SlideMaps, read_slides
from nh2st_pipe.reporting.tables import HALVES, GeneTable

__all__ = ["predicted_folder"]


def predicted_folder(folder: Path, files: Sequence[Path]) -> tuple[GeneTable, list[SlideMaps], dict[str, Any]]:
    """Return the genes, the slides, and all else that the page shows of predictions, `files` of a folder."""
    slides = read_slides(files, {})
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
    """Return the gene table of predictions: what each says of its genes, those with the best PCC out of fold first."""
    of: dict[str, dict[str, Any]] = {}
    for slide in slides:
        for column, values in slide.var.items():
            of.setdefault(column, {}).update(zip(slide.names, values, strict=True))
    every = list(dict.fromkeys(name for slide in slides for name in slide.names))
    pcc = {name: value for name, value in of.get("cv_pcc", {}).items() if value == value}
    genes = GeneTable(sorted(every, key=lambda name: -pcc.get(name, -2.0)))
    genes.trusted = {name: bool(value) for name, value in of.get("trusted", {}).items()}
    genes.column("cv_pcc", "PCC", "Mean PCC out of fold, when the head was trained", of.get("cv_pcc", {}), bar=True)
    genes.column("cv_low", "from", "Lower end of its 95 % interval", of.get("cv_low", {}))
    genes.column("cv_high", "to", "Upper end of its 95 % interval", of.get("cv_high", {}))
    genes.column("half", "halves", HALVES, of.get("half_pcc", {}))
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
    if genes.trusted:
        trusted = sum(genes.trusted.values())
        found.append(
            f"{trusted:,} of {n:,} genes are to be trusted: out of fold their PCC is surely above 0, and not surely "
            "below that of ridge-context. The maps of the others are covered until you ask for them."
        )
    else:
        found.append(
            "Which genes to trust is not known: the head was not judged on several slides or patients that it had "
            "not seen."
        )
    known = [slide for slide in slides if slide.shown["percentile"]]
    if known:
        unlike = sum(len(slide.shown["unlike"]) for slide in known)
        tiles = sum(slide.shown["n"] for slide in known)
        found.append(
            f"{unlike:,} of {tiles:,} tiles ({unlike / max(1, tiles):.1%}) are unlike the training tiles, farther from "
            f"them than {UNLIKE:g} % of those are from other training slides; they are marked in the maps."
        )
    return found


def _warnings(slides: list[SlideMaps]) -> list[str]:
    return [f"{slide.slide_id}: {words}" for slide in slides for words in slide.shown["notes"]]


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
