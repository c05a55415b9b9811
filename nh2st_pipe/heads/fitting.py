"""Training by steps: Adam, a stepwise learning rate, the best epoch on watched samples.

Everything is on the device before the first step; a batch is a list of row numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import summarise
from nh2st_pipe.heads.nh2st import NH2ST

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import FitRecipe

__all__ = ["Fit", "fit_by_steps"]


@dataclass(frozen=True)
class Fit:
    """The epoch the model was left at, and one record per epoch."""

    best_epoch: int
    history: list[dict[str, float]]


def fit_by_steps(
    model: NH2ST,
    recipe: FitRecipe,
    train: Samples,
    watched: Samples | None,
    epochs: int,
    seed: int,
    on_epoch: Callable[[int], None] | None = None,
) -> Fit:
    """Train `model` in place for at most `epochs` epochs, each showing every spot once in a view drawn at random.

    With `watched` the model is left as it was at its best epoch there (by `recipe.select_by`), and training
    stops `recipe.patience` epochs after it. Raises TrainError where the loss is no longer a number.
    """
    device = train.views.device
    draw = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same batches
    model.prepare(train)
    operators = model.operators(train)
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, recipe.lr_step, recipe.lr_gamma)
    n, n_views = train.views.shape[:2]
    best, best_epoch, best_state = -float("inf"), epochs, None
    history = []
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()
        model.train()
        order = torch.randperm(n, generator=draw).to(device)
        views = torch.randint(n_views, (n,), generator=draw).to(device)
        sums: dict[str, torch.Tensor] = {}
        for rows in order.split(recipe.batch_size):
            losses = model.losses(train, operators, rows, views[rows])
            optimiser.zero_grad(set_to_none=True)
            losses["total"].backward()
            optimiser.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() * len(rows)
        schedule.step()
        record = {"epoch": float(epoch), **{f"loss_{name}": float(value) / n for name, value in sums.items()}}
        if not all(value == value for value in record.values()):
            raise TrainError(
                f"the loss is not a number from epoch {epoch} on; a smaller learning rate may help "
                f"(--set fit.lr={recipe.lr / 10:g})"
            )
        record["train_seconds"] = time.perf_counter() - began
        if watched is not None:
            assert watched.target is not None
            figures = summarise(model.predict(watched), watched.target.cpu().numpy())
            pcc = figures["pcc"] if figures["pcc"] is not None else -1.0
            record["watched_pcc"], record["watched_mse"] = pcc, figures["mse"]
            score = pcc if recipe.select_by == "pcc" else -figures["mse"]
            if score > best:
                best, best_epoch, best_state = score, epoch, copy.deepcopy(model.state_dict())
        history.append(record)
        if on_epoch is not None:
            on_epoch(epoch)
        if watched is not None and epoch - best_epoch >= recipe.patience:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return Fit(best_epoch, history)
