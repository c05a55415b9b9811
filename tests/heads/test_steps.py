"""What training by steps does beside the loss: views, learning rates, weight decay, dropout, where it begins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from nh2st_pipe.heads.attention import Attention
from nh2st_pipe.heads.base import Plan
from nh2st_pipe.heads.fitting import fit_by_steps
from nh2st_pipe.heads.members import Members, fit_members
from nh2st_pipe.heads.nh2st import CrossAttention
from nh2st_pipe.recipes.train import AttentionPart, FitRecipe, MembersRecipe
from tests.heads.test_heads import samples, small

LR = 0.01


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step of whatever is trained."""
    seen: list[float] = []

    class Recording(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    return seen


def members_fit(train: Any, recipe: MembersRecipe, features: Any = None) -> Members:
    torch.manual_seed(0)
    model = Members(recipe.members, train.dim, recipe.width, 5)
    target = torch.zeros(len(train), 5)
    gathered = features or (lambda rows, views: train.gather(rows, views).float())
    fit_members(model, train, gathered, target, torch.ones(len(train)), recipe, 3)
    return model


def test_every_epoch_of_steps_shows_each_spot_once_in_a_view_drawn_at_random() -> None:
    train, model, seen = samples(), small(), list[tuple[torch.Tensor, torch.Tensor]]()

    def losses(rows: torch.Tensor, views: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append((rows, views))
        return {"total": model.decoder[-1].bias.square().sum()}  # type: ignore[operator]

    fit_by_steps(model, losses, train, Plan(seed=0, steps=FitRecipe(batch_size=7), epochs=40))
    rows, views = (torch.cat(each).view(40, len(train)) for each in zip(*seen, strict=True))
    assert (rows.sort(1).values == torch.arange(len(train))).all()
    assert torch.bincount(views.flatten(), minlength=8).numpy() / views.numel() == pytest.approx([1 / 8] * 8, rel=0.3)
    assert len(views[rows == 0].unique()) > 4


def test_every_epoch_shows_each_member_each_spot_once_in_a_view_of_its_own() -> None:
    train, seen = samples(), list[tuple[torch.Tensor, torch.Tensor]]()

    def features(rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        seen.append((rows, views))
        return train.gather(rows, views).float()

    members_fit(train, MembersRecipe(members=2, width=4, epochs=40, batch_size=8), features)
    rows, views = (torch.cat(each, 1).view(2, 40, len(train)) for each in zip(*seen, strict=True))
    assert (rows.sort(2).values == torch.arange(len(train))).all()
    assert torch.bincount(views.flatten(), minlength=8).numpy() / views.numel() == pytest.approx([1 / 8] * 8, rel=0.3)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(views[0], views[1])


def test_the_learning_rate_of_steps_falls_every_so_many_epochs(rates: list[float]) -> None:
    train, model = samples(), small()
    steps = FitRecipe(batch_size=15, lr=LR, lr_step=2, lr_gamma=0.5)
    fit_by_steps(
        model,
        lambda rows, views: {"total": model.decoder[-1].bias.square().sum()},  # type: ignore[operator]
        train,
        Plan(seed=0, steps=steps, epochs=5),
    )
    assert rates == pytest.approx([LR * 0.5 ** (epoch // 2) for epoch in range(5) for _ in range(2)])


def test_the_learning_rate_of_members_rises_and_falls_to_nothing_as_a_cosine(rates: list[float]) -> None:
    members_fit(samples(), MembersRecipe(width=4, epochs=6, batch_size=6, lr=LR, warmup=8))
    assert len(rates) == 30
    assert rates[:8] == pytest.approx([LR * (step + 1) / 8 for step in range(8)])
    assert rates[8:] == pytest.approx([LR * (1 + math.cos(math.pi * step / 22)) / 2 for step in range(22)])


def test_training_ends_so_many_epochs_after_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.4, 0.3, 0.3, 0.3, 0.9, 0.9])
    monkeypatch.setattr("nh2st_pipe.heads.fitting.mean_pcc", lambda *_: next(scores))
    train, model = samples(), small()
    done = fit_by_steps(
        model,
        lambda rows, views: {"total": model.decoder[-1].bias.square().sum()},  # type: ignore[operator]
        train,
        Plan(seed=0, steps=FitRecipe(batch_size=15, epochs=7, patience=3), watched=samples(seed=5)),
    )
    assert done.best_epoch == 2
    assert [row["watched_pcc"] for row in done.history] == [0.1, 0.4, 0.3, 0.3, 0.3]


def test_weights_that_nothing_moves_decay() -> None:
    train, model = samples(), small()
    before = model.query.weight.detach().clone()
    steps = FitRecipe(batch_size=30, lr=LR, lr_step=100, weight_decay=0.5)
    fit_by_steps(
        model, lambda rows, views: {"total": 0 * model.query.weight.sum()}, train, Plan(seed=0, steps=steps, epochs=4)
    )
    assert torch.allclose(model.query.weight, before * (1 - LR * 0.5) ** 4, atol=1e-6)


def test_members_weights_decay(rates: list[float]) -> None:
    """With features and targets of zero no gradient reaches the first layer."""
    torch.manual_seed(0)
    before = Members(1, 7, 4, 5).hidden.detach().clone()
    recipe = MembersRecipe(width=4, epochs=3, batch_size=30, lr=LR, warmup=0, weight_decay=0.5)
    after = members_fit(samples(), recipe, lambda rows, views: torch.zeros(*rows.shape, 7)).hidden
    assert torch.allclose(after, before * math.prod(1 - rate * 0.5 for rate in rates), atol=1e-6)


def test_in_training_heads_of_the_cross_attention_are_dropped_whole() -> None:
    block = CrossAttention(8, 4, 1.0, 0.5)
    torch.nn.init.eye_(block.out.weight)
    torch.nn.init.zeros_(block.out.bias)
    block.mlp = torch.nn.Sequential(torch.nn.Linear(8, 8))
    for values in block.mlp.parameters():
        torch.nn.init.zeros_(values)
    block.norm_out = torch.nn.Identity()  # type: ignore[assignment]
    query, other = torch.zeros(50, 8), torch.randn(50, 8)
    whole = block.eval()(query, other).view(50, 4, 2)
    torch.manual_seed(0)
    dropped = block.train()(query, other).view(50, 4, 2) / whole
    kept = dropped[..., 0].round()
    assert torch.allclose(dropped, kept[..., None].expand(-1, -1, 2), atol=1e-4)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert float((kept == 0).float().mean()) == pytest.approx(0.5, abs=0.12)


def test_attention_to_the_nearest_is_dropped_out_in_training_alone() -> None:
    torch.manual_seed(0)
    block = Attention(1, 6, 5, AttentionPart(neighbours=4, heads=2, key=3, value=2, dropout=0.5))
    inputs = torch.randn(1, 7, 6), torch.randn(9, 6), torch.randint(9, (1, 7, 4)), torch.rand(1, 7, 4)
    block.eval()
    assert torch.equal(block(*inputs), block(*inputs))
    block.train()
    assert not torch.equal(block(*inputs), block(*inputs))


@pytest.mark.parametrize("where", ["input_dropout", "dropout"])
def test_members_drop_out_in_training_alone(where: str) -> None:
    torch.manual_seed(0)
    model, x = Members(2, 7, 40, 5), torch.randn(2, 6, 7)
    model.train()
    assert not torch.equal(model(x, **{where: 0.5}), model(x, **{where: 0.5}))
    model.eval()
    assert torch.equal(model(x, **{where: 0.5}), model(x))
    plain = {"input_dropout": 0.0, "dropout": 0.0}
    recipe = MembersRecipe(width=8, epochs=2, **{**plain, where: 0.5})
    other = members_fit(samples(), MembersRecipe(width=8, epochs=2, **plain))
    assert not torch.equal(members_fit(samples(), recipe).out, other.out)


def test_the_decoder_begins_at_the_mean_of_the_training_targets() -> None:
    train, model = samples(), small()
    model.prepare(train)
    assert train.target is not None
    last = model.decoder[-1]
    assert isinstance(last, torch.nn.Linear)
    assert np.allclose(last.bias.detach(), train.target.mean(0), atol=1e-6)
