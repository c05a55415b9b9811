"""No setting does nothing: each changes what a head predicts, or is refused with what works in its place."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from nh2st_pipe.core.errors import RecipeError, TrainError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import HEADS, FeatureRecipe, FitRecipe, TrainRecipe, load_train_recipe, set_in
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.store.read import SlideData
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.training.carrying import learn_carry
from tests.conftest import slide
from tests.evaluation.known import grid, smooth_maps

GENES = [f"g{i}" for i in range(6)]
SIDE, DIM = 6, 12

CONTEXT = [
    "head.kernel.exact_up_to=50", "head.kernel.landmarks=30", "head.kernel.rank=3", "head.gate_from=0",
    "head.kernel.stain_directions=2", "head.gate_to=1", "head.network.components=4", "head.network.width=8",
    "head.network.epochs=3", "head.network.warmup=2", "head.network.contrast={width: 4}",
    "head.network.attention={neighbours: 4, components: 3, heads: 2, key: 3, value: 4}",
]  # fmt: skip
SMALL = {
    "mean": [],
    "knn": ["head.k=4"],
    "ridge": ["head.alpha=30", "choose={}"],
    "hest-ridge": ["head.components=4"],
    "ridge-context": ["head.alpha=30", "choose={}"],
    "mlp": ["head.network.width=8", "head.network.epochs=3", "head.network.contrast={width: 4}"],
    "nh2st": [
        "head.width=8", "head.hidden=8", "head.decoder_hidden=8", "head.heads=2",
        "fit.epochs=6", "fit.patience=2", "fit.lr=0.05", "fit.lr_step=2", "fit.batch_size=12",
    ],
    "deepspot": [
        "head.width=8", "head.networks=3", "choose={}",
        "fit.epochs=6", "fit.patience=2", "fit.lr=0.02", "fit.lr_step=2", "fit.batch_size=12",
    ],
    "nh2st-nb": [
        "head.network.components=4", "head.network.width=8", "head.network.epochs=3", "head.network.warmup=2",
        "head.network.attention={neighbours: 4, components: 3, heads: 2, key: 3, value: 4}",
    ],
    "nh2st-context": CONTEXT,
    "nh2st-query": [*CONTEXT, f"head.vectors={Path(__file__).parent / 'vectors.csv'}"],
}  # fmt: skip
OTHER: dict[str, Any] = {
    "head.sigmas": [1.0],
    "head.rank": 2,
    "head.vectors": str(Path(__file__).parent / "other_vectors.csv"),
    "head.vectors_sha256": "0",
    "head.kernel.exact_up_to": 5000,
    "features.neighbours": 5,
    "features.clip": 0.5,
    "fit.patience": 1,
    "fit.weight_decay": 0.4,
    "fit.epochs": 3,
    "head.gate_from": 0.2,
    "head.similar": 1,
    "head.width": 16,
    "head.heads": 4,
}
AT_LOADING = {"features.views"}  # decides which views are read at all


@pytest.fixture(autouse=True)
def few_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.heads.query.FEWEST_GENES", len(GENES))


@cache
def slides() -> tuple[SlideData, ...]:
    found = []
    for i in range(4):
        rng = np.random.default_rng(i)
        maps = smooth_maps(rng, SIDE, DIM)
        counts = rng.poisson(rng.lognormal(0, 0.5, (SIDE**2, 1)) * np.exp(2 + 0.6 * maps[:, : len(GENES)]))
        views = (maps[:, None] + 0.2 * rng.standard_normal((SIDE**2, 2, DIM))).astype(np.float16)
        rows, cols = (axis.ravel() for axis in np.mgrid[:SIDE, :SIDE])
        found.append(
            slide(
                f"s{i}",
                counts=counts,
                genes=GENES,
                xy=grid(SIDE),
                views=views,
                array_row=rows,
                array_col=cols,
                neighbours=nearest_spots(grid(SIDE), 9)[0],
                stain_shift=rng.standard_normal((4, DIM)).astype(np.float32),
            )
        )
    return tuple(found)


def samples(recipe: TrainRecipe, of: slice) -> Samples:
    some = slides()[of]
    made = [targets(each, GENES, recipe.targets) for each in some]
    return Samples.of(some, made, neighbours=recipe.features.neighbours, smoothed=recipe.targets.smooth != "none")


def predicted(recipe: TrainRecipe) -> np.ndarray:
    watched = samples(recipe, slice(2, 3)) if recipe.head.by_epochs else None
    model = registry.fit(recipe, samples(recipe, slice(0, 2)), GENES, {}, watched=watched).model
    return model.asking(model.about.get("queries", {}).get("genes", [])).predict(samples(recipe, slice(3, 4)))


def leaves(values: BaseModel, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        if name != "kind":
            yield f"{prefix}{name}", value, field.annotation


def another(key: str, value: Any, kind: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, BaseModel):
        return None
    if typing.get_origin(kind) is typing.Literal:
        return next(each for each in typing.get_args(kind) if each != value)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.5 if value else 0.4


def cases() -> Iterator[tuple[str, str, Any]]:
    for name, settings in SMALL.items():
        recipe = load_train_recipe(name, settings)
        parts: list[tuple[BaseModel, str]] = [(recipe.head, "head."), (recipe.features, "features.")]
        if recipe.fit is not None:
            parts.append((recipe.fit, "fit."))
        for part, prefix in parts:
            for key, value, kind in leaves(part, prefix):
                if key not in AT_LOADING:
                    yield name, key, another(key, value, kind)


@cache
def before(name: str) -> np.ndarray:
    return predicted(load_train_recipe(name, SMALL[name]))


@pytest.mark.parametrize(("name", "key", "value"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in cases()])
def test_a_setting_acts_or_is_refused(name: str, key: str, value: Any) -> None:
    values = load_train_recipe(name, SMALL[name]).model_dump(mode="json")
    set_in(values, key, value)
    try:
        recipe = validate(TrainRecipe, values, name)
    except RecipeError as error:
        refused = str(error)
        assert re.search("has no effect|has to be a multiple|has to lie above|should be a group", refused)
        return
    torch.manual_seed(0)
    if key == "head.vectors_sha256":
        with pytest.raises(TrainError, match="have changed since the training began"):
            predicted(recipe)
        return
    assert not np.array_equal(predicted(recipe), before(name)), f"{key}={value} changes nothing"


WEIGHED = "carry={rank: 3, gate_from: 0.1, gate_to: 0.95, retrieval: {k: 5, most: 60}}"
OTHERWISE: dict[str, Any] = {
    "rank": 2,
    "q": (3.0, 3.0),
    "p": (3.0, 3.0),
    "retrieval.share": (0.5, 0.5),
    "retrieval.k": 9,
    "retrieval.sigmas": (1.0,),
    "retrieval.most": 40,
    "retrieval.components": 2,
    "gate_from": 0.3,
    "gate_to": 0.8,
    "grid.q": (3.0,),
    "grid.p": (3.0,),
}


@cache
def weighed(recipe: str, patients: tuple[str, ...]) -> np.ndarray:
    """Predictions of a new slide, of a head trained on slides of these patients."""
    of = TrainRecipe.model_validate_json(recipe)
    train = samples(of, slice(0, 3))
    model = registry.fit(of, train, GENES, {}).model
    named = {part.name: patient for part, patient in zip(train.parts, patients, strict=True)}
    model.weigh_by(learn_carry(of, train, named, GENES, lambda words: None)[0])
    return model.predict(samples(of, slice(3, 4)))


def carry_cases() -> Iterator[tuple[str, Any]]:
    carry = load_train_recipe("nh2st-context", ["carry={}"]).carry
    assert carry is not None
    for key, _, _ in leaves(carry, ""):
        yield key, OTHERWISE.get(key)


@pytest.mark.parametrize(("key", "value"), list(carry_cases()))
def test_a_setting_of_what_carries_over_acts(key: str, value: Any) -> None:
    """By the likeness with slides of one patient; the grid with slides of several."""
    recipe = load_train_recipe("nh2st-context", [*SMALL["nh2st-context"], WEIGHED])
    values = recipe.model_dump(mode="json")
    set_in(values, f"carry.{key}", value)
    changed = validate(TrainRecipe, values, "changed")
    patients = ("a", "b", "c") if key.startswith("grid") else ("a", "a", "a")
    one, other = (weighed(each.model_dump_json(), patients) for each in (recipe, changed))
    assert not np.array_equal(one, other), f"carry.{key}={value} changes nothing"


def test_all_heads_are_tried() -> None:
    assert {load_train_recipe(name).head.kind for name in SMALL} == set(HEADS)
    assert FeatureRecipe.model_fields.keys() >= {"scale", "clip", "neighbours"}
    assert "patience" in FitRecipe.model_fields


@pytest.mark.parametrize(
    ("name", "settings", "instead"),
    [
        ("nh2st-context", ["features.scale=none"], "features.scale has no effect .*head.centring"),
        ("nh2st-context", ["features.clip=3"], "features.clip has no effect .*head.centring"),
        ("nh2st-context", ["features.neighbours=5"], "features.neighbours has no effect .*head.sigmas"),
        (
            "nh2st-context",
            ["head.network=null", "head.kernel_share=0.9"],
            "head.kernel_share has no effect: the kernel part is alone",
        ),
        ("ridge", ["features.neighbours=5"], "features.neighbours has no effect .*head.context=true"),
        ("ridge", ["features.scale=none", "features.clip=3"], "features.clip has no effect"),
        ("ridge", ["targets.genes=[A, B]", "targets.panel=dispersion"], "targets.panel has no effect"),
        ("ridge", ["folds=none", "trust_from=0.3"], "trust_from has no effect"),
    ],
)
def test_what_does_nothing_is_refused_with_the_nearest_that_works(name: str, settings: list[str], instead: str) -> None:
    with pytest.raises(RecipeError, match=instead):
        load_train_recipe(name, settings)


def test_baselines_share_what_acts_on_the_runs_own_head() -> None:
    ridge = load_train_recipe("ridge")
    shared = ridge.model_copy(update={"features": FeatureRecipe(neighbours=5)})
    assert shared.chosen({"head.alpha": 300}).features.neighbours == 5


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("ridge", ["features.clip=3"]),
        ("ridge", ["features.scale=none"]),
        ("ridge", ["targets.genes=[A, B]"]),
        ("ridge", ["targets.panel=dispersion"]),
        ("ridge", ["targets.scale_to=null"]),
        ("ridge", ["targets.scale_over=panel"]),
        ("ridge", ["folds=none"]),
        ("ridge", ["trust_from=0.3"]),
        ("ridge", ["carry=null"]),
        ("nh2st", ["targets.scale_over=all", "targets.scale_to=null"]),
    ],
)
def test_half_of_what_is_refused_together_is_taken(recipe: str, settings: list[str]) -> None:
    load_train_recipe(recipe, settings)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("ridge", ["targets.scale_to=null", "targets.scale_over=panel"], "targets.scale_over has no effect"),
        ("nh2st", ["carry={}"], "takes too long for that; leave it out"),
    ],
)
def test_what_has_no_effect_together_is_refused(recipe: str, settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_train_recipe(recipe, settings)
