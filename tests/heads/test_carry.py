"""What carries over, on slides whose truth is known: patterns that hold everywhere, and one of the training patient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from nh2st_pipe.core.errors import RecipeError, RunError
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import carry, factors, registry
from nh2st_pipe.heads.carry import CARRY, CUT, Carried, Carry, Strength
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.train import CarryGrid, CarryRecipe, RetrievalPart, load_train_recipe
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.training.carrying import LeftOut, choose_strength, learn_carry
from nh2st_pipe.training.run import train
from tests.conftest import GENES, Study
from tests.evaluation.known import smooth_maps
from tests.training.test_choosing import one_patient, quiet, slides

SIDE, N_GENES = 12, 30


def patterns(seed: int, against: float, loud: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of a slide of four patterns over genes: the first two are predicted well, the third with
    `against` its truth and `loud` times as loud, the fourth not at all.
    """
    shape = np.linalg.qr(np.random.default_rng(99).standard_normal((N_GENES, 4)))[0].T * [[8], [6], [4], [2]]
    rng = np.random.default_rng(seed)
    f, other = smooth_maps(rng, SIDE, 4), smooth_maps(rng, SIDE, 4)
    said = np.column_stack((f[:, 0], f[:, 1] * 0.9 + other[:, 1] * 0.3, against * f[:, 2] * loud, 0.3 * other[:, 3]))
    mean = np.linspace(1, 3, N_GENES)
    noise = 0.2 * rng.standard_normal((SIDE**2, N_GENES))
    return (mean + f @ shape + noise).astype(np.float32), (mean + said @ shape).astype(np.float32)


def learnt(**changes: Any) -> Carry:
    """Slides on which the third pattern followed the truth a little, as within the training patient."""
    pairs = [patterns(seed, 0.6) for seed in range(4)]
    recipe = CarryRecipe(**{"rank": 6, "retrieval": None, **changes})
    return Carry.learn(recipe, [truth for truth, _ in pairs], [said for _, said in pairs])


def third_gene(made: Carry) -> int:
    """The gene in which the third factor is loudest."""
    return int(np.abs(made.basis[:, 2]).argmax())


def test_the_factors_are_those_of_the_targets_and_fare_as_they_did() -> None:
    made = learnt()
    assert made.basis.shape == (N_GENES, 6)
    assert np.allclose(made.basis.T @ made.basis, np.eye(6), atol=1e-5)
    assert (made.reliability[:3] > 0.85).all()
    assert made.reliability[3] < 0.5
    truth = [patterns(seed, 0.6)[0] for seed in range(4)]
    stacked = np.concatenate([values - values.mean(0) for values in truth]).astype(np.float64)
    axes = np.linalg.svd(stacked, full_matrices=False)[2][:6]
    assert np.abs(np.sum(axes[:4] * made.basis[:, :4].T, axis=1)) == pytest.approx(np.ones(4), abs=1e-5)
    wide = Carry.learn(CarryRecipe(rank=6), [each[:8] for each in truth[:2]], [each[:8] for each in truth[:2]])
    assert np.allclose(wide.basis.T @ wide.basis, np.eye(wide.basis.shape[1]), atol=1e-4)  # fewer spots than genes


def test_genes_are_weighed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, said, shown = learnt(), patterns(50, -0.6)[1], patterns(51, 0.6)[1]
    strength = Strength(2, 1, 0.25, 0.5)
    whole = made.weigh(said, strength, shown)
    with monkeypatch.context() as patch:
        patch.setattr(carry, "_AT_ONCE", 7 * len(said))
        parts = made.weigh(said, strength, shown)
        patch.setattr(carry, "_DOUBLE", 0)
        single = made.weigh(said, strength, shown)
    for other in (parts, single):
        assert other.values == pytest.approx(whole.values, abs=1e-5)
        assert other.carried.cut == pytest.approx(whole.carried.cut, abs=1e-5)
        assert other.carried.lives == pytest.approx(whole.carried.lives, abs=1e-5)
    values, carried = made.weighing(lambda genes: said[:, genes], said.shape, strength, lambda genes: shown[:, genes])
    assert values(slice(2, 5)) == pytest.approx(whole.values[:, 2:5], abs=1e-6)
    assert np.array_equal(carried.cut, whole.carried.cut)
    apart = 0.75 * (said - said.mean(0)) + 0.25 * (shown - shown.mean(0))
    known, found = made.weighing(
        lambda genes: said[:, genes],
        said.shape,
        strength,
        lambda genes: shown[:, genes],
        apart.astype(np.float64) @ made.basis,
    )
    assert known(slice(2, 5)) == pytest.approx(whole.values[:, 2:5], abs=1e-5)
    assert found.lives == pytest.approx(whole.carried.lives, abs=1e-5)


