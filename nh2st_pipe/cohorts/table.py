"""A cohort by slide and by patient: how much of each slide is unlike the training tiles, its mean values, and which
slides stand apart.

Tiles that are unlike the training tiles are counted, and left out of the means; genes that are not trusted are left out
of gene sets and of what tells slides apart. Values of one slide are read at a time, a block of genes after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, SlideError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.evaluation.statistics import many
from nh2st_pipe.exporting.run import predictions_in
from nh2st_pipe.exporting.view import PredictionView, read_view
from nh2st_pipe.reporting.regions import find_regions, read_regions
from nh2st_pipe.reporting.sets import PREFIX, GeneSet

__all__ = ["Cohort", "SlideSummary", "cohort_of"]

_FEWEST = 5  # slides, below which none is said to stand apart
_MAD = 1.4826  # of a normal distribution's standard deviation


@dataclass(frozen=True)
class SlideSummary:
    """One slide of a cohort."""

    slide_id: str
    patient: str
    tiles: int
    unlike: int | None
    """Of its tiles, those that are unlike the training tiles; None where that is not known."""
    percentile: float | None
    """Median over its tiles: per cent of the training tiles that lie nearer to other slides' than they."""
    in_sample: str
    """In words, where the head was trained on the slide or its patient."""
    means: Mapping[str, float]
    """Gene → mean over its tiles that are not unlike."""
    measured: Mapping[str, float]
    """The same of what was measured, where it was."""

    @property
    def unlike_share(self) -> float | None:
        """Share of its tiles that are unlike the training tiles."""
        return _share(self.unlike, self.tiles)


@dataclass(frozen=True)
class RegionSummary:
    """A region of a slide, as somebody outlined it."""

    slide_id: str
    patient: str
    region: str
    tiles: int
    unlike: int | None
    """Of its tiles, those that are unlike the training tiles; None where that is not known."""
    means: Mapping[str, float]
    """Gene → mean over its tiles that are not unlike."""


