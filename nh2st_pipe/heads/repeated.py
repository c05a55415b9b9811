"""Steps of training that are the same but for their batch.

On a GPU a step of a small head is a hundred kernels of a few µs each, and launching them from Python takes ten times as
long as running them. After a few steps the next is recorded as a CUDA graph, and replayed with each batch in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["Repeated", "adamw", "set_rate"]

_PLAIN_FIRST = 3  # steps in which what is made once (the optimiser's moments, workspaces) comes into being


class Repeated:
    """Does `step(*batch)` for one batch of tensors after another.

    With `resident`, all that a step reads lies on `device`, and where that is a GPU it is recorded. A step has to be
    the same work for every batch of a shape then: what it keeps it keeps in place, it makes no tensor whose shape
    depends on values, and asks the device for none. A batch of another shape than the first is done plainly.
    """

    def __init__(self, step: Callable[..., None], device: torch.device, resident: bool = True) -> None:
        self._step = step
        self._graph = _Graph(device) if device.type == "cuda" and resident else None
        self._shapes: list[torch.Size] | None = None
        self._held: list[torch.Tensor] | None = None
        self._plain = 0

    def __call__(self, *batch: torch.Tensor) -> None:
        """Do the step for `batch`."""
        shapes = [each.shape for each in batch]
        self._shapes = self._shapes or shapes
        if self._graph is None or shapes != self._shapes:
            self._step(*batch)
        elif self._plain < _PLAIN_FIRST:
            self._plain += 1
            with self._graph.beside():
                self._step(*batch)
        else:
            if self._held is None:
                held = self._held = [each.clone() for each in batch]
                self._graph.record(lambda: self._step(*held))
            for place, each in zip(self._held, batch, strict=True):
                place.copy_(each)
            self._graph.replay()


class _Graph:
    """A CUDA graph, and the stream on which its steps are done before it is recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Do what is done within on a stream of its own, after what came before and before what comes next."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            yield
        now.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> None:
        """Record `work` without doing it."""
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()

    def replay(self) -> None:
        """Do what was recorded."""
        self._graph.replay()


def adamw(model: nn.Module, rate: float, weight_decay: float, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW for a model on `device`. Its steps can be recorded there; see `set_rate` for its learning rate."""
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(rate, device=device) if on_gpu else rate,
        weight_decay=weight_decay,
        fused=device.type in ("cpu", "cuda"),
        capturable=on_gpu,
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where a recorded step reads it."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
