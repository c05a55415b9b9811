"""What is chosen inside the training slides: by leaving some of them out, never by looking at a test slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.data.folds import kfold
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import mean_pcc
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["by_slide", "choose", "left_out", "right_of", "some_slides"]

_MOST_INNER_FOLDS = 5
_MOST_VALUES = 25_000_000  # of targets: 100 MB, and as much of what is predicted
_FEWEST_SLIDES = 8


def choose(
    recipe: TrainRecipe,
    train: Samples,
    patients: dict[str, str],
    panel: list[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return the best combination of `recipe.choose` as {key: value}: highest mean PCC on slides of `train` left out.

    `patients` are the slides' patients by name. Without anything to choose, empty; of equals, the first.
    """
    choices = recipe.choices()
    if len(choices) == 1:
        return choices[0]
    recipes = [recipe.chosen(choice) for choice in choices]
    scores = np.zeros(len(choices))
    splits = list(left_out(train, patients, recipe.seed))
    for i, out in enumerate(splits):
        inner, watched = train.subset(~out), train.subset(out)
        watch = watched if recipe.head.by_epochs else None
        for j, model in enumerate(registry.fit_each(recipes, inner, panel, {}, watched=watch)):
            tell(f"choosing {', '.join(recipe.choose)}: {i * len(choices) + j + 1}/{len(splits) * len(choices)}")
            found = [mean_pcc(said, truth, []) for said, truth in by_slide(model, watched)]
            known = [pcc for pcc in found if pcc is not None]
            scores[j] += float(np.mean(known)) if known else -1.0
    return choices[int(np.argmax(scores))]


def by_slide(model: HeadModel, watched: Samples) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield what a head predicts of each slide of `watched`, and its target, n × G each: one slide at a time."""
    for part in watched.parts:
        slide = watched.of_part(part)
        yield model.predict(slide), slide.targets(slice(None)).cpu().numpy()


def left_out(
    train: Samples, patients: dict[str, str], seed: int, most: int = _MOST_INNER_FOLDS
) -> Iterator[torch.Tensor]:
    """Yield the spots that are watched, as N booleans: each patient left out in turn, or each slide of the one patient.

    In `most` folds where there are more; a single slide is split at its median x, each half left out in turn.
    """
    names = [part.name for part in train.parts]
    if len(names) == 1:
        right = right_of(train, 0.5)
        yield from (right, ~right)
        return
    several = len({patients[name] for name in names}) > 1
    group = [patients[name] if several else name for name in names]
    groups = sorted(set(group))
    for held in kfold(len(groups), min(len(groups), most), seed):
        out = torch.zeros(len(train), dtype=torch.bool, device=train.device)
        for part, mine in zip(train.parts, group, strict=True):
            out[part.rows] = groups.index(mine) in held
        yield out


def some_slides(train: Samples, patients: dict[str, str], seed: int) -> set[str]:
    """Return the names of slides that what is said of all of them is found on: all, but for studies whose targets are
    very many values; then of each patient in turn one more, as long as they are not too many.
    """
    turns, order = dict[str, int](), list[tuple[int, int]]()
    for i in np.random.default_rng(seed).permutation(len(train.parts)).tolist():
        patient = patients[train.parts[i].name]
        turns[patient] = turns.get(patient, -1) + 1
        order.append((turns[patient], i))
    found, values = set[str](), 0
    for _, i in sorted(order, key=lambda each: each[0]):
        part = train.parts[i]
        values += (part.stop - part.start) * train.n_genes
        if values > _MOST_VALUES and len(found) >= _FEWEST_SLIDES:
            break
        found.add(part.name)
    return found


def right_of(samples: Samples, share: float) -> torch.Tensor:
    """Return N booleans: which spots lie to the right of the quantile `share` of their slide's x."""
    right = torch.zeros(len(samples), dtype=torch.bool)
    for part in samples.parts:
        x = part.xy[:, 0]
        right[part.rows] = torch.from_numpy(x > np.quantile(x, share))
    return right.to(samples.device)