def test_what_was_taken_away_is_what_is_missing() -> None:
    """By the formulas as they are written down, spot by spot."""
    made, said, shown = learnt(), patterns(50, -0.6)[1], patterns(51, 0.6)[1]
    for strength in (Strength(2, 1, 0.25, 0.5), Strength(0, 0, 0, 1), Strength(1, 0.5, 0, 0)):
        found = made.weigh(said, strength, shown if strength.share else None)
        apart = said - said.mean(0, dtype=np.float64)
        if strength.share:
            apart = (1 - strength.share) * apart + strength.share * (shown - shown.mean(0, dtype=np.float64))
        basis = made.basis.astype(np.float64)
        factors = apart @ basis
        outside = apart - factors @ basis.T
        kept = (factors * found.carried.weights) @ basis.T + strength.outside * outside
        assert found.values == pytest.approx(said.mean(0) + kept, abs=1e-5)
        assert found.carried.cut == pytest.approx((apart - kept).std(0) / apart.std(0), abs=1e-5)
        lives = basis**2 * factors.var(0)
        whole = lives.sum(1) + outside.var(0)
        assert found.carried.lives == pytest.approx(lives / whole[:, None], abs=1e-5)


def test_factors_of_very_many_genes_are_found_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [patterns(seed, 0.6) for seed in range(4)]
    recipe, truth, said = CarryRecipe(rank=4, retrieval=None), [t for t, _ in pairs], [s for _, s in pairs]
    exact = Carry.learn(recipe, truth, said)
    monkeypatch.setattr(factors, "LARGE", 20)
    monkeypatch.setattr(factors, "_BESIDE", 4)
    found = Carry.learn(recipe, truth, said)
    assert np.allclose(found.basis.T @ found.basis, np.eye(4), atol=1e-4)
    assert np.abs(np.sum(found.basis * exact.basis, axis=0)) == pytest.approx(np.ones(4), abs=1e-4)
    assert found.reliability == pytest.approx(exact.reliability, abs=1e-3)


def test_a_pattern_that_is_extrapolated_is_cut_on_an_unlike_slide_and_kept_on_a_like_one() -> None:
    """On the new patient's slide the third pattern runs against the truth, and louder than it ever was."""
    made = learnt()
    truth, said = patterns(50, -0.6, loud=3.0)
    plain = gene_metrics(said, truth)["pcc"].mean()
    unlike, like = made.weigh(said, made.strength_at(0)), made.weigh(said, made.strength_at(1))
    assert unlike.carried.weights[2] < 0.2 < like.carried.weights[2]
    assert unlike.carried.louder[2] > 2
    assert unlike.carried.lives[third_gene(made)].argmax() == 2
    assert gene_metrics(unlike.values, truth)["pcc"].mean() > plain + 0.1
    assert np.allclose(unlike.values.mean(0), said.mean(0), atol=1e-5), "a slide's own mean is never touched"
    third = np.abs(made.basis[:, 2])
    assert unlike.carried.cut[third.argmax()] > CUT
    assert unlike.carried.cut[third.argmin()] < CUT
    same_truth, same = patterns(60, 0.6)  # another slide of the training patient
    kept = made.weigh(same, made.strength_at(1))
    before, after = (gene_metrics(values, same_truth)["pcc"].mean() for values in (same, kept.values))
    assert after > before - 0.01
    assert kept.carried.cut.max() < CUT


def test_weights_by_hand() -> None:
    recipe = CarryRecipe(rank=2, q=(0.5, 2.0), p=(0.0, 1.0))
    made = Carry(
        recipe, np.eye(3, 2, dtype=np.float32), np.array([1.0, 2.0], np.float32), np.array([0.5, 0.8], np.float32)
    )
    louder = np.array([4.0, 1.0])
    assert made.weights(louder, made.strength_at(1)) == pytest.approx([0.5, 1.0])
    assert made.weights(louder, made.strength_at(0)) == pytest.approx([0.5 / 16, 0.8])
    assert made.weights(louder, made.strength_at(0.5)) == pytest.approx([0.25**1.25 * 0.5**0.5, 0.8**0.5])
    silent = np.array([0.0, 1.0])  # it does not vary on the new slide
    assert made.weights(silent, made.strength_at(0)) == pytest.approx([0.5, 0.8])
    assert [made.gate(np.array([value])) for value in (0.2, 0.4, 0.6)] == pytest.approx([0, 0.5, 1])
    assert made.gate(None) == 1.0  # a head that cannot tell
    values = np.array([[1.0, 0, 5], [-1, 0, -5]], np.float32)
    dropped = made.weigh(values, made.strength_at(0))
    assert dropped.values[:, 2].tolist() == [0, 0]  # outside the factors
    assert dropped.carried.cut[2] == 1.0


