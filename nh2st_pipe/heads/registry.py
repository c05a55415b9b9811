"""From a recipe's head to a model: building, training, saving, loading. A new head is added here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.fitting import Fit, fit_by_steps
from nh2st_pipe.heads.linear import Mean, Ridge
from nh2st_pipe.heads.nh2st import NH2ST
from nh2st_pipe.recipes.train import MeanHead, NH2STHead, RidgeHead, TrainRecipe

__all__ = ["KINDS", "build", "fit", "is_solved"]

KINDS: dict[str, type[HeadModel]] = {"mean": Mean, "ridge": Ridge, "nh2st": NH2ST}


def is_solved(recipe: TrainRecipe) -> bool:
    """Whether the head has a closed form, so that there are no epochs to choose."""
    return not isinstance(recipe.head, NH2STHead)


def build(recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> HeadModel:
    """Return an untrained head for embeddings of `dim` values."""
    head = recipe.head
    scaling: dict[str, Any] = {
        "scale_features": recipe.features.scale == "robust",
        "clip": recipe.features.clip,
    }
    if isinstance(head, MeanHead):
        return Mean(genes, about=about)
    if isinstance(head, RidgeHead):
        return Ridge(dim, genes, context=head.context, alpha=head.alpha, about=about, **scaling)
    return NH2ST(dim, genes, **head.model_dump(), about=about, **scaling)


@dataclass(frozen=True)
class Trained:
    """A trained head and how its training went (no history where it was solved)."""

    model: HeadModel
    best_epoch: int
    history: list[dict[str, float]]


def fit(
    recipe: TrainRecipe,
    train: Samples,
    genes: list[str],
    about: dict[str, Any],
    *,
    watched: Samples | None = None,
    epochs: int | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> Trained:
    """Train a head on `train`.

    With `watched` the best epoch on those samples is kept, and training stops `patience` epochs after it.
    Without, exactly `epochs` epochs are run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build(recipe, train.views.shape[2], genes, about).to(train.views.device)
        if isinstance(model, (Mean, Ridge)):
            model.fit(train)
            return Trained(model, 0, [])
        assert isinstance(model, NH2ST)
        result: Fit = fit_by_steps(
            model, recipe.fit, train, watched, epochs or recipe.fit.epochs, recipe.seed, on_epoch
        )
    return Trained(model, result.best_epoch, result.history)
