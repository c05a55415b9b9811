"""Encoders side by side on a pilot of a study: what a head reaches with each, how fast it is here, how long all takes.

The same spots, folds and genes for every encoder; ridge-context on them, whose fitting has no luck in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nh2st_pipe.benching.pilot import make_pilot
from nh2st_pipe.core.errors import OF_ONE_SLIDE, NH2STError, UsageError, listed
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.data.folds import Listed, usual_folds
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.evaluation.compare import compare
from nh2st_pipe.recipes.encoder import EncoderRecipe, load_encoder_recipe
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.resolution import TileSize, check_tile_options
from nh2st_pipe.tiles.layout import lay_out
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest
from nh2st_pipe.training.run import train

__all__ = ["Benched", "bench"]

_HEAD = "ridge-context"
_COUNTED = 12  # slides whose tiles are counted; the others are taken to have as many


@dataclass
class Benched:
    """What `bench` found."""

    out: Path
    spots: int = 0
    """Of the pilot, for each encoder."""
    slides: int = 0
    unit: str = "slide"
    """What the interval is over: patient or slide."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per encoder, the best first: `encoder`, `dim`, `pcc` (mean over units), `low`, `high` (its 95 %
    interval, None for a single unit), `behind` (by how much PCC is less than the best's, with `behind_low`,
    `behind_high`), `verdict`, `tiles_per_second` (reading, encoding and writing, on this machine), `tiles` and `hours`
    (the whole manifest), `commercial` and `gated`."""
    failed: dict[str, str] = field(default_factory=dict)
    """Encoders that could not be tried, each with its cause."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Slides that could not be used, each with its cause."""
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "out": str(self.out)}