def test_what_is_retrieved_has_its_share_before_anything_is_weighed() -> None:
    recipe = CarryRecipe(rank=1, q=(0, 0), p=(0, 0), retrieval=RetrievalPart(share=(0.0, 0.25)))
    made = Carry(recipe, np.eye(2, 1, dtype=np.float32), np.ones(1, np.float32), np.ones(1, np.float32))
    values, shown = np.array([[1.0, 7], [3, 9]]), np.array([[5.0, 0], [1, 0]])
    assert made.strength_at(0) == Strength(0, 0, 0.25, 0)
    assert made.strength_at(0.5) == Strength(0, 0, 0.125, 0.5)
    mixed = made.weigh(values, made.strength_at(0), shown)
    assert mixed.values.tolist() == [[2 - 0.75 + 0.5, 8], [2 + 0.75 - 0.5, 8]]
    assert mixed.carried.lives.tolist() == [[1], [0]]
    off = recipe.model_copy(update={"retrieval": None})
    assert Carry(off, made.basis, made.amplitude, made.reliability).strength_at(0).share == 0


def of_patients(third: list[float], loud: float) -> list[LeftOut]:
    """Slides of as many patients; the third pattern's PCC with the truth differs from patient to patient."""
    pairs = [patterns(seed, against, loud) for seed, against in enumerate(third)]
    return [LeftOut(i, truth, said, None) for i, (truth, said) in enumerate(pairs)]


def test_how_much_is_weighed_is_chosen_by_leaving_patients_out() -> None:
    """Where a pattern holds for all patients nothing is cut; where it runs against the truth of some, it is."""
    recipe = CarryRecipe(rank=4, retrieval=None)
    same = choose_strength(recipe, of_patients([0.9, 0.9, 0.9, 0.9], 1.0))
    assert same is not None
    assert same.p <= 0.5
    against = of_patients([-0.6, -0.5, 0.2, -0.7, -0.4], 2.0)
    apart = choose_strength(recipe, against)
    assert apart is not None
    assert apart.p > 0  # the third pattern's reliability is 0, and any power of it cuts
    better = Carry.learn(recipe, [each.truth for each in against], [each.predicted for each in against])
    truth, said = patterns(70, -0.6, 2.0)
    kept = better.weigh(said, apart).values
    assert gene_metrics(kept, truth)["pcc"].mean() > gene_metrics(said, truth)["pcc"].mean() + 0.1


def test_what_is_chosen_on_a_patient_has_not_seen_it() -> None:
    """With two patients each is weighed by what the other says alone: one that contradicts itself changes nothing."""
    recipe = CarryRecipe(rank=4, retrieval=None, grid=CarryGrid(q=(0.0,), p=(0.0, 1.0)))
    one, other = of_patients([0.9, -0.9], 1.0)
    scores = {}
    for p in (0.0, 1.0):
        from_other = Carry.learn(recipe, [other.truth], [other.predicted])
        from_one = Carry.learn(recipe, [one.truth], [one.predicted])
        strength = Strength(0.0, p, 0.0, 1.0)
        scores[p] = sum(
            gene_metrics(each.weigh(slide.predicted, strength).values, slide.truth)["pcc"].mean()
            for each, slide in ((from_other, one), (from_one, other))
        )
    chosen = choose_strength(recipe, [one, other])
    assert chosen is not None
    assert chosen.p == max(scores, key=lambda p: scores[p])


def test_genes_that_slides_lack_take_no_part_there() -> None:
    pairs = [patterns(seed, 0.6) for seed in range(4)]
    lacking = pairs[0][0].copy()
    lacking[:, 5] = np.nan
    made = Carry.learn(CarryRecipe(rank=6), [lacking, *(t for t, _ in pairs[1:])], [said for _, said in pairs])
    assert np.isfinite(made.basis).all()
    assert (made.reliability[:3] > 0.8).all()


