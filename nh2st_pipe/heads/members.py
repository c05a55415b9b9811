"""A small network several times over, its members trained as one batched model.

Each member is linear → ReLU → linear with its own weights, its own order of spots, its own views and dropout; a step
multiplies all of them at once. Letters: M members, b spots of a batch, f features, h width, G genes, N spots, V views.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.core.errors import TrainError

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import MembersRecipe

__all__ = ["Members", "fit_members"]


class Members(nn.Module):
    """M networks f → h → G."""

    def __init__(self, members: int, features: int, width: int, genes: int, output_scale: float = 1.0) -> None:
        super().__init__()
        self.hidden = nn.Parameter(_uniform(members, features, width))
        self.hidden_bias = nn.Parameter(torch.zeros(members, 1, width))
        self.out = nn.Parameter(output_scale * _uniform(members, width, genes))
        self.out_bias = nn.Parameter(torch.zeros(members, 1, genes))

    def forward(self, x_mbf: torch.Tensor, input_dropout: float = 0.0, dropout: float = 0.0) -> torch.Tensor:
        """Return M × b × G; dropout acts while training."""
        x = F.dropout(x_mbf, input_dropout, self.training)
        hidden = F.relu(torch.baddbmm(self.hidden_bias, x, self.hidden))
        return torch.baddbmm(self.out_bias, F.dropout(hidden, dropout, self.training), self.out)

    def mean(self, x_bf: torch.Tensor) -> torch.Tensor:
        """Return b × G: the members' mean for the same spots."""
        return self(x_bf.expand(len(self.hidden), -1, -1)).mean(0)  # type: ignore[no-any-return]


def _uniform(members: int, fan_in: int, fan_out: int) -> torch.Tensor:
    return (2 * torch.rand(members, fan_in, fan_out) - 1) / math.sqrt(fan_in)


def fit_members(
    model: Members,
    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_ng: torch.Tensor,
    weights_n: torch.Tensor,
    recipe: MembersRecipe,
    n_views: int,
    seed: int,
    on_epoch: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place and return one record per epoch.

    `features(rows, views)` returns … × f, float32, for spots in their views, both int64 of any one shape. Every epoch
    shows each member every spot once, in a view drawn at random; the loss is the squared error weighted by `weights_n`,
    over the genes whose target is not NaN.
    AdamW, the learning rate rising over `recipe.warmup` steps and falling to 0 as a cosine. Raises TrainError where the
    loss is no longer a number; the weights are then those of the last epoch at which it was.
    """
    n, m, device = len(target_ng), recipe.members, target_ng.device
    known_ng = torch.isfinite(target_ng)
    share_ng = None
    if not known_ng.all():  # genes that a slide lacks weigh nothing, and the others of its spots as much more
        share_ng = known_ng / known_ng.sum(1, keepdim=True).clamp(min=1)
        target_ng = torch.where(known_ng, target_ng, 0.0)
    draw = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same batches
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    steps = recipe.epochs * math.ceil(n / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.warmup, steps))
    history = []
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        began = time.perf_counter()
        order = torch.stack([torch.randperm(n, generator=draw) for _ in range(m)]).to(device)
        views = torch.randint(n_views, (m, n), generator=draw).to(device)
        total = torch.zeros((), device=device)
        for at in range(0, n, recipe.batch_size):
            rows, view = order[:, at : at + recipe.batch_size], views[:, at : at + recipe.batch_size]
            out = model(features(rows, view), recipe.input_dropout, recipe.dropout)
            squares = (out - target_ng[rows]).square()
            errors = squares.mean(2) if share_ng is None else (squares * share_ng[rows]).sum(2)
            errors = errors * weights_n[rows]
            optimiser.zero_grad(set_to_none=True)
            errors.mean(1).sum().backward()  # each member's gradient is its own, however many there are
            optimiser.step()
            schedule.step()
            total += errors.detach().sum()
        loss = float(total) / (n * m)
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is not a number from epoch {epoch} on; a smaller learning rate may help "
                f"(--set head.network.lr={recipe.lr / 10:g})"
            )
        history.append({"epoch": float(epoch), "loss_total": loss, "train_seconds": time.perf_counter() - began})
        if on_epoch is not None:
            on_epoch(epoch)
    model.eval()
    return history


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
