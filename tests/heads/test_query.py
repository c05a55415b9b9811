"""Genes that a head never saw: from vectors whose tie to expression is known, and from what was measured of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RecipeError, TrainError, UsageError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.query import Query, _ridge
from nh2st_pipe.recipes.train import QueryHead, TrainRecipe, load_train_recipe
from nh2st_pipe.runs.model import load_model
from tests.heads.test_context import TEST, TRAIN, samples_of

SEEN, UNSEEN = [f"g{i}" for i in range(30)], [f"u{i}" for i in range(8)]
MIX = np.random.default_rng(0).standard_normal((38, 5))
"""What each gene has of the worked example's five."""


def made(names: list[str], genes: list[str]) -> Samples:
    """The worked example's five genes, mixed into others."""
    data = samples_of(names)
    assert data.raw is not None
    rows = [[*SEEN, *UNSEEN].index(gene) for gene in genes]
    raw = data.raw.double() @ torch.from_numpy(MIX[rows].T) + torch.tensor(rows, dtype=torch.float64)
    return replace(data, target=raw, raw=raw, smoothed=False)


def recipe(**head: Any) -> TrainRecipe:
    fields = {"kind": "nh2st-query", "network": {"components": 4, "width": 8, "epochs": 3}, **head}
    return TrainRecipe.model_validate({"name": "query", "head": fields})


def trained(genes: list[str] = SEEN, **head: Any) -> Query:
    model = registry.fit(recipe(**head), made(TRAIN, genes), genes, {"store": {}}).model
    assert isinstance(model, Query)
    return model


def file_of(path: Path, vectors: NDArray[Any], genes: list[str]) -> str:
    columns = {f"v{i}": vectors[:, i] for i in range(vectors.shape[1])}
    pl.DataFrame({"gene": genes, **columns}).write_csv(path)
    return str(path)


def off(said: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(np.abs(said - truth).max() / truth.std(axis=0).min())


def test_genes_are_predicted_from_vectors_as_they_are_where_these_tell_all(tmp_path: Path) -> None:
    test, every = made(TEST, UNSEEN), [*SEEN, *UNSEEN]
    noise = 1e-4 * np.random.default_rng(1).standard_normal((38, 3))
    # A turn of what genes are made of, and where their means lie; and values that say next to nothing.
    tells = np.column_stack((MIX @ np.linalg.qr(np.random.default_rng(2).standard_normal((5, 5)))[0], range(38), noise))
    model = trained(vectors=file_of(tmp_path / "v.csv", tells, every))
    asked = model.asking(UNSEEN)
    assert asked.genes == every
    assert asked.unseen == tuple(UNSEEN)
    said = asked.predict(test)
    assert np.array_equal(said[:, : len(SEEN)], model.predict(test))  # what it saw is predicted as before
    on_all = trained(every, vectors=None).predict(test)
    for i in range(len(SEEN), len(every)):
        assert np.corrcoef(said[:, i], on_all[:, i])[0, 1] > 0.99
    assert model.genes == SEEN
    assert model.factors.shape[0] == len(SEEN)


def test_vectors_that_tell_nothing_give_the_mean_of_all_genes(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).standard_normal((38, 6))
    asked = trained(vectors=file_of(tmp_path / "v.csv", noise, [*SEEN, *UNSEEN])).asking(UNSEEN)
    said = asked.predict(made(TEST, UNSEEN))[:, len(SEEN) :]
    alike = np.corrcoef(said.T)
    assert np.median(np.abs(alike)) > 0.8  # hardly more than one map


def test_what_training_slides_measured_of_a_gene_is_learnt_as_if_it_had_been_there() -> None:
    both: Any = {"network": None, "kernel": {"rank": 30}}
    model, test = trained(**both), made(TEST, [*SEEN, *UNSEEN])
    taught = model.taught(made(TRAIN, SEEN), made(TRAIN, UNSEEN), UNSEEN)
    on_all = trained([*SEEN, *UNSEEN], **both)
    assert off(taught.predict(test), on_all.predict(test)) < 0.02


def test_a_gene_that_a_training_slide_lacks_is_taught_by_the_others() -> None:
    both: Any = {"network": None, "kernel": {"rank": 30}}
    model, others = trained(**both), made(TRAIN, UNSEEN)
    assert others.raw is not None
    lacking = others.raw.clone()
    lacking[others.parts[0].rows, 2] = torch.nan
    lacking[:, 3] = torch.nan
    few = model.taught(made(TRAIN, SEEN), replace(others, raw=lacking, target=lacking), UNSEEN)
    whole = model.taught(made(TRAIN, SEEN), others, UNSEEN)
    found, plain = (each.factors[len(SEEN) :] for each in (few, whole))
    assert torch.allclose(found[[0, 1, 4, 5]], plain[[0, 1, 4, 5]])
    assert torch.allclose(found[2], plain[2], atol=0.05)
    assert not torch.equal(found[2], plain[2])
    assert not found[3].any()


def test_it_saves_and_loads_with_the_genes_that_can_be_asked_for(tmp_path: Path) -> None:
    path = file_of(tmp_path / "v.csv", MIX, [*SEEN, *UNSEEN])
    model = trained(vectors=path)
    said = model.asking(["u3", "g1", "u0"]).predict(made(TEST, UNSEEN))
    assert said.shape[1] == len(SEEN) + 2
    model.save_pretrained(tmp_path / "model")
    Path(path).unlink()  # the model alone is enough
    loaded = load_model(tmp_path)
    assert np.array_equal(loaded.asking(["u3", "g1", "u0"]).predict(made(TEST, UNSEEN)), said)


def test_genes_without_vectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"was not trained on u1, and has no gene vectors.*--gene-vectors FILE"):
        trained().asking(["g1", "u1"])
    assert trained().asking(["g1"]).genes == SEEN
    model = trained(vectors=file_of(tmp_path / "v.csv", MIX, [*SEEN, *UNSEEN]))
    with pytest.raises(UsageError, match=r"u77; did you mean 'u7'"):
        model.asking(["u1", "u77"])
    other = registry.fit(load_train_recipe("ridge", ["choose={}"]), made(TRAIN, SEEN), SEEN, {}).model
    with pytest.raises(UsageError, match="kind ridge predicts the genes that it was trained on alone, and not u1"):
        other.asking(["u1"])
    assert other.asking(["g1"]) is other


