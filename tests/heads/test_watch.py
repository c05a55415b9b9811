from __future__ import annotations

import pytest
import torch

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import FeatureScaler
from nh2st_pipe.heads.members import Members, fit_members
from nh2st_pipe.heads.watch import Watch
from nh2st_pipe.recipes.train import MembersRecipe, TrainRecipe
from tests.heads.test_context import GENES, TRAIN, samples_of
from tests.heads.test_heads import recipe, samples


@pytest.mark.parametrize("members", [1, 3])
def test_training_stops_at_the_last_good_epoch_and_names_the_slide(members: int) -> None:
    """From the fourth epoch on one slide's features are no numbers."""
    train = samples_of(TRAIN, torch.float32)
    target = torch.randn(len(train), 5, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(len(train))
    part = train.parts[1]
    assert part.slide_id == "train-2"

    def features(rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        seen.scatter_add_(0, rows.flatten(), torch.ones(rows.numel()))
        x = train.gather(rows, views).float()
        inside = (rows >= part.start) & (rows < part.stop) & (seen[rows] > 3 * members)
        return torch.where(inside[..., None], torch.nan, x)

    options = MembersRecipe(members=members, width=8, epochs=9, batch_size=16, dropout=0, input_dropout=0)

    torch.manual_seed(0)
    model = Members(members, 6, 8, 5)
    made = fit_members(model, train, features, target, torch.ones(len(train)), options, 1)
    assert [row["epoch"] for row in made.history] == [1, 2, 3]
    notice = made.notice
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert "not a number from epoch 4 on, first on spots of train-2; a smaller learning rate may help" in notice
    assert "(--set head.network.lr=5e-05). The head is that of epoch 3" in notice
    assert "train-1" not in notice


def test_steps_stop_at_the_last_good_epoch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe("nh2st").model_dump()
    values["fit"] |= {"epochs": 6}
    epoch = 0

    def on_epoch(number: int) -> None:
        nonlocal epoch
        epoch = number

    def broken(self: FeatureScaler, embeddings: torch.Tensor) -> torch.Tensor:
        return plain(self, embeddings) * (torch.nan if epoch == 4 and self.training else 1.0)

    plain = FeatureScaler.forward
    monkeypatch.setattr(FeatureScaler, "forward", broken)
    done = registry.fit(TrainRecipe.model_validate(values), samples(), GENES, {}, on_epoch=on_epoch, epochs=6)
    assert (done.best_epoch, len(done.history)) == (4, 4)
    assert "from epoch 5 on" in done.notice
    assert all(bool(torch.isfinite(p).all()) for p in done.model.parameters())


def test_without_a_good_epoch_there_is_nothing_to_keep() -> None:
    train = samples_of(TRAIN, torch.float32)
    watch = Watch(torch.nn.Linear(2, 2), train, "fit.lr", 0.01)
    watch.batch(torch.tensor([1, 2]), torch.tensor([1.0, float("inf")]))
    with pytest.raises(TrainError, match=r"from epoch 1 on, first on spots of train-1; .*fit\.lr=0\.001"):
        watch.epoch(1, float("nan"))
