"""From a recipe's head to a model, by the table `recipes.train.HEADS`. A new head is a line there, and nothing here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nh2st_pipe.core.errors import RecipeError, RunError, listed
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import HeadModel, Plan
from nh2st_pipe.recipes import files, plugins
from nh2st_pipe.recipes.train import HEADS, TrainRecipe, load_train_recipe, train_recipe_names

__all__ = ["Trained", "every_head", "fit", "fit_each", "head_class", "source_of"]


def head_class(kind: str) -> type[HeadModel]:
    """Return the class of heads of `kind`: ours, or of others. Raises RunError where none is known, RecipeError where
    one cannot be loaded or is no head.
    """
    if kind in HEADS:
        module, _, name = HEADS[kind].model.partition(":")
        found: type[HeadModel] = getattr(importlib.import_module(module), name)
        return found
    plugged = plugins.plugged(plugins.HEADS, kind, HEADS) if isinstance(kind, str) else None
    if plugged is None:
        raise RunError(f"a head of kind {kind!r}; this version knows {', '.join(HEADS)}")
    return _checked(plugged.what, kind)


def _checked(found: Any, kind: str) -> type[HeadModel]:
    """Return a head of others. Raises RecipeError where it is none, or lacks what every head has."""
    if not (isinstance(found, type) and issubclass(found, HeadModel)):
        raise RecipeError(f"{kind} is no subclass of nh2st_pipe.heads.base.HeadModel; docs/templates/head.py shows one")
    lacking = [name for name in ("build", "fit") if _of(found, name) is _of(HeadModel, name)]
    if found.forward_view is HeadModel.forward_view and found.predict_unsmoothed is HeadModel.predict_unsmoothed:
        lacking.append("forward_view")
    if lacking:
        raise RecipeError(f"{kind} lacks {listed(lacking)}; docs/templates/head.py shows a whole head")
    return found


def _of(head: type[HeadModel], name: str) -> Any:
    found = getattr(head, name)
    return getattr(found, "__func__", found)


def source_of(kind: str) -> str | None:
    """Return in words where a head of others is from: package and version, or file and SHA-256. None of ours."""
    plugged = None if kind in HEADS else plugins.plugged(plugins.HEADS, kind, HEADS)
    return None if plugged is None else plugged.source


def every_head() -> list[dict[str, str]]:
    """Return every head that `--recipe` takes: its name, what it is in a line, and where it is from."""
    found = []
    for name in train_recipe_names():
        if name in files.names("stages/train"):
            about, source = load_train_recipe(name).about, "nh2st-pipe"
        else:
            try:
                plugged = plugins.plugged(plugins.HEADS, name, HEADS)
                assert plugged is not None
                lines = (_checked(plugged.what, name).__doc__ or "").splitlines()
                about, source = next(iter(lines), ""), plugged.source
            except RecipeError as error:
                about, source = f"cannot be used: {error}", "a package"
        line = " ".join(about.split())
        found.append({"name": name, "about": line.partition(". ")[0].rstrip("."), "from": source})
    return found


def _built(recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> HeadModel:
    """Return an untrained head. Raises RecipeError where one of others would not be known again by its kind."""
    kind = recipe.head.kind
    source = source_of(kind)
    model = head_class(kind).build(recipe, dim, genes, about if source is None else {**about, "plug_in": source})
    if source is not None and (getattr(model, "_hub_mixin_config", None) or {}).get("kind") != kind:
        raise RecipeError(
            f"{kind}: its __init__ has to take `kind` (recipe.head.kind), by which a saved head is known again; "
            "docs/templates/head.py shows how"
        )
    return model


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
        model = _built(recipe, train.dim, genes, about).to(train.device)
        done = model.fit(train if model.streams else train.in_memory(), plan)
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
    head = head_class(first.head.kind)
    return head.fit_each(recipes, train if head.streams else train.in_memory(), genes, about, plan)