def test_it_is_saved_beside_the_model_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    made = learnt()
    made = replace(made, chosen=Strength(1, 0.5, 0, 1))
    made.save(tmp_path)
    again = Carry.load(tmp_path, N_GENES)
    assert again.chosen == made.chosen == again.strength(np.zeros(3))
    assert again.recipe == made.recipe
    said = patterns(50, -0.6)[1]
    strength = made.strength_at(0.3)
    assert np.array_equal(again.weigh(said, strength).values, made.weigh(said, strength).values)
    with pytest.raises(RunError, match="it is of 30 genes, and the head of 29"):
        Carry.load(tmp_path, N_GENES - 1)
    replace(made, recipe=CarryRecipe(rank=6)).save(tmp_path)  # retrieves, and has nothing to retrieve from
    with pytest.raises(RunError, match="retrieves training spots, and none are kept"):
        Carry.load(tmp_path, N_GENES)
    (tmp_path / CARRY).write_bytes(b"nothing")
    with pytest.raises(RunError, match=f"{CARRY} cannot be read"):
        Carry.load(tmp_path, N_GENES)
    with pytest.raises(RunError, match=f"{CARRY} is missing: without it the head would predict otherwise"):
        Carry.load(tmp_path / "none", N_GENES)


def test_it_is_learnt_inside_the_training_slides_and_not_from_one() -> None:
    data = slides([40, 30, 50])
    recipe = load_train_recipe("ridge", ["carry={rank: 2}", "choose={}"])
    made, said = learn_carry(recipe, data, one_patient(data), ["a", "b"], quiet)
    assert made is not None
    assert made.chosen is None  # one patient: the likeness decides
    assert made.alike is not None
    assert len(made.alike.keys) == len(data)
    assert said == ""
    patients = {part.name: part.name for part in data.parts}
    several, _ = learn_carry(recipe, data, patients, ["a", "b"], quiet)
    assert several is not None
    assert several.chosen is not None
    plain = load_train_recipe("ridge", ["carry={rank: 2, retrieval: null, grid: null}", "choose={}"])
    gated, _ = learn_carry(plain, data, patients, ["a", "b"], quiet)
    assert gated is not None
    assert gated.chosen is None
    assert gated.alike is None
    assert made.basis.shape == (2, 2)
    kept = torch.zeros(len(data), dtype=torch.bool)
    kept[:40] = True
    none, said = learn_carry(recipe, data.subset(kept), one_patient(data), ["a", "b"], quiet)
    assert none is None
    assert "not known from a single training slide" in said
    off = load_train_recipe("ridge")
    assert learn_carry(off, data, one_patient(data), ["a", "b"], quiet) == (None, "")
    with pytest.raises(RecipeError, match="a head of kind nh2st takes too long"):
        load_train_recipe("nh2st", ["carry={}"])


def test_a_run_weighs_its_predictions_and_says_what_was_cut(study: Study) -> None:
    study.stored(views=8)
    store, options = study.folder / "store.zarr", {"recipe": "ridge", "genes": GENES[:6]}
    plain = train(store, out=study.folder / "plain", settings=["baselines=[]"], **options)  # type: ignore[arg-type]
    settings = [
        "baselines=[]",
        "carry={rank: 3, q: [3, 3], p: [2, 2], grid: null, retrieval: {share: [0.3, 0.3]}}",
    ]
    run = train(store, out=study.folder / "run", settings=settings, **options)  # type: ignore[arg-type]
    assert not (plain.path / "model" / CARRY).exists()
    held, before = (anndata.read_h5ad(each.path / "predictions" / "s1.h5ad") for each in (run, plain))
    assert not np.allclose(held.X, before.X, atol=1e-4)
    assert np.allclose(np.asarray(held.X).mean(0), np.asarray(before.X).mean(0), atol=1e-4)
    assert held.var["cut"].between(0, 1).all()
    assert held.uns["carry"].index.tolist() == ["1", "2", "3"]
    assert held.uns["carry"]["weights"].between(0, 1).all()
    assert held.varm["factors"].shape == (6, 3)
    assert (held.varm["factors"].sum(1) <= 1 + 1e-5).all()
    assert json.loads(held.uns["nh2st_pipe"]["carry"])["q"] >= 0
    model = load_model(run.path)
    assert model.carry is not None
    direct = type(model).from_pretrained(run.path)
    assert direct.carry is not None
    done = predict(run.path, embeddings=store, out=study.folder / "p")
    data = anndata.read_h5ad(done.files["s1"])
    rest = data.var["cut"] > CUT
    assert not data.var["trusted"][rest].any()
    assert any("rest mostly on patterns that do not carry over" in words for words in done.notices) == bool(rest.any())
    (run.path / "model" / CARRY).write_bytes(b"other")
    with pytest.raises(RunError, match=f"{CARRY} has changed since it was written"):
        load_model(run.path)
    (run.path / "model" / CARRY).unlink()  # as where weights and config alone were copied
    with pytest.raises(RunError, match=f"{CARRY} is missing"):
        load_model(run.path)
    with pytest.raises(RunError, match=f"{CARRY} is missing"):
        type(model).from_pretrained(run.path)


