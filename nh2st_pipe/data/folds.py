"""Which slides are trained on and which are judged. No patient is ever on both sides, unless asked for by slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.store.read import SlideData

__all__ = ["Fold", "hold_out", "kfold", "make_folds"]


@dataclass(frozen=True)
class Fold:
    """One split, by slide_id."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def kfold(n: int, k: int, seed: int) -> list[list[int]]:
    """Return the test indices of k shuffled folds of n things, as scikit-learn's KFold(k, shuffle=True, seed)."""
    # The legacy generator is the one scikit-learn draws from; published splits depend on it.
    order = np.random.RandomState(seed).permutation(n)
    return [sorted(int(i) for i in part) for part in np.array_split(order, k)]


def make_folds(slides: Sequence[SlideData], by: str, seed: int) -> list[Fold]:
    """Split `slides`: "patient" or "slide" leaves one out in turn, a number makes that many folds of patients,
    "none" makes no folds.

    Raises TrainError where there are too few groups, UsageError where `by` says none of these.
    """
    if by == "none":
        return []
    groups: dict[str, list[str]] = {}
    for slide in sorted(slides, key=lambda s: s.slide_id):
        groups.setdefault(slide.slide_id if by == "slide" else slide.patient, []).append(slide.slide_id)
    names = sorted(groups)
    if by in ("patient", "slide"):
        tests = [(name, [name]) for name in names]
    elif by.isdecimal() and int(by) >= 2:
        if len(names) < int(by):
            raise TrainError(f"{by} folds of patients need at least {by} patients, and there are {len(names)}")
        parts = kfold(len(names), int(by), seed)
        tests = [(f"fold {i}", [names[j] for j in part]) for i, part in enumerate(parts, start=1)]
    else:
        raise UsageError(f"--folds takes patient, slide, none or a number from 2 on, not '{by}'")
    if len(names) < 2:
        others = {slide.slide_id for slide in slides}
        hint = f"; its {len(others)} slides can be left out in turn with --folds slide" if len(others) > 1 else ""
        raise TrainError(
            f"folds by {by} need at least two {by}s, and there is one ({names[0]}){hint}; "
            "--folds none trains on everything without judging"
        )
    every = [slide_id for name in names for slide_id in groups[name]]
    folds = []
    for name, held in tests:
        test = [slide_id for group in held for slide_id in groups[group]]
        folds.append(Fold(name, tuple(s for s in every if s not in test), tuple(test)))
    return folds


def hold_out(slides: Sequence[SlideData], seed: int) -> tuple[str, ...]:
    """Return the training slides on which epochs are chosen: one patient's, or one slide where there is one patient.

    Empty where there is only one slide.
    """
    patients = sorted({slide.patient for slide in slides})
    if len(patients) > 1:
        chosen = patients[int(np.random.default_rng(seed).integers(len(patients)))]
        return tuple(sorted(slide.slide_id for slide in slides if slide.patient == chosen))
    ids = sorted(slide.slide_id for slide in slides)
    return (ids[int(np.random.default_rng(seed).integers(len(ids)))],) if len(ids) > 1 else ()
