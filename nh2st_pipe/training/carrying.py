"""How predictions fare on training slides that are left out, factor by factor: what `heads.carry` weighs by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import mean_pcc
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.alike import Alike
from nh2st_pipe.heads.carry import Carry, Strength
from nh2st_pipe.recipes.train import CarryRecipe, TrainRecipe
from nh2st_pipe.training.choosing import left_out, some_slides

__all__ = ["LeftOut", "choose_strength", "learn_carry"]

_MOST_FOLDS = 4


@dataclass(frozen=True)
class LeftOut:
    """A training slide that was left out."""

    fold: int
    """Which of the inner folds left it out."""
    truth: NDArray[Any]
    """n × G, as the three that follow; NaN for a gene that the slide lacks."""
    predicted: NDArray[Any]
    expressed: NDArray[Any] | None
    """What the spots of the other slides express that are most alike; None where nothing is retrieved."""


def learn_carry(
    recipe: TrainRecipe, train: Samples, patients: dict[str, str], panel: list[str], tell: Callable[[str], None]
) -> tuple[Carry | None, str]:
    """Return what carries over between the slides of `train`, and what has to be said where nothing can be known.

    Patients are left out in turn where there are several, else slides, in four folds at most; the head is trained in
    small (`HeadRecipe.in_small`), and looked at on some of the slides where there are very many (`some_slides`). With
    several patients it is chosen on those left out how much is weighed. `patients` are the slides' by name. None
    without a recipe for it, and for one slide.
    """
    small = recipe.head.in_small()
    if recipe.carry is None or small is None:
        return None, ""
    if len(train.parts) < 2:
        return None, "what carries over is not known from a single training slide: predictions are left as they are"
    recipe_of = recipe.model_copy(update={"head": small, "choose": {}, "carry": None})
    several = len({patients[part.name] for part in train.parts}) > 1
    chosen_inside = recipe.carry.grid is not None and several
    retrieval, of = recipe.carry.retrieval, list[LeftOut]()
    asked = some_slides(train, patients, recipe.seed)
    for i, out in enumerate(left_out(train, patients, recipe.seed, _MOST_FOLDS)):
        tell(f"what carries over, {i + 1}")
        watched, others = train.subset(out), train.subset(~out)
        model = registry.fit(recipe_of, others, panel, {}).model
        alike = Alike.of(retrieval, others, recipe.seed) if retrieval is not None and chosen_inside else None
        for part in watched.parts:
            if part.name not in asked:
                continue
            slide = watched.of_part(part)
            shown = None if alike is None or retrieval is None else slide.smooth(alike.expressed(retrieval, slide))
            of.append(LeftOut(i, slide.targets(slice(None)).cpu().numpy(), model.predict(slide), shown))
    carry = _learnt(recipe.carry, of)
    if retrieval is not None:
        carry = replace(carry, alike=Alike.of(retrieval, train, recipe.seed))
    return (replace(carry, chosen=choose_strength(recipe.carry, of)) if chosen_inside else carry), ""


def choose_strength(recipe: CarryRecipe, of: list[LeftOut]) -> Strength | None:
    """Return the strength of the recipe's grid with the best mean PCC on the slides of each fold in turn, weighed by
    what was learnt from those of the others. Of equals, the weakest, which the grid has first.
    """
    every = list(_grid(recipe))
    scores = np.zeros(len(every))
    for fold in sorted({each.fold for each in of}):
        others = [each for each in of if each.fold != fold]
        if not others:
            continue
        carry = _learnt(recipe, others)
        for slide in (each for each in of if each.fold == fold):
            for i, strength in enumerate(every):
                expressed = slide.expressed if strength.share else None
                weighed = carry.weigh(slide.predicted, strength, expressed).values
                scores[i] += mean_pcc(weighed, slide.truth, []) or 0.0
    return every[int(np.argmax(scores))]


def _learnt(recipe: CarryRecipe, of: list[LeftOut]) -> Carry:
    return Carry.learn(recipe, [each.truth for each in of], [each.predicted for each in of])


def _grid(recipe: CarryRecipe) -> Iterator[Strength]:
    """Yield every strength that can be chosen, the weakest first: powers of the grid, and each end of the two pairs."""
    assert recipe.grid is not None
    shares = (0.0,) if recipe.retrieval is None else tuple(dict.fromkeys(recipe.retrieval.share))
    for share, outside, p, q in itertools.product(shares, (1.0, 0.0), recipe.grid.p, recipe.grid.q):
        yield Strength(q, p, share, outside)