CONTEXT = [
    "baselines=[]", "head.network.epochs=2", "head.network.members=2", "head.network.width=16",
    "head.network.components=8", "head.kernel.rank=3", "carry={rank: 3, gate_from: 2, gate_to: 3, grid: null}",
]  # fmt: skip


def test_the_default_head_is_weighed_and_repeats_bit_for_bit(make_study: Callable[..., Study], tmp_path: Path) -> None:
    """Slides of one patient, taken for unlike: retrieved, weighed, and the same again; off, as it would have been."""
    study = make_study(n_slides=3, side=6, patients=["A"] * 3)
    study.stored(views=1)
    store = study.folder / "store.zarr"

    def predicted(name: str, *settings: str) -> anndata.AnnData:
        out = tmp_path / name
        train(store, out=out, genes=6, folds="none", settings=[*CONTEXT, *settings])
        return anndata.read_h5ad(out / "predictions" / "s1.h5ad")

    one, again = predicted("one"), predicted("again")
    assert np.array_equal(one.X, again.X)
    assert one.uns["carry"].equals(again.uns["carry"])
    strength = json.loads(one.uns["nh2st_pipe"]["carry"])
    assert strength == {"q": 2.0, "p": 1.0, "share": 0.25, "outside": 0.0}
    off, unretrieved = predicted("off", "carry=null"), predicted("none", "carry.retrieval=null")
    assert "carry" not in off.uns
    assert "cut" not in off.var
    for other in (off, unretrieved):
        assert not np.allclose(other.X, one.X, atol=1e-4)
    model = load_model(tmp_path / "one")
    assert model.carry is not None
    assert model.carry.alike is not None
    assert len(model.carry.alike.keys) == 3 * 36
    assert load_model(tmp_path / "off").carry is None


def test_a_new_slide_that_lacks_genes_is_weighed_as_any_other(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(n_slides=3, side=6, patients=["A"] * 3)
    study.stored(views=1)
    train(study.folder / "store.zarr", out=tmp_path / "run", genes=6, folds="none", settings=CONTEXT)
    new = make_study(n_slides=1, side=6, name="new")
    data = anndata.read_h5ad(new.folder / "s0.h5ad")
    panel = load_model(tmp_path / "run").genes
    data[:, [name for name in data.var_names if name != panel[0]]].write_h5ad(new.folder / "s0.h5ad")
    new.stored(views=1)
    done = predict(tmp_path / "run", embeddings=new.folder / "store.zarr", out=tmp_path / "p")
    said = anndata.read_h5ad(done.files["s0"])
    assert np.isfinite(said.X).all()
    assert np.isnan(said.layers["target"][:, 0]).all()
    assert said.var["cut"].between(0, 1).all()


def test_of_spots_without_a_slide_nothing_is_retrieved() -> None:
    data = slides([40, 30, 50])
    recipe = load_train_recipe(
        "ridge", ["carry={rank: 2, grid: null, retrieval: {share: [0.5, 0.5], k: 3}}", "choose={}"]
    )
    model = registry.fit(recipe, data, ["a", "b"], {}).model
    model.weigh_by(learn_carry(recipe, data, one_patient(data), ["a", "b"], quiet)[0])
    bare = replace(data, parts=())
    said = model.predict(bare)
    assert model.carry is not None
    plain = model.carry.recipe.model_copy(update={"retrieval": None})
    model.weigh_by(replace(model.carry, recipe=plain, alike=None))
    assert np.array_equal(said, model.predict(bare))


def test_parts_of_a_slide_count_by_their_tiles() -> None:
    said = patterns(50, -0.6, 2.0)[1]
    made = learnt()
    one, two = (
        made.weigh(said[rows], made.strength_at(g)).carried for rows, g in ((slice(30), 0), (slice(30, 144), 1))
    )
    both = Carried.mean([(1.0, one), (3.0, two)])
    assert both.cut == pytest.approx(one.cut / 4 + 3 * two.cut / 4, abs=1e-6)
    assert both.strength == Strength(2 / 4 + 3 * 0.5 / 4, 0.25, 0.0, 0.75)
    assert both.lives.dtype == both.weights.dtype == np.float32
    words = both.words()
    assert (words is None) == (not (both.cut > CUT).any())
    all_cut = Carried(one.strength, one.weights, one.louder, one.reliability, one.lives, np.full(30, 0.9, np.float32))
    assert (all_cut.words(np.arange(4)) or "").startswith("on this slide 4 of 4 genes rest mostly on patterns")
