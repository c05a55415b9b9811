"""Factors of targets in place of genes: what is learnt in them is what is learnt of genes, where they hold all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads import factors, registry
from nh2st_pipe.heads.base import Blocked, LowRank
from nh2st_pipe.heads.context import Context
from nh2st_pipe.heads.factors import loadings, scores
from nh2st_pipe.heads.members import Members
from nh2st_pipe.recipes.train import ContextHead, TrainRecipe
from nh2st_pipe.runs.model import load_model
from tests.heads.test_context import TEST, TRAIN, head, samples_of

WIDE = 40
MANY = [f"g{i}" for i in range(WIDE)]


def wide(names: list[str]) -> Samples:
    """The worked example's five genes, mixed into forty that vary in five directions."""
    data = samples_of(names)
    assert data.raw is not None
    mix = torch.from_numpy(np.random.default_rng(0).standard_normal((data.raw.shape[1], WIDE)))
    raw = data.raw.double() @ mix + 1
    return replace(data, target=raw, raw=raw, smoothed=False)


def of_rank(rank: int | None, **changes: object) -> TrainRecipe:
    return TrainRecipe.model_validate({"name": "context", "head": head(rank=rank, **changes)})


def test_factors_that_hold_all_predict_what_genes_do() -> None:
    train, test = wide(TRAIN), wide(TEST)
    both = {"network": None, "kernel": {"rank": 30}}
    genes, few = (registry.fit(of_rank(rank, **both), train, MANY, {}).model for rank in (None, 8))
    assert few.state_dict()["kernel_coefficients"].shape[1] == 8
    assert genes.state_dict()["kernel_coefficients"].shape[1] == WIDE
    assert np.abs(few.predict(test) - genes.predict(test)).max() < 1e-4 * genes.predict(test).std()
    one = registry.fit(of_rank(1, **both), train, MANY, {}).model
    assert np.abs(one.predict(test) - genes.predict(test)).max() > 0.05 * genes.predict(test).std()


def test_a_head_of_factors_saves_and_loads(tmp_path: Path) -> None:
    train, test = wide(TRAIN), wide(TEST)
    made = registry.fit(of_rank(3), train, MANY, {"store": {}}).model
    said = made.predict_spots(test)
    assert said.values.shape == (len(test), WIDE)
    assert said.spread is not None
    assert said.spread.shape == (len(test), WIDE)
    made.save_pretrained(tmp_path / "model")
    assert np.array_equal(load_model(tmp_path).predict(test), said.values)


def test_a_head_of_an_earlier_version_learnt_genes() -> None:
    many = [f"g{i}" for i in range(300)]
    fields = ContextHead.model_validate({"kind": "nh2st-context"}).model_dump(mode="json")
    assert "factors" in dict(Context(4, many, fields).named_buffers())
    del fields["rank"]
    assert "factors" not in dict(Context(4, many, fields).named_buffers())


def test_scores_of_a_slide_that_lacks_genes_are_found_from_the_others() -> None:
    rng = np.random.default_rng(0)
    directions = torch.from_numpy(np.linalg.qr(rng.standard_normal((WIDE, 4)))[0])
    truth, mean = torch.from_numpy(rng.standard_normal((30, 4))), torch.from_numpy(rng.standard_normal(WIDE))
    raw = truth @ directions.T + mean
    assert torch.allclose(scores(raw, mean, directions), truth)
    lacking = raw.clone()
    lacking[:, ::4] = torch.nan
    assert torch.allclose(scores(lacking, mean, directions), truth, atol=0.02)
    nowhere = mean.clone()
    nowhere[1] = torch.nan  # a gene that no slide has
    assert torch.isfinite(scores(lacking, nowhere, directions)).all()


def test_loadings_are_orthonormal_and_from_some_spots_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    train = wide(TRAIN)
    mean = torch.zeros(WIDE)
    every = loadings(train, mean, 8, 0)
    assert torch.allclose(every.T @ every, torch.diag(torch.tensor([1.0] * 5 + [0.0] * 3)), atol=1e-5)
    monkeypatch.setattr(factors, "_MOST_VALUES", 20 * WIDE)
    seen = list[int]()
    plain = factors.axes

    def watched(of: list[np.ndarray], rank: int) -> np.ndarray:
        seen.append(sum(map(len, of)))
        return plain(of, rank)

    monkeypatch.setattr(factors, "axes", watched)
    some = loadings(train, mean, 8, 0)
    assert seen == [20]
    assert float((every[:, :5].T @ some[:, :5]).square().sum()) > 4.9  # the same five directions


def test_the_spread_of_genes_is_that_of_what_members_say_of_them() -> None:
    torch.manual_seed(0)
    model = Members(3, 7, 5, 4)
    onto, mean_of = torch.linalg.qr(torch.randn(9, 4))[0], torch.randn(9)
    x = [torch.randn(6, 7)]
    with torch.no_grad():
        said = Blocked.of_low_rank(LowRank(*model.apart(x)[:1], onto, mean_of, model.apart(x)[1]))
        each = model(x[0].expand(3, -1, -1)) @ onto.T + mean_of
    for genes in (slice(0, 9), slice(2, 5)):
        assert np.allclose(said.values(genes), each.mean(0)[:, genes], atol=1e-6)
        assert said.spread is not None
        assert np.allclose(said.spread(genes), each.std(0, correction=0)[:, genes], atol=1e-6)


def test_values_of_low_rank_are_turned_without_being_made() -> None:
    rng = np.random.default_rng(0)
    made = LowRank(*(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((12, 3), (9, 3), 9)))
    basis = rng.standard_normal((9, 2))
    values = made.values(slice(0, 9)).astype(np.float64)
    assert np.allclose(made.onto(basis), (values - values.mean(0)) @ basis, atol=1e-5)
