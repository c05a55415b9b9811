"""nh2st-context: its kernel part against worked numbers, its network against plain layers, and what it promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn import functional as F

from nh2st_pipe.core.errors import RecipeError, TrainError
from nh2st_pipe.data.samples import Part, ResidentCache, Samples
from nh2st_pipe.heads import blocks, registry
from nh2st_pipe.heads.base import Plan
from nh2st_pipe.heads.blocks import Blur, stain_basis
from nh2st_pipe.heads.context import Blurs, Context
from nh2st_pipe.heads.kernel import low_count_weights, solve, solve_landmarks
from nh2st_pipe.heads.members import Members
from nh2st_pipe.recipes.train import ContextHead, TrainRecipe, load_train_recipe
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.tiles.lattice import pitch_px

VECTORS = json.loads((Path(__file__).parent / "kernel.json").read_text())
GENES = [f"g{i}" for i in range(5)]


def part_of(slide: dict[str, Any], slide_id: str, start: int, shifts: bool) -> Part:
    grid = np.column_stack((slide["rows"], slide["cols"]))
    xy = np.array(slide["xy"], float)
    return Part(slide_id, start, start + len(xy), xy, grid, np.array(slide["shift"]) if shifts else None)


def samples_of(names: list[str], dtype: torch.dtype = torch.float64, *, shifts: bool = False) -> Samples:
    """Slides of the worked example as samples, embeddings in float64."""
    slides = [VECTORS["slides"][name] for name in names]
    views = torch.cat([torch.tensor(s["E"], dtype=dtype) for s in slides])
    counts = torch.cat([torch.tensor(s["counts"], dtype=torch.float64) for s in slides])
    depth = counts.sum(1)
    raw = torch.log10(1 + 1e4 * counts / depth[:, None])
    parts, start = [], 0
    for name, slide in zip(names, slides, strict=True):
        parts.append(part_of(slide, name, start, shifts and "shift" in slide))
        start = parts[-1].stop
    rows = torch.arange(len(views))
    return Samples(ResidentCache(views), rows, rows[:, None], raw, raw, depth, tuple(parts), smoothed=True)


def head(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"kind": "nh2st-context", "network": {"components": 4, "width": 8, "epochs": 3}, **changes}
    return ContextHead.model_validate(values).model_dump(mode="json")


def recipe(**changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate({"name": "context", "head": head(**changes)})


TRAIN, TEST = ["train-1", "train-2"], ["test-1"]


def test_the_kernel_part_agrees_with_the_worked_example_step_by_step() -> None:
    settings, expected = VECTORS["settings"], VECTORS["expected"]
    train, test = samples_of(TRAIN, shifts=True), samples_of(TEST)
    values = head(
        network=None,
        centring=settings["centring"],
        sigmas=settings["sigmas"],
        kernel={
            "ridge": settings["a"],
            "low_count": settings["h"],
            "rank": settings["rank"],
            "stain_directions": settings["basis"],
        },
    )
    model = Context(6, GENES, values).double()
    model.fit(train, Plan(seed=0))

    def near(got: Any, name: str) -> None:
        assert np.abs(np.asarray(got) - np.array(expected[name])).max() < 1e-9, name

    near(model.basis @ model.basis.T, "basis_projector")
    for name in (*TRAIN, *TEST):
        slide = VECTORS["slides"][name]
        assert pitch_px(np.array(slide["xy"])) == pytest.approx(slide["pitch"], abs=1e-9)
    ((_, of_test),) = model._view_means(Blurs(test, model.recipe))
    near(torch.stack(of_test), "blocks_test")
    near(model.kernel_medians, "medians")
    assert train.depth is not None
    weights = low_count_weights(train.depth, settings["h"])
    near(weights / weights.quantile(0.5), "weights")
    near(model.target_mean, "target_mean")
    raw = Samples(test.cache, test.rows, test.neighbours, parts=test.parts, smoothed=False)
    # predictions leave in float32
    assert np.abs(model.predict(raw) - np.array(expected["prediction_raw"])).max() < 1e-6
    assert np.abs(model.predict(test) - np.array(expected["prediction_smoothed"])).max() < 1e-6
    k = torch.stack(
        [
            torch.exp(-(torch.cdist(x, z) ** 2) / m)
            for x, z, m in zip(of_test, model.kernel_blocks, model.kernel_medians, strict=True)
        ]
    ).mean(0)
    near(k.amax(1), "best_similarity")
    near(k @ model.kernel_coefficients + model.target_mean, "prediction_raw")
    likeness = model.predict_spots(test).likeness
    assert likeness is not None
    assert np.abs(likeness - np.array(expected["best_similarity"])).max() < 1e-6


@pytest.mark.parametrize("part", ["kernel", "network"])
def test_what_another_stain_adds_moves_no_prediction_of_the_part_that_leaves_it_out(part: str) -> None:
    """A slide whose spots move along the training slides' stain directions is predicted as before."""
    train, test = samples_of(TRAIN, torch.float32, shifts=True), samples_of(TEST, torch.float32)
    other = {"kernel": "network", "network": "kernel"}[part]
    few = {"components": 4, "epochs": 3} if part == "network" else {}
    moved_by = torch.from_numpy(np.concatenate([p.stain_shift for p in train.parts if p.stain_shift is not None]))
    along = stain_basis(moved_by.double(), 2).float() @ torch.tensor([1.5, -2.0])
    spots = torch.linspace(-1, 1, len(test))[:, None, None]  # not the same for all: centring would take that off
    stained = replace(test, cache=ResidentCache(test.gather(test.rows, slice(None)) + spots * along))
    for directions in (2, 0):
        changed: dict[str, Any] = {other: None, part: {**few, "stain_directions": directions}}
        model = registry.fit(recipe(**changed), train, GENES, {}).model
        moved = float(np.abs(model.predict(stained) - model.predict(test)).max())
        assert moved < 1e-4 if directions else moved > 1e-2


