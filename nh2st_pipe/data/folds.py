"""Which slides are trained on and which are judged. No patient is ever on both sides, unless asked for by slide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nh2st_pipe.core.errors import TrainError, UsageError, listed
from nh2st_pipe.data.blocks import BLOCKS

__all__ = [
    "Fold",
    "Foldable",
    "Listed",
    "checked_folds",
    "hold_out",
    "kfold",
    "make_folds",
    "on_both_sides",
    "usual_folds",
]


class Foldable(Protocol):
    """What folds are made of: a slide, a block of one, or what a manifest says of one."""

    @property
    def name(self) -> str:
        """The slide's, with the number of the block where it is one."""
        ...

    @property
    def slide_id(self) -> str:
        """The slide."""
        ...

    @property
    def patient(self) -> str:
        """Its patient; the slide's own name where none is told."""
        ...

    @property
    def extra(self) -> dict[str, str]:
        """Other columns of the manifest."""
        ...

    @property
    def block(self) -> int | None:
        """Which block of the slide it is; None for all of it."""
        ...


@dataclass(frozen=True)
class Listed:
    """A slide as a manifest or a store's records list it, before anything of it is read."""

    slide_id: str
    patient: str
    extra: dict[str, str]
    block: int | None = None

    @property
    def name(self) -> str:
        """The slide's."""
        return self.slide_id


@dataclass(frozen=True)
class Fold:
    """One split, by the names of slides, or of blocks of them."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def kfold(n: int, k: int, seed: int) -> list[list[int]]:
    """Return the test indices of k shuffled folds of n things, as scikit-learn's KFold(k, shuffle=True, seed)."""
    # The legacy generator is the one scikit-learn draws from; published splits depend on it.
    order = np.random.RandomState(seed).permutation(n)
    return [sorted(int(i) for i in part) for part in np.array_split(order, k)]


def make_folds(slides: Sequence[Foldable], by: str, seed: int) -> list[Fold]:
    """Split `slides`. `by` is what is left out in turn: "patient", "slide", or a column of the manifest.

    With ":K" behind it (or a K alone, for patients) K folds of whole groups are made. "block" leaves one block out of
    every slide in turn, `slides` being blocks; "none" makes no folds.

    Raises TrainError where there are too few groups, UsageError where `by` says none of these.
    """
    if by == "none":
        return []
    if by == "block":
        return [_fold(f"block {n}", slides, lambda s, n=n: s.block == n) for n in range(1, BLOCKS + 1)]  # type: ignore[misc]
    column, number = _parsed(by, slides)
    group = {slide.name: _group(slide, column) for slide in slides}
    names = sorted(set(group.values()))
    what = column if column in ("patient", "slide") else f"{column} group"
    if number is not None and len(names) < number:
        raise TrainError(f"{number} folds of {what}s need at least {number} {what}s, and there are {len(names)}")
    if len(names) < 2:
        others = {slide.slide_id for slide in slides}
        hint = (
            f"its {len(others)} slides can be left out in turn with --folds slide"
            if len(others) > 1
            else "--folds block leaves out parts of it in turn"
        )
        raise TrainError(
            f"folds by {column} need at least two {what}s, and there is one ({names[0]}); {hint}; "
            "--folds none trains on everything without judging"
        )
    if number is None:
        return [_fold(name, slides, lambda s, name=name: group[s.name] == name) for name in names]  # type: ignore[misc]
    parts = [{names[j] for j in part} for part in kfold(len(names), number, seed)]
    return [
        _fold(f"fold {i}", slides, lambda s, part=part: group[s.name] in part)  # type: ignore[misc]
        for i, part in enumerate(parts, start=1)
    ]


def usual_folds(slides: Iterable[Foldable]) -> tuple[str, str]:
    """Return by what to leave out where nothing is asked for, and why not by patient.

    Patients where there are several, else slides where there are several, else blocks of the one slide.
    """
    known = list(slides)
    if len({slide.patient for slide in known}) > 1:
        return "patient", ""
    if len(known) > 1:
        return "slide", (
            f"all {len(known)} slides are of one patient: folds leave out slides, and the figures say nothing of "
            "new patients"
        )
    return "block", "there is one slide: folds leave out blocks of it"


def checked_folds(slides: Sequence[Foldable], asked: str | None, usual: str, seed: int) -> tuple[str, str]:
    """Return by what folds of `slides` are made, and what has to be said of it, before anything of them is read.

    That is what is `asked` for; where nothing is, the `usual` ones, by patient if there are several (`usual_folds`).
    Raises what `make_folds` raises.
    """
    by, why = asked or usual, ""
    if asked is None and usual == "patient":
        by, why = usual_folds(slides)
    if by != "block":
        make_folds(slides, by, seed)
    return by, why


def on_both_sides(slides: Sequence[Foldable], folds: Sequence[Fold]) -> list[str]:
    """Return the patients that stand on both sides of a fold."""
    patient = {slide.name: slide.patient for slide in slides}
    both = [{patient[name] for name in fold.train} & {patient[name] for name in fold.test} for fold in folds]
    return sorted(set().union(*both))


def _parsed(by: str, slides: Sequence[Foldable]) -> tuple[str, int | None]:
    """Return the group's column and the number of folds, None where each group is one."""
    column, _, number = ("patient", ":", by) if by.isdecimal() else by.partition(":")
    columns = sorted({key for slide in slides for key in slide.extra})
    known = column in ("patient", "slide", *columns)
    if not known or (number and not (number.isdecimal() and int(number) >= 2)):
        have = f" (this store has {listed(columns)})" if columns else " (this store has none)"
        raise UsageError(
            "--folds takes patient, slide, block, none, a number of patients from 2 on, or a column of the manifest"
            f"{have}; with :K behind it for K folds of whole groups. Not '{by}'"
        )
    return column, int(number) if number else None


def _group(slide: Foldable, column: str) -> str:
    if column == "slide":
        return slide.slide_id
    found = slide.patient if column == "patient" else slide.extra.get(column, "")
    if not found:
        raise TrainError(f"slide {slide.slide_id} has nothing in the column '{column}', which the folds are made by")
    return found


def _fold(name: str, slides: Sequence[Foldable], held: Callable[[Foldable], bool]) -> Fold:
    """Return the fold whose test slides are those that are `held`; groups stay together, by patient and slide."""
    order = sorted(slides, key=lambda s: (s.patient, s.name))
    return Fold(
        name,
        tuple(slide.name for slide in order if not held(slide)),
        tuple(slide.name for slide in order if held(slide)),
    )


def hold_out(slides: Sequence[Foldable], seed: int) -> tuple[str, ...]:
    """Return the training slides on which epochs are chosen: one patient's, or one slide where there is one patient.

    Empty where there is only one slide.
    """
    patients = sorted({slide.patient for slide in slides})
    if len(patients) > 1:
        chosen = patients[int(np.random.default_rng(seed).integers(len(patients)))]
        return tuple(sorted(slide.name for slide in slides if slide.patient == chosen))
    ids = sorted(slide.name for slide in slides)
    return (ids[int(np.random.default_rng(seed).integers(len(ids)))],) if len(ids) > 1 else ()
