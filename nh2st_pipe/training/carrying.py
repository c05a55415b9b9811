"""How predictions fare on training slides that are left out, factor by factor: what `heads.carry` weighs by."""

from __future__ import annotations

from collections.abc import Callable

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.carry import Carry
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.training.choosing import left_out

__all__ = ["learn_carry"]

_MOST_FOLDS = 4


def learn_carry(
    recipe: TrainRecipe, train: Samples, patients: dict[str, str], panel: list[str], tell: Callable[[str], None]
) -> tuple[Carry | None, str]:
    """Return what carries over between the slides of `train`, and what has to be said where nothing can be known.

    Patients are left out in turn where there are several, else slides, in four folds at most; the head is trained in
    small (`HeadRecipe.in_small`). `patients` are the slides' by name. None without a recipe for it, and for one slide.
    """
    small = recipe.head.in_small()
    if recipe.carry is None or small is None:
        return None, ""
    if len(train.parts) < 2:
        return None, "what carries over is not known from a single training slide: predictions are left as they are"
    recipe_of = recipe.model_copy(update={"head": small, "choose": {}, "carry": None})
    truth, predicted = [], []
    for i, out in enumerate(left_out(train, patients, recipe.seed, _MOST_FOLDS), start=1):
        tell(f"what carries over, {i}")
        watched = train.subset(out)
        said = registry.fit(recipe_of, train.subset(~out), panel, {}).model.predict(watched)
        assert watched.target is not None
        real = watched.target.cpu().numpy()
        for part in watched.parts:
            truth.append(real[part.rows])
            predicted.append(said[part.rows])
    return Carry.learn(recipe.carry, truth, predicted), ""