@pytest.mark.parametrize("lacking", [False, True])
def test_with_every_spot_a_landmark_the_kernel_is_the_exact_one(lacking: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    if lacking:
        y[:15, 3:5] = y[15:, 7] = float("nan")
    w = torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
    exact = solve(x, y, w, 0.2, 4)
    halves = [(list(x[:, part]), y[part], w[part]) for part in (slice(0, 15), slice(15, 40))]
    stood_in = solve_landmarks(x, iter(halves), 0.2, 4)
    new = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    one, two = (kernel.similarity(new) @ kernel.coefficients for kernel in (exact, stood_in))
    assert torch.allclose(one, two, atol=1e-6)
    assert torch.linalg.matrix_rank(one) == 4


def test_a_head_of_landmarks_predicts_nearly_what_the_exact_one_does() -> None:
    train, test = samples_of(TRAIN), samples_of(TEST)
    exact = registry.fit(recipe(network=None), train, GENES, {}).model
    few = registry.fit(recipe(network=None, kernel={"exact_up_to": 10, "landmarks": 60}), train, GENES, {}).model
    assert few.state_dict()["kernel_blocks"].shape[1] == 60
    assert exact.state_dict()["kernel_blocks"].shape[1] == len(train)
    one, two = exact.predict(test), few.predict(test)
    assert 0 < np.abs(one - two).mean() < 0.2 * one.std()


def test_sparse_means_are_the_dense_ones_cut_where_they_weigh_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:25, :25])
    part = Part("s", 0, 625, np.column_stack((cols, rows)) * 30.0)
    x = torch.randn(625, 4, generator=torch.Generator().manual_seed(0))
    dense = Blur(part, (1.0, 2.0), torch.device("cpu"), torch.float32)(x)
    monkeypatch.setattr(blocks, "DENSE_SPOTS", 0)
    sparse = Blur(part, (1.0, 2.0), torch.device("cpu"), torch.float32)
    ones = sparse(torch.ones(625, 1))
    assert all(torch.allclose(mean, torch.ones(625, 1), atol=1e-5) for mean in ones)
    for one, two in zip(dense, sparse(x), strict=True):
        assert float((one - two).abs().max()) < 0.03 * float(x.std())