def test_vectors_of_too_few_genes_are_refused_and_some_that_lack_are_told(tmp_path: Path) -> None:
    few = file_of(tmp_path / "few.csv", MIX[25:], [*SEEN[25:], *UNSEEN])
    with pytest.raises(TrainError, match=r"few\.csv have 5 of the 30 genes .*, and 10 are needed; they name genes as"):
        trained(vectors=few)
    some = file_of(tmp_path / "some.csv", MIX[5:], [*SEEN[5:], *UNSEEN])
    done = registry.fit(recipe(vectors=some), made(TRAIN, SEEN), SEEN, {"store": {}})
    assert done.notice == f"5 of 30 genes have no vector in {some}"


def test_the_penalty_is_that_of_the_least_error_left_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 30))
    x -= x.mean(axis=0)
    y = np.column_stack((x @ rng.standard_normal(30) + 3, rng.standard_normal(40), x[:, 0] + rng.standard_normal(40)))
    w = rng.uniform(0.2, 3, 40)
    weight, bias = _ridge(x, y, w)
    assert np.allclose(w @ (x @ weight + bias - y), 0)
    assert off(x @ weight + bias, y) > 0.1  # the second and third are not followed
    assert np.abs((x @ weight + bias - y)[:, 0]).max() < 0.5

    def left_out(of: int, penalty: float) -> float:
        total = 0.0
        for i in range(len(x)):
            found, intercept = solved(of, np.arange(len(x)) != i, penalty)
            total += float(w[i] * (y[i, of] - intercept - x[i] @ found) ** 2)
        return total

    def solved(of: int, rows: NDArray[Any], penalty: float) -> tuple[NDArray[Any], float]:
        wide = np.column_stack((x[rows], np.ones(rows.sum())))
        ridge = penalty * w.mean() * np.diag([1.0] * 30 + [0.0])
        both = np.linalg.solve(wide.T @ (w[rows, None] * wide) + ridge, wide.T @ (w[rows] * y[rows, of]))
        return both[:-1], float(both[-1])

    root = np.sqrt(w / w.mean())[:, None]
    square = float(np.mean(np.linalg.svd(root * (x - w @ x / w.sum()))[1] ** 2))
    for of in range(3):
        errors = {penalty: left_out(of, penalty * square) for penalty in 10.0 ** np.arange(-3, 5)}
        nothing = left_out(of, 1e12)
        best = min(errors, key=lambda penalty: errors[penalty])
        found = solved(of, np.ones(40, bool), best * square)[0]
        assert np.allclose(weight[:, of], found if errors[best] < nothing else 0.0, atol=1e-6)


def test_what_cannot_go_with_it_is_refused() -> None:
    for settings, words in (
        (["carry={}"], "carry is learnt gene by gene"),
        (["targets.scale_over=panel"], "needs targets.scale_over=all"),
        (["protocol=paper"], "needs targets.scale_over=all"),
        (["head.rank=null"], "rank"),
        (["head.vectors_sha256=0"], "vectors_sha256"),
        (["leave_genes_out=5", "folds=none"], "leave_genes_out has no effect without folds"),
        (["leave_genes_out=1"], "leave_genes_out"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_train_recipe("nh2st-query", settings)
    with pytest.raises(RecipeError, match="leave_genes_out has no effect on a head of kind ridge"):
        load_train_recipe("ridge", ["leave_genes_out=5"])
    head = load_train_recipe("nh2st-query").head
    assert isinstance(head, QueryHead)
    assert isinstance(head.in_brief(), QueryHead)
