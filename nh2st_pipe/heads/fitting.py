"""Training by steps: Adam, a stepwise learning rate, the best epoch on watched samples.

Everything is on the device before the first step; a batch is a list of row numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import mean_pcc
from nh2st_pipe.heads.base import Fit, HeadModel, Plan
from nh2st_pipe.heads.repeated import Repeated, adamw, set_rate
from nh2st_pipe.heads.watch import Watch

__all__ = ["fit_by_steps"]


def fit_by_steps(
    model: HeadModel,
    losses: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    train: Samples,
    plan: Plan,
    *,
    repeated: bool = False,
) -> Fit:
    """Train `model` in place, each epoch showing every spot of `train` once in a view drawn at random.

    `losses(rows, views)` returns `total` and its parts for the spots `rows`, each in its view. Exactly `plan.epochs`
    epochs are run; or, with `plan.watched`, the model is left as it was at its best epoch there (by
    `plan.steps.select_by`) and training stops `plan.steps.patience` epochs after it. Where the loss is no number any
    more, training stops at the last good epoch (see `Watch`). `repeated` says that `losses` is the same work for
    every batch of a size, as `Repeated` asks it to be: on a GPU that is many times faster.
    """
    recipe, watched, on_epoch = plan.steps, plan.watched, plan.on_epoch
    assert recipe is not None
    epochs = plan.epochs or recipe.epochs
    device = train.device
    draw = torch.Generator().manual_seed(plan.seed)  # on the CPU, so that every device sees the same batches
    rate = recipe.lr
    optimiser = adamw(model, rate, recipe.weight_decay, device)
    n, n_views = len(train), train.n_views
    best, best_epoch, best_state = -float("inf"), epochs, None
    history, notice = [], None
    watch = Watch(model, train, "fit.lr", recipe.lr)
    sums: dict[str, torch.Tensor] = {}

    def step(rows: torch.Tensor, view: torch.Tensor) -> None:
        parts = losses(rows, view)
        optimiser.zero_grad(set_to_none=True)
        parts["total"].backward()
        watch.batch(rows, parts["total"])
        optimiser.step()
        for name, value in parts.items():
            sums.setdefault(name, torch.zeros((), device=device)).add_(value.detach() * len(rows))

    one = Repeated(step, device, repeated and train.resident)
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()
        model.train()
        order = torch.randperm(n, generator=draw).to(device)
        views = torch.randint(n_views, (n,), generator=draw).to(device)
        for value in sums.values():
            value.zero_()
        for rows in order.split(recipe.batch_size):
            one(rows, views[rows])
        if epoch % recipe.lr_step == 0:
            rate *= recipe.lr_gamma
            set_rate(optimiser, rate)
        record = {"epoch": float(epoch), **{f"loss_{name}": float(value) / n for name, value in sums.items()}}
        notice = watch.epoch(epoch, record["loss_total"])
        if notice is not None:
            best_epoch = min(best_epoch, epoch - 1)
            break
        record["train_seconds"] = time.perf_counter() - began
        if watched is not None:
            said, truth = model.predict(watched), watched.targets(slice(None)).cpu().numpy()
            pcc = mean_pcc(said, truth, [part.rows for part in watched.parts])
            mse = float(np.nanmean(np.square(said - truth, dtype=np.float64)))
            record["watched_pcc"], record["watched_mse"] = -1.0 if pcc is None else pcc, mse
            score = record["watched_pcc"] if recipe.select_by == "pcc" else -mse
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
    return Fit(best_epoch, history, notice or "")