@dataclass
class Cohort:
    """Many slides' predictions together."""

    slides: list[SlideSummary]
    unit: str
    genes: list[str]
    trusted: list[str]
    """The genes that are trusted on every slide that has a verdict on them, and on one at least."""
    sets: dict[str, list[str]] = field(default_factory=dict)
    """Gene set → those of its genes that are trusted (where there are verdicts at all)."""
    regions: list[RegionSummary] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def matrix(self, genes: Sequence[str]) -> NDArray[np.float64]:
        """Return slides × genes means, NaN where a slide has none."""
        return np.array(
            [[slide.means.get(gene, np.nan) for gene in genes] for slide in self.slides], np.float64
        ).reshape(len(self.slides), len(genes))

    def standardised(self, genes: Sequence[str]) -> NDArray[np.float64]:
        """Return slides × genes: how many deviations a slide's mean lies from the cohort's median (by the MAD)."""
        return self._against(self.matrix(genes), genes)

    def _against(self, means: NDArray[np.float64], genes: Sequence[str]) -> NDArray[np.float64]:
        """Return means (… × genes) in deviations from the slides' median."""
        values = self.matrix(genes)
        with quiet_warnings():  # of a gene that no slide has a value of
            middle = np.nanmedian(values, axis=0) if len(values) else np.full(len(genes), np.nan)
            spread = _MAD * np.nanmedian(np.abs(values - middle), axis=0) if len(values) else middle
            return np.asarray(np.where(spread > 0, (means - middle) / np.where(spread > 0, spread, 1), np.nan))

    def apart(self) -> NDArray[np.float64]:
        """Return how far each slide stands apart: the median over trusted genes (all, where none was judged) of how
        many deviations its mean lies from the cohort's median. NaN of fewer than five slides.
        """
        away = np.abs(self.standardised(self.trusted or self.genes))
        if len(self.slides) < _FEWEST or not away.shape[1]:
            return np.full(len(self.slides), np.nan)
        known = np.isfinite(away).any(axis=1)
        found = np.full(len(self.slides), np.nan)
        found[known] = np.nanmedian(away[known], axis=1)
        return found

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Return each gene set's score of each slide: the mean over its genes of their deviations. NaN of fewer than
        five slides.
        """
        return {name: self._score(self.standardised(genes)) for name, genes in self.sets.items()}

    def _score(self, away: NDArray[np.float64]) -> NDArray[np.float64]:
        known = np.isfinite(away).any(axis=1)
        score = np.full(len(away), np.nan)
        if len(self.slides) >= _FEWEST:
            score[known] = np.nanmean(away[known], axis=1)
        return score

    def regions_frame(self) -> pl.DataFrame:
        """Return a row a region: its tiles, and the gene sets' scores there, in deviations of slides' means."""
        scores = dict[str, NDArray[np.float64]]()
        for name, genes in self.sets.items():
            means = np.array([[region.means.get(gene, np.nan) for gene in genes] for region in self.regions], float)
            scores[name] = self._score(self._against(means.reshape(len(self.regions), len(genes)), genes))
        rows = [
            {
                "slide_id": region.slide_id,
                "patient": region.patient,
                "region": region.region,
                "tiles": region.tiles,
                "unlike_share": _share(region.unlike, region.tiles),
                **{name: _known(score[number]) for name, score in scores.items()},
            }
            for number, region in enumerate(self.regions)
        ]
        return pl.DataFrame(rows, infer_schema_length=None)

    def by_region(self) -> anndata.AnnData:
        """Return regions × genes: the means over a region's tiles that are not unlike the training tiles."""
        names = [f"{region.slide_id}, {region.region}" for region in self.regions]
        obs = pd.DataFrame(index=pd.Index(names, name="place", dtype=object))
        for column in ("slide_id", "patient", "region"):
            obs[column] = [getattr(region, column) for region in self.regions]
        obs["tiles"] = [region.tiles - (region.unlike or 0) for region in self.regions]
        values = [[region.means.get(gene, np.nan) for gene in self.genes] for region in self.regions]
        data = anndata.AnnData(np.array(values, np.float32).reshape(len(names), len(self.genes)), obs=obs)
        data.var = self._var()
        data.uns["nh2st_pipe"] = {"unit": f"{self.unit}; mean over tiles that are not unlike the training tiles"}
        return data

    def _var(self) -> pd.DataFrame:
        var = pd.DataFrame(index=pd.Index(self.genes, name="gene", dtype=object))
        trusted = set(self.trusted)
        var["trusted"] = [gene in trusted for gene in self.genes]
        return var

    def frame(self) -> pl.DataFrame:
        """Return the table, a row a slide: those that stand apart first."""
        apart, scores = self.apart(), self.scores()
        rows = []
        for number, slide in enumerate(self.slides):
            row: dict[str, Any] = {
                "slide_id": slide.slide_id,
                "patient": slide.patient,
                "tiles": slide.tiles,
                "unlike_share": slide.unlike_share,
                "train_percentile": slide.percentile,
                "apart": _known(apart[number]),
                **{name: _known(score[number]) for name, score in scores.items()},
                "in_sample": slide.in_sample,
            }
            rows.append(row)
        rows.sort(key=lambda row: (-(row["unlike_share"] or 0.0), -(row["apart"] or 0.0), row["slide_id"]))
        return pl.DataFrame(rows, infer_schema_length=None)

    def by_patient(self) -> anndata.AnnData:
        """Return patients × genes: the mean over a patient's slides of their means, each slide as much as another, for
        statistics elsewhere; layers["measured"] where there is something measured; tiles and slides in obs.
        """
        of: dict[str, list[SlideSummary]] = {}
        for slide in self.slides:
            of.setdefault(slide.patient, []).append(slide)

        def mean(kind: str) -> NDArray[np.float32]:
            rows = []
            for slides in of.values():
                values = np.array([[getattr(s, kind).get(gene, np.nan) for gene in self.genes] for s in slides])
                known = np.isfinite(values)
                n = known.sum(axis=0)
                rows.append(np.where(n > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(n, 1), np.nan))
            return np.array(rows, np.float32).reshape(len(of), len(self.genes))

        obs = pd.DataFrame(index=pd.Index(list(of), name="patient", dtype=object))
        obs["slides"] = [len(slides) for slides in of.values()]
        obs["tiles"] = [sum(s.tiles - (s.unlike or 0) for s in slides) for slides in of.values()]
        data = anndata.AnnData(mean("means"), obs=obs, var=self._var())
        if any(slide.measured for slide in self.slides):
            data.layers["measured"] = mean("measured")
        words = "mean over a patient's slides of the mean over tiles that are not unlike the training tiles"
        data.uns["nh2st_pipe"] = {"unit": f"{self.unit}; {words}"}
        return data


