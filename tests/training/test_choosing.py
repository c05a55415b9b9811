from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RecipeError
from nh2st_pipe.data.samples import Part, ResidentCache, Samples
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.carry import Carry
from nh2st_pipe.recipes.train import CarryRecipe, TrainRecipe, load_train_recipe
from nh2st_pipe.training import carrying, choosing, halves
from nh2st_pipe.training.choosing import choose, left_out, some_slides

GENES = ["a", "b"]


def slides(sizes: list[int], seed: int = 0) -> Samples:
    """Spots whose first gene follows the embedding, with much noise, and whose second does not."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x = rng.normal(size=(n, 1, 12)).astype(np.float16)
    target = np.column_stack((x[:, 0, 0] + 2 * rng.normal(size=n), rng.normal(size=n))).astype(np.float32)
    ends = np.cumsum(sizes)
    parts = tuple(
        Part(f"s{i}", int(end - size), int(end), rng.normal(size=(size, 2)))
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )
    y = torch.from_numpy(target)
    own = torch.arange(n)
    return Samples(ResidentCache(torch.from_numpy(x)), own, own[:, None].repeat(1, 9), y, y, parts=parts)


def one_patient(of: Samples) -> dict[str, str]:
    return {part.slide_id: "P" for part in of.parts}


def quiet(words: str) -> None:
    pass


def test_what_is_chosen_is_the_best_on_slides_left_out() -> None:
    data = slides([30, 30, 30])
    recipe = load_train_recipe("ridge", ["choose.head.alpha=[0.001, 100, 10000]"])
    from nh2st_pipe.evaluation.metrics import mean_pcc
    from nh2st_pipe.heads import registry

    scores = []
    for choice in recipe.choices():
        pcc = []
        for i, held in enumerate(data.parts):
            out = torch.zeros(len(data), dtype=torch.bool)
            out[held.rows] = True
            model = registry.fit(recipe.chosen(choice), data.subset(~out), GENES, {}).model
            watched = data.subset(out)
            assert watched.target is not None
            assert [part.slide_id for part in watched.parts] == [f"s{i}"]
            pcc.append(mean_pcc(model.predict(watched), watched.target.numpy(), []) or 0.0)
        scores.append(np.mean(pcc))
    best = recipe.choices()[int(np.argmax(scores))]
    assert choose(recipe, data, one_patient(data), GENES, quiet) == best
    assert best["head.alpha"] != 0.001  # it overfits, and would be best on what it was trained on


def test_patients_are_left_out_whole_and_a_single_slide_by_halves() -> None:
    data = slides([4, 5, 6, 7])
    patients = {"s0": "P", "s1": "Q", "s2": "P", "s3": "R"}
    held = [{part.slide_id for part in data.subset(out).parts} for out in left_out(data, patients, 0)]
    assert sorted(map(sorted, held)) == [["s0", "s2"], ["s1"], ["s3"]]
    many = slides([2] * 12)
    assert [int(out.sum()) for out in left_out(many, one_patient(many), 0)] == [6, 6, 4, 4, 4]
    single = slides([10])
    one, other = left_out(single, one_patient(single), 0)
    assert torch.equal(one, ~other)
    x = single.parts[0].xy[:, 0]
    assert x[one.numpy()].min() > x[other.numpy()].max()


def test_several_fields_are_chosen_together() -> None:
    recipe = load_train_recipe("ridge", ["choose.head.context=[false, true]"])
    assert len(recipe.choices()) == 10
    assert recipe.choices()[1] == {"head.alpha": 300, "head.context": True}
    made = recipe.chosen({"head.alpha": 7, "head.context": True})
    assert made.head.kind == "ridge"
    assert (made.head.alpha, made.head.context, made.choose) == (7, True, {})
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("choose.features.clip=[1, 2]", "only fields of the head can be chosen"),
        ("choose.head.alhpa=[1, 2]", "head.alhpa: there is no such key; did you mean 'head.alpha'"),
        ("choose.head.alpha=[1, -2]", "head.alpha=-2 cannot be: head.alpha: input should be greater than 0"),
        ("choose.head.alpha=[]", "choose.head.alpha: tuple should have at least 1 item"),
        ("choose.head.alpha.more=[1]", "choose: 'alpha' is a value, not a group of keys"),
    ],
)
def test_what_cannot_be_chosen_is_said(setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_train_recipe("ridge", [setting])


def test_of_very_many_slides_some_are_looked_at_of_every_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    train = slides([5] * 24)
    patients = {part.name: f"p{i % 12}" for i, part in enumerate(train.parts)}
    assert some_slides(train, patients, 0) == set(patients)
    monkeypatch.setattr(choosing, "_MOST_VALUES", 12 * 5 * train.n_genes)
    some = some_slides(train, patients, 0)
    assert sorted(patients[name] for name in some) == sorted(set(patients.values()))  # one of each
    assert some == some_slides(train, patients, 0) != some_slides(train, patients, 1)
    monkeypatch.setattr(choosing, "_MOST_VALUES", 1)
    assert len(some_slides(train, patients, 0)) == 8


def test_halves_and_what_carries_over_take_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    train = slides([16] * 12)
    patients = {part.name: part.name for part in train.parts}
    monkeypatch.setattr(choosing, "_MOST_VALUES", 1)
    recipe = load_train_recipe("ridge", ["carry={rank: 2, retrieval: null, grid: null}"])
    judged, plain = set[str](), choosing.by_slide

    def watched(model: HeadModel, of: Samples) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        judged.update(part.name for part in of.parts)
        return plain(model, of)

    monkeypatch.setattr(halves, "by_slide", watched)
    halves.half_pcc(recipe, train, patients, GENES, quiet)
    assert judged == some_slides(train, patients, recipe.seed)
    seen, learnt = list[int](), carrying._learnt

    def counted(of: CarryRecipe, found: list[carrying.LeftOut]) -> Carry:
        seen.append(len(found))
        return learnt(of, found)

    monkeypatch.setattr(carrying, "_learnt", counted)
    carry, _ = carrying.learn_carry(recipe, train, patients, GENES, quiet)
    assert carry is not None
    assert seen == [8]
