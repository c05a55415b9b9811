"""One head on one fold, as a task that can be pickled and a function from task to result.

Whoever has many of them may run them one after another, side by side, or on other machines. Protocols: `nested`
takes panel, scaling and the number of epochs from the training slides: epochs are chosen on some of them that are held
out, then the head is trained on all of them for that long. `paper` takes the panel from all slides and the best epoch
on the test fold, as published tables did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.names import part_name
from nh2st_pipe.data.blocks import cut
from nh2st_pipe.data.folds import Fold, hold_out
from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.study import Study
from nh2st_pipe.data.targets import Targets
from nh2st_pipe.evaluation.intervals import POINTS
from nh2st_pipe.evaluation.judged import Judged, judge
from nh2st_pipe.evaluation.reference import Reference
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import Prediction
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.carrying import learn_carry
from nh2st_pipe.training.choosing import choose, right_of
from nh2st_pipe.training.genes_out import leave_genes_out
from nh2st_pipe.training.halves import half_pcc
from nh2st_pipe.training.picking import picked_genes

__all__ = ["FoldResult", "FoldTask", "Said", "fit_all", "run_fold"]

_FEWEST_POINTS, _MOST_POINTS = 20, 50_000_000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """What a head says of a slide, or a block of one, that it has not seen."""

    name: str
    fold: Fold
    panel: list[str]
    predicted: Prediction
    target: NDArray[np.float32]
    """n × G: the same, as it was measured; NaN for genes that the slide does not have."""
    caution: str = ""
    """Why it should be believed less; empty where there is no reason."""


@dataclass(frozen=True)
class FoldTask:
    """All that decides what a head reaches on a fold."""

    store: str
    recipe: TrainRecipe
    """The head's own; its baselines are tasks of their own."""
    fold: Fold
    device: str = "cpu"
    slides: tuple[str, ...] = ()
    """The slides that the fold's blocks are of, by slide_id; empty where it is of whole slides."""
    keep_off: bool = True
    """Whether how far predictions are off is kept (`Judged.off`)."""
    keep_predicted: bool = True
    """Whether the result holds predictions and targets."""
    write: Callable[[Study, Said], None] | None = None
    """What is done with each slide's prediction as soon as it is made."""

    def load(self) -> Study:
        """Read the fold's slides."""
        blocks = self.recipe.folds == "block"
        first_only = self.recipe.features.views == "first"
        study = Study.load(
            open_store(self.store),
            sorted(self.slides or (*self.fold.train, *self.fold.test)),
            first_view_only=first_only,
            device=torch.device(self.device),
        )
        return study.in_blocks() if blocks else study


@dataclass(frozen=True)
class FoldResult:
    """What a head predicted for the slides it had not seen."""

    head: str
    fold: Fold
    panel: list[str]
    predicted: dict[str, Prediction]
    """By name; values n × G. Empty where they are not kept (`FoldTask.keep_predicted`), as `target`."""
    target: dict[str, NDArray[np.float32]]
    """The same, as it was measured; NaN for genes that a slide does not have."""
    judged: list[Judged]
    """The test slides, judged."""
    train_seconds: float
    best_epoch: int
    """0 where the head has no epochs to choose."""
    history: list[dict[str, Any]]
    chosen: dict[str, Any]
    """What `recipe.choose` came to, by key; empty where nothing was to choose."""
    cautions: dict[str, str]
    """Why a slide's prediction should be believed less, by its name; the others are left out."""
    notice: str = ""
    """What has to be known of how the head was trained."""
    one_panel: bool = True
    """Whether all spots' values were scaled over `panel`; not so where blocks with panels of their own are joined."""
    unseen: dict[str, list[Judged]] = field(default_factory=dict)
    """The test slides judged by genes that were left out, by what predicted them (`evaluation.unseen`)."""


