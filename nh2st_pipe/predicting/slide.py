"""One slide after another, by a trained head: what decides a prediction, what is said of it, and its file.

It can be done in another process, on another machine: a `Job` is all that it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import NH2STError, SlideError, StoreError, TrainError
from nh2st_pipe.data.pitch import overlap_for, parted, pitch_in_tiles, sublattice
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import TargetsOf
from nh2st_pipe.evaluation.reference import UNLIKE, Familiarity, Reference
from nh2st_pipe.heads.base import Blocked, HeadModel
from nh2st_pipe.heads.blocked import joined
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.model import load_model, load_reference, model_files
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.format import SlideRecord
from nh2st_pipe.store.read import SlideData, Store, open_store

__all__ = ["Job", "Predictor", "Said", "predictor_there"]

_PITCH_TOLERANCE = 0.15
_UNLIKE_SHARE = 0.1  # of a slide's tiles, from which on it is spoken of


@dataclass(frozen=True)
class Job:
    """All that decides what is predicted, and where it goes; it can be pickled."""

    model: str | Path
    store: str
    out: Path
    fixed: dict[str, Any]
    sums: tuple[str, ...]
    """Hashes of the model's files."""
    columns: NDArray[np.int64]
    half_width: dict[str, float] | None
    any_mpp: bool
    half: bool
    query: tuple[str, ...] = ()
    """Genes that the head was not trained on, and predicts too."""

    def made_from(self, record: SlideRecord) -> str:
        """Return a hash of all that decides a slide's prediction."""
        decides = {
            "fixed": self.fixed,
            "model": self.sums,
            "columns": self.columns.tolist(),
            "any_mpp": self.any_mpp,
            "half": self.half,
            "query": self.query,
            "slide": record.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Said:
    """What came of a slide."""

    notices: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    kept: bool = False
    """Whether it was there already."""


_NOTICES = ("in_sample", "caution", "unlike", "pitch", "carried")


class Predictor:
    """Predicts slides, one after another."""

    def __init__(
        self,
        job: Job,
        device: torch.device,
        loaded: tuple[HeadModel, Reference | None, Store] | None = None,
    ) -> None:
        if loaded is None:
            files = model_files(job.model)
            head = load_model(job.model, files)
            loaded = head.asking(job.query) if job.query else head, load_reference(files), open_store(job.store)
        self._job, self._device = job, device
        self._head, self._reference, self._store = loaded
        self._head.to(device)
        self._about = About.of(self._head.about, job.model)

    def do(self, name: str) -> Said:
        """Predict one slide, unless what is there is of the same model, tiles and options."""
        job, about, head = self._job, self._about, self._head
        path = job.out / f"{name}.h5ad"
        try:
            made_from = job.made_from(self._store.complete(name))
            kept = _kept(path, made_from)
            if kept is not None:
                return kept
            slide = self._store.read(name, first_view_only=about.features.views == "first")
            refused = None if job.any_mpp else about.refusal(name, slide.mpp)
            if refused is not None:
                raise SlideError(refused)
            predicted, familiar, apart = _predict(head, slide, about, self._reference, self._device)
        except (StoreError, SlideError, TrainError) as error:  # one slide that cannot be predicted; the others go on
            return Said(failed=str(error))
        found = (
            about.seen().words(slide.image_fingerprint, slide.patient),
            _caution(head, predicted, about),
            _unlike(familiar),
            apart,
            None if predicted.carried is None else predicted.carried.words(job.columns),
        )
        notices = {key: words for key, words in zip(_NOTICES, found, strict=True) if words}
        write_prediction(
            path,
            slide,
            head.genes,
            predicted,
            _truth(slide, head.genes, about),
            about.targets,
            {**job.fixed, **notices, "made_from": made_from},
            self._by_gene(),
            half_width=job.half_width,
            familiar=familiar,
            columns=job.columns,
            scale_genes=about.scale_genes,
            n_scale_genes=about.n_scale_genes,
            half=job.half,
        )
        return Said(notices)

    def _by_gene(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each gene, by column."""
        names = ("cv_pcc", "cv_low", "cv_high", "trusted", "half_pcc")
        known: dict[str, dict[str, Any]] = {name: getattr(self._about, name) for name in names}
        if self._job.query:
            asked = set(self._job.query)
            known["seen"] = {gene: gene not in asked for gene in self._head.genes}
        return known


def predictor_there(job: Job, device: str, threads: int) -> Predictor:
    """Return what predicts slides in a process of its own."""
    torch.set_num_threads(threads)
    return Predictor(job, torch.device(device))


def _kept(path: Path, made_from: str) -> Said | None:
    """Return what a prediction that is there says of itself, where it is made from the same; None where it is not."""
    import h5py

    if not path.is_file():
        return None
    try:
        with h5py.File(path) as file:
            about = file["uns/nh2st_pipe"]
            known = {name: about[name][()].decode() for name in ("made_from", *_NOTICES) if name in about}
    except Exception:  # whatever it is; it is made anew
        return None
    if known.pop("made_from", "") != made_from:
        return None
    return Said(known, kept=True)


def _unlike(familiar: Familiarity | None) -> str | None:
    """Say in words that many of a slide's tiles are unlike those that were trained on, if so."""
    if familiar is None or not len(familiar.unlike):
        return None
    share = float(familiar.unlike.mean())
    if share <= _UNLIKE_SHARE:
        return None
    return (
        f"{share:.0%} of its tiles lie farther from the training tiles than {UNLIKE:g}% of those lie from each other's "
        'slides (obs["unlike"] is "yes"); their values are extrapolated'
    )


def _predict(
    head: HeadModel, slide: SlideData, about: About, reference: Reference | None, device: torch.device
) -> tuple[Blocked, Familiarity | None, str | None]:
    """Return a head's prediction for a slide, each of its tiles among neighbours at the pitch that was trained on; how
    far they are from the training tiles; and what has to be known where that pitch cannot be had.
    """
    said = list[tuple[NDArray[np.int64], Blocked]]()
    distance, percentile = (np.empty(len(slide), np.float32) for _ in range(2))
    step, parts = parted(slide, about.pitch)
    for rows in parts:
        samples = Samples.of(
            [sublattice(slide, rows, step)],
            neighbours=about.features.neighbours,
            device=device,
            smoothed=about.targets.smooth != "none",
        )
        said.append((rows, head.predict_blocked(samples)))
        if reference is not None:
            familiar = reference.of_tiles(samples)
            distance[rows], percentile[rows] = familiar.distance, familiar.percentile
    known = Familiarity(distance, percentile) if reference is not None else None
    return joined(said, len(slide)), known, _pitch_apart(slide, about, step)


def _pitch_apart(slide: SlideData, about: About, step: int) -> str | None:
    """Say in words that tiles have their neighbours at another distance than was trained on, if so."""
    own = pitch_in_tiles(slide)
    if own is None or about.pitch is None or slide.measured:
        return None
    pitch = own * step
    if abs(pitch / about.pitch - 1) <= _PITCH_TOLERANCE:
        return None
    return (
        f"its tiles see neighbours {pitch:.2f} tiles away, and the head was trained on spots {about.pitch:.2f} apart; "
        f"embed it with --overlap {overlap_for(about.pitch):g}"
    )


def _caution(head: HeadModel, predicted: Blocked, about: About) -> str | None:
    """Return why a prediction should be believed less, and how like the training slides are to each other."""
    words = head.caution(predicted)
    if words is None or not about.likeness:
        return words
    low, high = min(about.likeness.values()), max(about.likeness.values())
    return f"{words}. The training slides, each held out, had a likeness of {low:.2f} to {high:.2f}"


def _truth(slide: SlideData, genes: list[str], about: About) -> Callable[[slice], NDArray[np.float32]] | None:
    """Return what gives the targets of some of the genes where the slide has counts and they can be made from them."""
    if not slide.measured:
        return None
    try:
        return TargetsOf(slide, genes, about.targets, about.scale_genes or None).values
    except NH2STError:  # no grid to smooth over: a prediction needs no truth
        return None
