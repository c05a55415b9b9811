"""A small network several times over, its members trained as one batched model.

Each member is linear → ReLU → linear with its own weights, its own order of spots, its own views and dropout; a step
multiplies all of them at once. Letters: M members, b spots of a batch, f features, h width, G genes, N spots, V views.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.attention import Attention, Nearest
from nh2st_pipe.heads.base import Fit
from nh2st_pipe.heads.contrast import Contrast
from nh2st_pipe.heads.repeated import Repeated, adamw, set_rate
from nh2st_pipe.heads.watch import Watch

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import AttentionPart, ContrastPart, MembersRecipe

__all__ = ["Members", "Surroundings", "fit_members", "uniform"]

_AT_ONCE = 1024  # spots of a slide in one prediction, so that what attention gathers stays small
_FEWEST_AT_ONCE = 64
_VALUES_AT_ONCE = 1 << 22  # of all members, so that memory stays flat in the genes and views


@dataclass(frozen=True)
class Surroundings:
    """What attention sees of the spots around each spot."""

    features: torch.Tensor
    """N × p: every spot, as its neighbours see it."""
    nearest: Nearest


class Members(nn.Module):
    """M networks f → h → G.

    With `attention` (p and its fields), the first p features look at the spot's neighbours, and what they see is added
    before the ReLU. With `contrast`, hidden layer and target are compared in training.
    """

    def __init__(
        self,
        members: int,
        features: int,
        width: int,
        genes: int,
        output_scale: float = 1.0,
        attention: tuple[int, AttentionPart] | None = None,
        contrast: ContrastPart | None = None,
    ) -> None:
        super().__init__()
        self.hidden = nn.Parameter(uniform(members, features, width))
        self.hidden_bias = nn.Parameter(torch.zeros(members, 1, width))
        self.out = nn.Parameter(output_scale * uniform(members, width, genes))
        self.out_bias = nn.Parameter(torch.zeros(members, 1, genes))
        self.attention = Attention(members, attention[0], width, attention[1]) if attention else None
        self.seen = attention[0] if attention else 0
        self.contrast = Contrast(members, width, genes, contrast) if contrast else None

    def forward(self, x_mbf: torch.Tensor, input_dropout: float = 0.0, dropout: float = 0.0) -> torch.Tensor:
        """Return M × b × G; dropout acts while training."""
        return self.decode(self.encode(x_mbf, input_dropout), dropout)

    def encode(
        self,
        x_mbf: torch.Tensor,
        input_dropout: float = 0.0,
        rows_mb: torch.Tensor | None = None,
        around: Surroundings | None = None,
    ) -> torch.Tensor:
        """Return the hidden layer M × b × h of the spots `rows`, which attention needs to know."""
        x = F.dropout(x_mbf, input_dropout, self.training)
        hidden = torch.baddbmm(self.hidden_bias, x, self.hidden)
        if self.attention is not None:
            assert rows_mb is not None
            assert around is not None
            near, distance = around.nearest.rows[rows_mb], around.nearest.distance[rows_mb]
            if self.training and near.is_cuda:  # to find the distinct ones takes longer there than it saves
                seen = self.attention(x[..., : self.seen], around.features[near], None, distance)
            else:
                distinct, place = torch.unique(near, return_inverse=True)  # each is projected once
                seen = self.attention(x[..., : self.seen], around.features[distinct], place, distance)
            hidden = hidden + seen
        return F.relu(hidden)

    def decode(self, hidden_mbh: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Return M × b × G."""
        return torch.baddbmm(self.out_bias, F.dropout(hidden_mbh, dropout, self.training), self.out)

    def agreed(
        self, views: Sequence[torch.Tensor], around: Surroundings | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the members say of the same b spots, and their standard deviation, b × G each; None for one.

        `views` are the spots' features b × f in each view, over which each member's mean is taken; with attention they
        are all spots of a slide. For trained members: nothing is dropped out.
        """
        n, genes, device = len(views[0]), self.out.shape[2], views[0].device
        mean = torch.empty(n, genes, device=device)
        spread = torch.empty(n, genes, device=device) if len(self.hidden) > 1 else None
        for rows, of_members in self._of_members(views, around):
            mean[rows] = of_members.mean(0)
            if spread is not None:
                spread[rows] = of_members.sub_(mean[rows]).square_().mean(0).sqrt_()
        return mean, spread

    def apart(
        self, views: Sequence[torch.Tensor], around: Surroundings | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the same mean, b × G, and how far each member is from it, M × b × G; None for one."""
        n, genes, device = len(views[0]), self.out.shape[2], views[0].device
        mean, m = torch.empty(n, genes, device=device), len(self.hidden)
        apart = torch.empty(m, n, genes, device=device) if m > 1 else None
        for rows, of_members in self._of_members(views, around):
            mean[rows] = of_members.mean(0)
            if apart is not None:
                apart[:, rows] = of_members.sub_(mean[rows])
        return mean, apart

    def _of_members(
        self, views: Sequence[torch.Tensor], around: Surroundings | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what each member says of some of the spots, M × b × G, with their rows."""
        m, genes = len(self.hidden), self.out.shape[2]
        n, device = len(views[0]), views[0].device
        most = max(genes, len(views) * self.hidden.shape[2])
        at_once = max(_FEWEST_AT_ONCE, min(_AT_ONCE, _VALUES_AT_ONCE // (m * most)))
        table = None if self.attention is None or around is None else self.attention.table(around.features)
        for rows in torch.arange(n, device=device).split(at_once):
            x = torch.stack([view[rows] for view in views])
            hidden = torch.matmul(x.flatten(0, 1), self.hidden).add_(self.hidden_bias).unflatten(1, x.shape[:2])
            if table is not None and self.attention is not None and around is not None:
                near, distance = around.nearest.rows[rows], around.nearest.distance[rows]
                hidden += self.attention.of_views(x[..., : self.seen], table, near, distance)
            yield rows, self.decode(hidden.relu_().mean(1))  # the mean of what is decoded, as decoding is linear


def uniform(members: int, fan_in: int, fan_out: int) -> torch.Tensor:
    """Return weights M × fan_in × fan_out, uniform in ± 1/√fan_in."""
    return (2 * torch.rand(members, fan_in, fan_out) - 1) / math.sqrt(fan_in)


def fit_members(
    model: Members,
    train: Samples,
    features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_ng: torch.Tensor,
    weights_n: torch.Tensor,
    recipe: MembersRecipe,
    seed: int,
    on_epoch: Callable[[int], None] | None = None,
    around: Surroundings | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Fit:
    """Train `model` on the spots of `train` in place.

    `features(rows, views)` returns … × f, float32, for spots in their views, both int64 of any one shape. Every epoch
    shows each member every spot once, in a view drawn at random; the loss is the squared error weighted by `weights_n`,
    over the genes whose target is not NaN; or `loss(out, rows)`, M × b × G, of what the network puts out for the spots
    `rows`, M × b. AdamW, the learning rate rising over `recipe.warmup` steps and falling to 0
    as a cosine. Where the loss is no number any more, training stops at the last good epoch (see `Watch`).
    """
    n, m, device = len(target_ng), recipe.members, target_ng.device
    known_ng = torch.isfinite(target_ng)
    share_ng = None
    if not known_ng.all():  # genes that a slide lacks weigh nothing, and the others of its spots as much more
        share_ng = known_ng / known_ng.sum(1, keepdim=True).clamp(min=1)
        target_ng = torch.where(known_ng, target_ng, 0.0)
    draw = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same batches
    optimiser = adamw(model, recipe.lr, recipe.weight_decay, device)
    steps = recipe.epochs * math.ceil(n / recipe.batch_size)
    contrast_weight = recipe.contrast.weight if recipe.contrast is not None else 0.0
    history, notice = [], None
    watch = Watch(model, train, "head.network.lr", recipe.lr)
    total = torch.zeros((), device=device)

    def step(rows: torch.Tensor, view: torch.Tensor) -> None:
        hidden = model.encode(features(rows, view), recipe.input_dropout, rows, around)
        out = model.decode(hidden, recipe.dropout)
        of_genes = (out - target_ng[rows]).square() if loss is None else loss(out, rows)
        errors = of_genes.mean(2) if share_ng is None else (of_genes * share_ng[rows]).sum(2)
        errors = errors * weights_n[rows]
        watch.batch(rows, errors)
        optimiser.zero_grad(set_to_none=True)
        loss_m = errors.mean(1)
        if model.contrast is not None:
            loss_m = loss_m + contrast_weight * model.contrast(hidden, target_ng[rows])
        loss_m.sum().backward()  # each member's gradient is its own, however many there are
        optimiser.step()
        total.add_(loss_m.detach().sum() * rows.shape[1])

    one, done = Repeated(step, device, train.resident), 0
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        began = time.perf_counter()
        order = torch.stack([torch.randperm(n, generator=draw) for _ in range(m)]).to(device)
        views = torch.randint(train.n_views, (m, n), generator=draw).to(device)
        total.zero_()
        for at in range(0, n, recipe.batch_size):
            set_rate(optimiser, recipe.lr * _rate(done, recipe.warmup, steps))
            one(order[:, at : at + recipe.batch_size], views[:, at : at + recipe.batch_size])
            done += 1
        mean_loss = float(total) / (n * m)
        notice = watch.epoch(epoch, mean_loss)
        if notice is not None:
            break
        history.append({"epoch": float(epoch), "loss_total": mean_loss, "train_seconds": time.perf_counter() - began})
        if on_epoch is not None:
            on_epoch(epoch)
    model.eval()
    return Fit(0, history, notice or "")


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
