"""From a recipe's head to a model, by the table `recipes.train.HEADS`. A new head is a line there, and nothing here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import HeadModel, Plan
from nh2st_pipe.recipes.train import HEADS, TrainRecipe

__all__ = ["Trained", "fit", "fit_each", "head_class"]


def head_class(kind: str) -> type[HeadModel]:
    """Return the class of heads of `kind`. Raises RunError where this version knows none."""
    if kind not in HEADS:
        raise RunError(f"a head of kind {kind!r}; this version knows {', '.join(HEADS)}")
    module, _, name = HEADS[kind].model.partition(":")
    found: type[HeadModel] = getattr(importlib.import_module(module), name)
    return found


@dataclass(frozen=True)
class Trained:
    """A trained head and how its training went (no history where it was solved)."""

    model: HeadModel
    best_epoch: int
    history: list[dict[str, Any]]
    chosen: dict[str, Any] = field(default_factory=dict)
    """What was left to be chosen, and came to be."""
    notice: str = ""
    """What has to be known of how it was trained."""


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
    """Build the recipe's head and train it on `train`; see Plan for `watched` and `epochs`."""
    plan = Plan(recipe.seed, recipe.fit, epochs, watched, on_epoch)
    type(recipe.head).check_slides(train.parts, training=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        about = {"smooth_predictions": recipe.smooths_predictions(), **about}
        model = head_class(recipe.head.kind).build(recipe, train.dim, genes, about).to(train.device)
        done = model.fit(train, plan)
    return Trained(model, done.best_epoch, list(done.history), notice=done.notice)


def fit_each(
    recipes: Sequence[TrainRecipe],
    train: Samples,
    genes: list[str],
    about: dict[str, Any],
    *,
    watched: Samples | None = None,
) -> Iterator[HeadModel]:
    """Yield a trained head for each of `recipes`, which differ in fields of the head alone; see HeadModel.fit_each."""
    first = recipes[0]
    type(first.head).check_slides(train.parts, training=True)
    about = {"smooth_predictions": first.smooths_predictions(), **about}
    plan = Plan(first.seed, first.fit, None, watched)
    return head_class(first.head.kind).fit_each(recipes, train, genes, about, plan)
