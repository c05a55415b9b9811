"""What is chosen inside the training slides: by leaving some of them out, never by looking at a test slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from nh2st_pipe.data.folds import kfold
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import summarise
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["choose", "halves", "left_out"]

_MOST_INNER_FOLDS = 5
_RIGHT_FIFTH = 0.8


def choose(
    recipe: TrainRecipe,
    train: Samples,
    patients: dict[str, str],
    panel: list[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return the best combination of `recipe.choose` as {key: value}: highest mean PCC on slides of `train` left out.

    `patients` are the slides' patients by slide_id. Without anything to choose, empty; of equals, the first.
    """
    choices = recipe.choices()
    if len(choices) == 1:
        return choices[0]
    recipes = [recipe.chosen(choice) for choice in choices]
    scores = np.zeros(len(choices))
    splits = list(left_out(train, patients, recipe.seed))
    for i, (inner, watched) in enumerate(splits):
        assert watched.target is not None
        target = watched.target.cpu().numpy()
        watch = watched if recipe.head.by_epochs else None
        for j, model in enumerate(registry.fit_each(recipes, inner, panel, {}, watched=watch)):
            tell(f"choosing {', '.join(recipe.choose)}: {i * len(choices) + j + 1}/{len(splits) * len(choices)}")
            pcc = summarise(model.predict(watched), target)["pcc"]
            scores[j] += -1.0 if pcc is None else pcc
    return choices[int(np.argmax(scores))]


def left_out(train: Samples, patients: dict[str, str], seed: int) -> Iterator[tuple[Samples, Samples]]:
    """Yield (what is trained on, what is watched): each patient left out in turn, or each slide of the one patient.

    In five folds where there are more; a single slide is split at its median x, each half left out in turn.
    """
    names = [part.slide_id for part in train.parts]
    if len(names) == 1:
        one, other = halves(train, 0.5)
        yield from ((one, other), (other, one))
        return
    several = len({patients[name] for name in names}) > 1
    group = [patients[name] if several else name for name in names]
    groups = sorted(set(group))
    for held in kfold(len(groups), min(len(groups), _MOST_INNER_FOLDS), seed):
        out = torch.zeros(len(train), dtype=torch.bool, device=train.device)
        for part, mine in zip(train.parts, group, strict=True):
            out[part.rows] = groups.index(mine) in held
        yield train.subset(~out), train.subset(out)


def halves(samples: Samples, share: float = _RIGHT_FIFTH) -> tuple[Samples, Samples]:
    """Split one slide's spots at the quantile `share` of x."""
    x = samples.parts[0].xy[:, 0]
    right = torch.from_numpy(x > np.quantile(x, share)).to(samples.device)
    return samples.subset(~right), samples.subset(right)
