"""What is done when a loss is no number: training stops, the last good state is kept, and the slides are named."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from nh2st_pipe.core.errors import TrainError, listed
from nh2st_pipe.data.samples import Samples

__all__ = ["Watch"]


class Watch:
    """Follows the training of `model` on `train`. `lr_key` is the setting that a person would make smaller."""

    def __init__(self, model: nn.Module, train: Samples, lr_key: str, lr: float) -> None:
        self._model, self._train, self._advice = (
            model,
            train,
            f"a smaller learning rate may help (--set {lr_key}={lr / 10:g})",
        )
        self._bad = torch.zeros(len(train), device=train.device)
        self._good: dict[str, torch.Tensor] | None = None
        self._whole = torch.ones((), dtype=torch.bool, device=train.device)

    def batch(self, rows: torch.Tensor, loss: torch.Tensor) -> None:
        """Look at the `loss` of the spots `rows`: one for each, or one for all. Nothing is waited for."""
        finite = torch.isfinite(loss.detach())
        first = (~finite & self._whole).float().expand_as(rows)  # after it, all others are bad because of it
        self._bad.scatter_reduce_(0, rows.flatten(), first.flatten(), "amax")
        self._whole &= finite.all()

    def epoch(self, number: int, loss: float) -> str | None:
        """Return why training ends here, None where it goes on; the model is then as it was at the last good epoch.

        Raises TrainError where there has been none.
        """
        if math.isfinite(loss):
            self._good = copy.deepcopy(self._model.state_dict())
            return None
        slides = [part.name for part in self._train.parts if bool((self._bad[part.rows] > 0).any())]
        where = f", first on spots of {listed(slides)}" if slides else ""
        said = f"the loss is not a number from epoch {number} on{where}; {self._advice}"
        if self._good is None:
            raise TrainError(said)
        self._model.load_state_dict(self._good)
        return f"{said}. The head is that of epoch {number - 1}"