def run_fold(task: FoldTask, study: Study | None = None, tell: Tell | None = None) -> FoldResult:
    """Train and predict. A `study` that holds the fold's slides is used as it is; else they are read.

    `tell` hears what is being done, often.
    """
    study = study or task.load()
    recipe, fold, tell = task.recipe, task.fold, tell or (lambda words: None)
    chosen_on = fold.train if recipe.protocol == "nested" else (*fold.train, *fold.test)
    names = tuple(sorted(chosen_on))
    panel = study.once(  # all counts are read for it
        ("panel", names, recipe.targets.model_dump_json()),
        lambda: choose_panel([study.slides[name] for name in names], recipe.targets, list(study.slides.values())),
    )
    target = study.targets((*fold.train, *fold.test), panel, recipe)
    began = time.perf_counter()
    chosen = _choose(study, recipe, panel, target, fold.train, lambda words: tell(f"{fold.name}, {words}"))
    trained = _fit(study, recipe.chosen(chosen), panel, target, fold, tell)
    patients = {name: slide.patient for name, slide in study.slides.items()}
    unknown = ""
    if recipe.carry is not None:
        train = study.samples(fold.train, recipe, target)
        carry, unknown = learn_carry(recipe.chosen(chosen), train, patients, panel, tell)
        trained.model.weigh_by(carry)
    seconds = time.perf_counter() - began
    question = recipe.targets.model_dump_json(), recipe.features.model_dump_json(), recipe.protocol, recipe.seed
    picked = study.once(
        (fold, tuple(panel), question),
        lambda: picked_genes(recipe, study.samples(fold.train, recipe, target), patients, panel),
    )
    judged, kept = list[Judged](), list[Said]()
    cautions = dict[str, str]()
    for name in fold.test:
        slide, truth = study.slides[name], target[name].values
        predicted = trained.model.predict_spots(study.samples([name], recipe, None))
        said = Said(name, fold, panel, predicted, truth, trained.model.caution(predicted) or "")
        if said.caution:
            cautions[name] = said.caution
        if task.write is not None:
            task.write(study, said)
        if task.keep_predicted:
            kept.append(said)
        like = predicted.likeness
        judged.append(
            judge(
                predicted.values,
                truth,
                slide.xy,
                slide_id=slide.slide_id,
                patient=slide.patient,
                genes=panel,
                fold=fold.name,
                block=slide.block,
                picked=picked,
                points=_points(study, panel) if task.keep_off else 0,
                likeness=None if like is None else float(np.median(like)),
            )
        )
    unseen = leave_genes_out(study, recipe, fold, panel, target, tell) if recipe.leave_genes_out is not None else {}
    return FoldResult(
        head=recipe.name,
        fold=fold,
        panel=panel,
        predicted={said.name: said.predicted for said in kept},
        target={said.name: said.target for said in kept},
        judged=judged,
        train_seconds=seconds,
        best_epoch=trained.best_epoch,
        history=trained.history,
        chosen=chosen,
        cautions=cautions,
        notice="; ".join(filter(None, (trained.notice, unknown))),
        unseen=unseen,
    )