def cohort_of(
    predictions: str | Path,
    sets: Sequence[GeneSet] = (),
    regions: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> Cohort:
    """Read predictions, a folder of them or a run, and put them together. `regions` is a folder of SLIDE.geojson, as
    QuPath exports them, of some slides or all.

    Raises UsageError where regions are of no slide here; RunError where there are no predictions, or they are of values
    that cannot be compared. Faults of single slides are in the cohort.
    """
    files, verdicts = predictions_in(Path(predictions))
    slides, failed, units = dict[str, SlideSummary](), dict[str, str](), dict[str, str]()
    judged: dict[str, list[bool]] = {}
    file_of = dict[str, Path]()
    of: dict[str, None] = {}
    progress = progress or Progress()
    progress.start("reading predictions", len(files), "slides")
    for number, file in enumerate(files):
        progress.advance(number, len(files), file.stem)
        try:
            view = read_view(file, verdicts)
            summary = _summary(view)
        except RunError as error:
            failed[file.stem] = str(error)
            continue
        if summary.slide_id in slides:
            raise RunError(f"{file} is of slide {summary.slide_id}, of which there is a prediction already")
        units.setdefault(view.unit, summary.slide_id)
        if len(units) > 1:
            (one, first), (two, second) = list(units.items())[:2]
            raise RunError(f"{first} is predicted as {one or 'values without a unit'}, and {second} as {two}")
        slides[summary.slide_id], file_of[summary.slide_id] = summary, file
        of |= dict.fromkeys(view.genes)
        for gene, verdict in zip(view.genes, view.trusted, strict=True):
            if verdict is not None:
                judged.setdefault(gene, []).append(verdict)
    if not slides:
        raise RunError(f"none of {len(files):,} predictions can be read: {next(iter(failed.values()))}")
    genes = list(of)
    trusted = [gene for gene in genes if gene in judged and all(judged[gene])]
    doubted = set(genes).difference(trusted) if judged else set()
    found = Cohort(list(slides.values()), next(iter(units)), genes, trusted, failed=failed)
    for slide_id, outlines in ({} if regions is None else find_regions(regions, list(slides))).items():
        try:
            found.regions += _regions(read_view(file_of[slide_id], verdicts), slides[slide_id].patient, outlines)
        except (RunError, SlideError) as error:
            found.failed[f"{slide_id}, its regions"] = str(error)
    for each in sets:
        places, words = each.of(genes, doubted)
        if places:
            found.sets[f"{PREFIX}{each.name}"] = [genes[place] for place in places]
            found.notices.append(f"{PREFIX}{each.name} is of {words}")
        else:
            found.notices.append(
                f"no score of {each.name}: fewer than two of its genes are predicted and not untrusted"
            )
    if not judged:
        found.notices.append("no gene was judged: which to trust is not known, and all tell slides apart")
    if len(slides) < _FEWEST:
        found.notices.append(f"{many(len(slides), 'slide')} are too few to tell what stands apart, or how sets score")
    return found


def _regions(view: PredictionView, patient: str, outlines: Path) -> list[RegionSummary]:
    """Return the means of a slide's regions."""
    known, found = "unlike" in view.obs, []
    for region in read_regions(outlines, view.every_xy, view.image.origin or (0, 0)):
        unlike = view.unlike[region.rows]
        kept = region.rows[~unlike]
        means = dict(_means(view, "", kept)) if len(kept) else {}
        tiles = int(unlike.sum()) if known else None
        found.append(RegionSummary(view.slide_id, patient, region.name, len(region.rows), tiles, means))
    return found


def _summary(view: PredictionView) -> SlideSummary:
    unlike = view.unlike
    known = "unlike" in view.obs
    kept = np.flatnonzero(~unlike)

    def means(layer: str) -> dict[str, float]:
        return dict(_means(view, layer, kept)) if len(kept) else {}

    percentile = view.percentile
    return SlideSummary(
        slide_id=view.slide_id,
        patient=str(view.about.get("patient") or view.slide_id),
        tiles=len(view),
        unlike=int(unlike.sum()) if known else None,
        percentile=None if percentile is None or not len(percentile) else float(np.median(percentile)),
        in_sample=str(view.about.get("in_sample", "")),
        means=means(""),
        measured=means("target") if "target" in view.layers else {},
    )


def _means(view: PredictionView, layer: str, rows: NDArray[np.int64]) -> Iterator[tuple[str, float]]:
    genes = view.genes
    for block in view.blocks():
        values = view.values(layer, of=block)[rows]
        seen = np.isfinite(values)
        n = seen.sum(axis=0)
        total = np.where(seen, values, 0).sum(axis=0, dtype=np.float64)
        yield from ((gene, float(t / k)) for gene, t, k in zip(genes[block], total, n, strict=True) if k)


def _share(unlike: int | None, tiles: int) -> float | None:
    return None if unlike is None or not tiles else unlike / tiles


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