@pytest.mark.parametrize("sparse", [False, True])
def test_blocks_of_some_spots_and_projected_blocks_are_those_of_all(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sparse:
        monkeypatch.setattr(blocks, "DENSE_SPOTS", 0)
    rng = np.random.default_rng(0)
    part = Part("s", 0, 90, rng.uniform(0, 300, (90, 2)))
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    further = sp.csr_matrix(rng.uniform(size=(90, 90)) * (rng.uniform(size=(90, 90)) < 0.1))
    blur = Blur(part, (1.0, 2.0), torch.device("cpu"), torch.float32, further)
    whole, some = blur(x), torch.tensor([3, 4, 50, 88])
    assert len(whole) == 4
    for one, other in zip(blur(x, some), whole, strict=True):
        assert torch.allclose(one, other[some], atol=1e-6)
    axes = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
    for one, other, a in zip(blur.projected(x, axes), whole, axes, strict=True):
        assert torch.allclose(one, other @ a, atol=1e-5)


def test_a_study_of_very_many_spots_is_trained_on_nearly_as_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse means, in float32; axes from a part of the spots; kernel values a few spots at a time."""
    train, test = samples_of(TRAIN, torch.float32), samples_of(TEST, torch.float32)
    landmarks = {"kernel": {"exact_up_to": 10, "landmarks": 60}}
    one = registry.fit(recipe(**landmarks), train, GENES, {}).model
    monkeypatch.setattr("nh2st_pipe.heads.kernel._AT_ONCE", 7)
    two = registry.fit(recipe(**landmarks), train, GENES, {}).model
    assert np.allclose(two.predict(test), one.predict(test), atol=1e-5)
    monkeypatch.setattr(blocks, "DENSE_SPOTS", 0)
    monkeypatch.setattr("nh2st_pipe.heads.context.DENSE_SPOTS", 0)
    monkeypatch.setattr("nh2st_pipe.heads.context._AXES_FROM", 8 * (len(train) - 5))
    three = registry.fit(recipe(**landmarks), train, GENES, {}).model
    difference = np.abs(three.predict(test) - one.predict(test)).mean()
    assert 0 < difference < 0.1 * one.predict(test).std()


def test_every_member_is_its_own_two_layer_network() -> None:
    torch.manual_seed(0)
    model = Members(3, 7, 5, 4, output_scale=0.3)
    assert float(model.hidden.detach().abs().max()) <= 1 / np.sqrt(7)
    assert float(model.out.detach().abs().max()) <= 0.3 / np.sqrt(5)
    x = torch.randn(3, 6, 7)
    out = model(x)
    for i in range(3):
        hidden = F.relu(F.linear(x[i], model.hidden[i].T, model.hidden_bias[i, 0]))
        assert torch.allclose(out[i], F.linear(hidden, model.out[i].T, model.out_bias[i, 0]), atol=1e-6)
    first, second = (model(each.expand(3, -1, -1)) for each in x[:2])
    mean, spread = model.agreed([x[0], x[1]])
    of_members = (first + second) / 2  # each member's mean over two views
    assert torch.allclose(mean, of_members.mean(0), atol=1e-6)
    assert spread is not None
    assert torch.allclose(spread, of_members.std(0, correction=0), atol=1e-6)
    assert Members(1, 7, 5, 4).agreed([x[0]])[1] is None


def test_both_parts_save_and_load_and_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    train, test = samples_of(TRAIN, torch.float16), samples_of(TEST, torch.float16)
    one, two = (registry.fit(recipe(), train, GENES, {"store": {"x": 1}}) for _ in range(2))
    assert np.array_equal(one.model.predict(test), two.model.predict(test))
    assert [row["epoch"] for row in one.history] == [1, 2, 3]
    one.model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path)
    assert np.array_equal(loaded.predict(test), one.model.predict(test))
    assert loaded.about["store"] == {"x": 1}


def test_a_slide_is_predicted_alike_alone_and_beside_others() -> None:
    model = registry.fit(recipe(), samples_of(TRAIN, torch.float16), GENES, {}).model
    both = model.predict(samples_of([*TEST, "train-1"], torch.float16))
    alone = [model.predict(samples_of([name], torch.float16)) for name in (*TEST, "train-1")]
    assert np.allclose(both, np.concatenate(alone), atol=1e-6)


def test_the_kernel_steps_back_where_a_slide_resembles_nothing() -> None:
    model = Context(6, GENES, head())

    def best(value: float) -> torch.Tensor:
        return torch.full((9,), value)

    shares = [model._kernel_share(best(value)) for value in (0.1, 0.3, 0.4, 0.5, 0.9)]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.5], abs=1e-6)
    assert Context(6, GENES, head(network=None))._kernel_share(best(0.1)) == 1
    # and the mixture is what it says
    train, test = samples_of(TRAIN, torch.float16), samples_of(TEST, torch.float16)
    whole = {"gate_from": -2.0, "gate_to": -1.0}  # full share everywhere
    mixed = registry.fit(recipe(**whole), train, GENES, {}).model.predict(test)
    kernel = registry.fit(recipe(network=None), train, GENES, {}).model.predict(test)
    network = registry.fit(recipe(kernel=None), train, GENES, {}).model.predict(test)
    assert np.allclose(mixed, (kernel + network) / 2, atol=1e-5)


def test_odd_slides_neither_break_nor_pass_in_silence() -> None:
    def one(xy: list[list[float]], depth: float = 10.0) -> Samples:
        n = len(xy)
        x = torch.randn(n, 2, 6, generator=torch.Generator().manual_seed(n)).half()
        rows = torch.arange(n)
        raw = torch.rand(n, 5, generator=torch.Generator().manual_seed(1))
        part = Part("odd", 0, n, np.array(xy, float))
        return Samples(ResidentCache(x), rows, rows[:, None], raw, raw, torch.full((n,), depth).double(), (part,))

    with pytest.raises(TrainError, match=r"slide odd: half of its spots or more lie on top of another"):
        registry.fit(recipe(), one([[5, 5]] * 4), GENES, {})
    single = one([[5, 5]])
    model = registry.fit(recipe(), single, GENES, {}).model
    assert np.isfinite(model.predict(single)).all()
    no_counts = one([[0, 0], [0, 9], [9, 0]], depth=0.0)
    assert np.isfinite(registry.fit(recipe(), no_counts, GENES, {}).model.predict(no_counts)).all()
    bare = Samples(single.cache, single.rows, single.neighbours)
    with pytest.raises(TrainError, match="predicts whole slides"):
        model.predict(bare)


def test_a_loss_that_is_no_number_stops_training() -> None:
    fast = recipe(kernel=None, network={"components": 4, "lr": 1e38, "warmup": 0})
    with pytest.raises(TrainError, match=r"not a number from epoch 1 on.*head\.network\.lr"):
        registry.fit(fast, samples_of(TRAIN, torch.float16), GENES, {})


def test_recipes_that_contradict_themselves_are_refused() -> None:
    for settings, message in (
        (["head.kernel=null", "head.network=null"], "kernel and network are both left out"),
        (["head.gate_from=0.6"], r"gate_to \(0\.5\) has to lie above gate_from \(0\.6\)"),
        (["fit.epochs=3"], "fit has no effect on a head of kind nh2st-context"),
        (["head.kernel.rnk=3"], "there is no such key; did you mean 'head.kernel.rank'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_train_recipe("nh2st-context", settings)
    assert load_train_recipe("nh2st").fit is not None
    assert load_train_recipe("ridge").fit is None