def _points(study: Study, panel: Sequence[str]) -> int:
    """Return how many quantiles stand for a slide's residuals of a gene: fewer where very many slides have them."""
    return min(POINTS, max(_FEWEST_POINTS, _MOST_POINTS // max(1, len(study.slides) * len(panel))))


def _choose(
    study: Study,
    recipe: TrainRecipe,
    panel: list[str],
    target: Mapping[str, Targets],
    names: Sequence[str],
    tell: Tell,
) -> dict[str, Any]:
    """Choose what the recipe leaves to be chosen on the training slides `names` alone."""
    if not recipe.choose:
        return {}
    patients = {name: study.slides[name].patient for name in names}
    return choose(recipe, study.samples(names, recipe, target), patients, panel, tell)


def _fit(
    study: Study, recipe: TrainRecipe, panel: list[str], target: Mapping[str, Targets], fold: Fold, tell: Tell
) -> registry.Trained:
    train = study.samples(fold.train, recipe, target)

    def on_epoch(epoch: int) -> None:
        tell(f"{fold.name}, epoch {epoch}")

    if not recipe.head.by_epochs:
        return registry.fit(recipe, train, panel, {}, on_epoch=on_epoch)
    if recipe.protocol == "paper":
        test = study.samples(fold.test, recipe, target)
        return registry.fit(recipe, train, panel, {}, watched=test, on_epoch=on_epoch)
    chosen = _choose_epochs(study, recipe, panel, target, fold.train, fold.name, tell)
    trained = registry.fit(recipe, train, panel, {}, epochs=chosen.best_epoch, on_epoch=on_epoch)
    history = [{"phase": "choose", **row} for row in chosen.history]
    history += [{"phase": "train", **row} for row in trained.history]
    return registry.Trained(trained.model, chosen.best_epoch, history, notice=trained.notice)


def _choose_epochs(
    study: Study,
    recipe: TrainRecipe,
    panel: list[str],
    target: Mapping[str, Targets],
    names: Sequence[str],
    label: str,
    tell: Tell,
) -> registry.Trained:
    """Find the number of epochs on training slides alone: train on some, watch the one held out."""
    held = hold_out([study.slides[name] for name in names], recipe.seed)
    if held:
        inner = study.samples([name for name in names if name not in held], recipe, target)
        watched = study.samples(held, recipe, target)
    else:  # a single slide: its right-hand fifth is held out
        whole = study.samples(names, recipe, target)
        right = right_of(whole, 0.8)
        inner, watched = whole.subset(~right), whole.subset(right)
    return registry.fit(
        recipe, inner, panel, {}, watched=watched, on_epoch=lambda n: tell(f"{label}, choosing epochs, epoch {n}")
    )


def joined(study: Study, results: Sequence[FoldResult]) -> FoldResult:
    """Return the results of folds by block as one result for the whole slides of `study`.

    Its panel has every gene that some fold had; where a block's fold had not, prediction and target are NaN.
    """
    panel = list(dict.fromkeys(gene for result in results for gene in result.panel))
    column = {gene: i for i, gene in enumerate(panel)}
    predicted, target, cautions = {}, {}, {}
    for slide_id, slide in study.slides.items():
        values, truth = (np.full((len(slide), len(panel)), np.nan, np.float32) for _ in range(2))
        likeness = np.full(len(slide), np.nan, np.float32)
        for number, rows in enumerate(cut(slide), start=1):
            block = part_name(slide_id, number)
            result = next(result for result in results if block in result.predicted)
            place = np.ix_(rows, np.array([column[gene] for gene in result.panel]))
            values[place], truth[place] = result.predicted[block].values, result.target[block]
            of_block = result.predicted[block].likeness
            if of_block is not None:
                likeness[rows] = of_block
            if block in result.cautions:
                cautions[slide_id] = result.cautions[block]
        known = bool(np.isfinite(likeness).all())
        predicted[slide_id], target[slide_id] = Prediction(values, likeness if known else None), truth
    names = tuple(study.slides)
    fold = Fold("blocks", names, names)
    same = all(result.panel == panel for result in results)
    return FoldResult(results[0].head, fold, panel, predicted, target, [], 0.0, 0, [], {}, cautions, one_panel=same)


@dataclass(frozen=True)
class Final(registry.Trained):
    """The head that is kept."""

    half_pcc: dict[str, float | None] = field(default_factory=dict)
    """Gene → mean PCC between halves of the training tissue; see `training.halves`."""
    reference: Reference | None = None
    """Training tiles that new ones are held against."""


def fit_all(
    study: Study, recipe: TrainRecipe, epochs: Sequence[int], about: dict[str, Any], tell: Tell | None = None
) -> Final:
    """Train the head that is kept: on all slides of `study`, for the median of the folds' `epochs` (or chosen anew).

    What the recipe leaves to be chosen is chosen anew, on all of them.
    """
    names, tell = sorted(study.slides), tell or (lambda words: None)
    panel = choose_panel([study.slides[name] for name in names], recipe.targets)
    target = study.targets(names, panel, recipe)
    choice = _choose(study, recipe, panel, target, names, lambda words: tell(f"all slides, {words}"))
    recipe = recipe.chosen(choice)
    samples = study.samples(names, recipe, target)
    patients = {name: slide.patient for name, slide in study.slides.items()}
    half = half_pcc(recipe, samples, patients, panel, lambda words: tell(f"all slides, {words}"))
    chosen: int | None = None
    history: list[dict[str, Any]] = []
    if recipe.head.by_epochs:
        if epochs:
            chosen = round(float(np.median(epochs)))
        else:
            watched = _choose_epochs(study, recipe, panel, target, names, "all slides", tell)
            chosen, history = watched.best_epoch, [{"phase": "choose", **row} for row in watched.history]
    trained = registry.fit(
        recipe,
        samples,
        panel,
        {**about, "half_pcc": half},
        epochs=chosen,
        on_epoch=lambda n: tell(f"all slides, epoch {n}"),
    )
    history += [{"phase": "train", **row} for row in trained.history]
    history = [{"fold": "all slides", **row} for row in history]
    carry, unknown = learn_carry(recipe, samples, patients, panel, tell)
    trained.model.weigh_by(carry)
    reference = Reference.of(samples, recipe.seed)
    notice = "; ".join(filter(None, (trained.notice, unknown)))
    return Final(trained.model, chosen or 0, history, choice, notice, half, reference)