def bench(
    slides: str | Path,
    encoders: Sequence[str | Path | EncoderRecipe],
    *,
    pilot: int = 200,
    pilot_slides: int = 12,
    weights: Mapping[str, str | Path] | None = None,
    folds: str | None = None,
    genes: int | None = None,
    out: str | Path = "bench",
    tile_um: float | None = None,
    tile_px: float | None = None,
    seed: int = 2021,
    device: str = "auto",
    workers: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Benched:
    """Embed `pilot` spots on each of at most `pilot_slides` slides of the manifest `slides` with every encoder.

    `weights` holds files by encoder, for those that are not to come from the hub. `folds` None leaves out patients
    where there are several, else slides, else blocks; `genes` is the size of the panel. What is in `out` already is not
    embedded again, only trained on. An encoder that cannot be had is passed over by name, as a slide is.

    Raises ManifestError and UsageError before any work.
    """
    check_tile_options(tile_um, tile_px)
    if pilot < 1 or pilot_slides < 1:
        raise UsageError("a pilot has at least one spot on one slide")
    recipes = [each if isinstance(each, EncoderRecipe) else load_encoder_recipe(each) for each in encoders]
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise UsageError("give encoders to compare, each once: --encoders uni2-h,virchow2")
    strange = sorted(set(weights or {}) - set(names))
    if strange:
        raise UsageError(f"there are weights for {listed(strange)}, and the encoders are {listed(names)}")
    rows, progress, found = read_manifest(slides), progress or Progress(), Benched(Path(out))
    tried = make_pilot(rows, found.out, pilot, pilot_slides, seed)
    found.left_out |= tried.failed
    found.slides = len(tried.rows)
    protocol = folds or usual_folds([Listed(row.slide_id, row.patient, row.extra) for row in tried.rows])[0]
    runs: dict[str, Path] = {}
    rates: dict[str, float | None] = {}
    for recipe in recipes:
        progress.say(f"encoder {recipe.name}")
        try:
            given = (weights or {}).get(recipe.name)
            store = tried.folder / f"{recipe.name}.zarr"
            done = embed(
                tried.manifest,
                encoder=recipe,
                weights=given,
                store=store,
                tile_um=tile_um,
                tile_px=tile_px,
                device=device,
                workers=workers,
                stain_shift="off",
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            found.left_out |= done.failed
            rates[recipe.name] = _rate(store)
            run = tried.folder / f"{recipe.name}.run"
            shutil.rmtree(run, ignore_errors=True)  # of an earlier call, which may have had other slides
            result = train(
                store,
                recipe=_HEAD,
                genes=genes,
                folds=protocol,
                out=run,
                settings=["baselines=[]"],
                seed=seed,
                device=device,
                progress=progress,
            )
            found.spots = max(found.spots, sum(fold["n_spots"] for fold in result.metrics["folds"]))
            runs[recipe.name] = run
        except NH2STError as error:
            found.failed[recipe.name] = str(error)
    if runs:
        _compare(found, runs)
        _extrapolate(found, rows, {recipe.name: recipe for recipe in recipes}, rates, tile_um, tile_px, progress)
        found.notes.append(f"folds by {protocol}, {_HEAD}, the same spots and genes for each encoder")
    with written_whole(found.out / "bench.json") as part:
        part.write_text(json.dumps(found.record(), indent=2) + "\n", "utf-8")
    return found


def _rate(store: Path) -> float | None:
    """Return tiles/s of the last call of `embed` that encoded any, from the store's log."""
    lines = (store / "log.jsonl").read_text("utf-8").splitlines() if (store / "log.jsonl").is_file() else []
    rates = [json.loads(line)["tiles_per_second"] for line in lines]
    return next((float(rate) for rate in reversed(rates) if rate), None)


def _compare(found: Benched, runs: Mapping[str, Path]) -> None:
    """Fill in what the head reaches with each encoder, against the best."""
    reached = {name: compare([run]).rows[0]["pcc"] for name, run in runs.items()}
    order = sorted(runs, key=lambda name: -(reached[name] if reached[name] is not None else -np.inf))
    compared = compare([runs[name] for name in order])
    found.unit, found.notes = compared.unit, [*found.notes, *compared.notes]
    for name, row in zip(order, compared.rows, strict=True):
        low, high = row["interval"] or (None, None)
        behind = row.get("difference", {}).get("pcc", {"mean": 0.0, "low": None, "high": None})
        found.rows.append(
            {
                "encoder": name,
                "pcc": row["pcc"],
                "low": low,
                "high": high,
                "behind": behind["mean"],
                "behind_low": behind["low"],
                "behind_high": behind["high"],
                "verdict": row.get("verdict", "best"),
            }
        )


def _extrapolate(
    found: Benched,
    rows: Sequence[SlideRow],
    recipes: Mapping[str, EncoderRecipe],
    rates: Mapping[str, float | None],
    tile_um: float | None,
    tile_px: float | None,
    progress: Progress,
) -> None:
    """Fill in how long the whole manifest would take, and what else decides which encoder it is to be."""
    counted: dict[TileSize, tuple[float, int]] = {}
    for row in found.rows:
        recipe, rate = recipes[row["encoder"]], rates[row["encoder"]]
        size = TileSize(tile_um, tile_px) if tile_um or tile_px else TileSize(um=recipe.input_px * recipe.mpp)
        if size not in counted:
            progress.say("counting the tiles of the whole manifest")
            counted[size] = _tiles(rows, size)
        tiles = counted[size][0]
        row |= {
            "dim": recipe.dim,
            "tiles_per_second": rate,
            "tiles": round(tiles),
            "hours": None if rate is None else tiles / rate / 3600,
            "commercial": recipe.commercial,
            "gated": recipe.gated,
        }
    of = min(seen for _, seen in counted.values())
    if of < len(rows):
        found.notes.append(f"tiles of the whole manifest: estimated from {of} of its {len(rows):,} slides")


def _tiles(rows: Sequence[SlideRow], size: TileSize) -> tuple[float, int]:
    """Return the tiles of all slides, and on how many of them they were counted."""
    total, seen = 0.0, 0
    for kind in (True, False):
        of = [row for row in rows if (row.expression is not None) is kind]
        at = {round(place) for place in np.linspace(0, len(of) - 1, min(len(of), _COUNTED))}
        counts = [count for i in sorted(at) if (count := _count(of[i], size)) is not None]
        total += float(np.mean(counts)) * len(of) if counts else 0.0
        seen += len(counts)
    return total, seen


def _count(row: SlideRow, size: TileSize) -> int | None:
    try:
        slide = open_slide(row.slide)
        try:
            return len(lay_out(row, slide, size).spots)
        finally:
            slide.close()
    except OF_ONE_SLIDE:
        return None
