"""Tiles on their way to the device, embeddings on their way back.

On a GPU each way has a stream of its own and page-locked memory, so that a batch goes up and another comes down while
a third is encoded. Elsewhere there is nothing to go to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Arriving", "Transfer", "transfer_of"]


class Arriving(Protocol):
    """A tensor on its way to the host."""

    def numpy(self) -> NDArray[Any]:
        """Wait for it."""


class Transfer(Protocol):
    """The two ways between the host and one device."""

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return host memory for tiles."""

    def pinned(self, values: NDArray[np.uint8]) -> AbstractContextManager[None]:
        """Make host memory that others have made like that of `blank`, while entered."""

    def up(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        """Return `tiles` on the device; what is computed there next waits for them."""

    def down(self, values: torch.Tensor) -> Arriving:
        """Begin to bring `values` back."""


def transfer_of(device: torch.device) -> Transfer:
    """Return how things get to and from `device`."""
    return _Streams(device) if device.type == "cuda" else _Plain(device)


class _Here:
    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def numpy(self) -> NDArray[Any]:
        values: NDArray[Any] = self._values.cpu().numpy()
        return values


class _Plain:
    """A CPU, or a device without streams: copies are made where they stand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.empty(shape, np.uint8)

    def pinned(self, values: NDArray[np.uint8]) -> AbstractContextManager[None]:
        return nullcontext()

    def up(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(tiles).to(self._device)

    def down(self, values: torch.Tensor) -> Arriving:
        return _Here(values)


class _Down:
    """A copy that is under way until its event has come; holds what it is copied from, and what that came from."""

    def __init__(self, host: torch.Tensor, event: torch.cuda.Event, kept: tuple[torch.Tensor, ...]) -> None:
        self._host, self._event, self._kept = host, event, kept

    def numpy(self) -> NDArray[Any]:
        self._event.synchronize()
        self._kept = ()
        values: NDArray[Any] = self._host.numpy()
        return values


class _Streams:
    """A CUDA device: one stream up, one down, both beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ups, self._downs = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._sources: tuple[torch.Tensor, ...] = ()

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        values: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return values

    @contextmanager
    def pinned(self, values: NDArray[np.uint8]) -> Iterator[None]:
        runtime = torch.cuda.cudart()
        address, size = values.ctypes.data, values.nbytes
        locked = int(runtime.cudaHostRegister(address, size, 0)) == 0  # else copies go by way of memory that is
        try:
            yield
        finally:
            if locked:
                torch.cuda.synchronize(self._device)  # what is copied from it ends first
                runtime.cudaHostUnregister(address)

    def up(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        source = torch.from_numpy(tiles)
        if not source.is_pinned():
            source = source.pin_memory()
        with torch.cuda.stream(self._ups):
            there = source.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._ups)
        there.record_stream(computing)
        self._sources = (source,)  # for as long as what is made of it is not back
        return there

    def down(self, values: torch.Tensor) -> Arriving:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._downs.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._downs):
            host.copy_(values, non_blocking=True)
            event = self._downs.record_event()
        values.record_stream(self._downs)
        return _Down(host, event, (values, *self._sources))
