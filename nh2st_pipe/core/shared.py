"""An array in memory that processes share: what one writes, the others see."""

from __future__ import annotations

import mmap
import os
from math import prod
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.memory import require

__all__ = ["SharedArray"]


class SharedArray:
    """A uint8 array of `shape`, in a file of memory. A process that is started with it as an argument gets the same.

    Raises OSError where this system has no such memory, or too little is left, SlideError where it is more than the
    machine has.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory that processes share")
        require(prod(shape), f"memory for {shape[0]} batches of {shape[1]} tiles")
        file = os.memfd_create("nh2st-tiles")
        try:
            os.posix_fallocate(file, 0, prod(shape))
            self._look_into(file, shape)
        except BaseException:
            os.close(file)
            raise

    @classmethod
    def received(cls, file: int, shape: tuple[int, ...]) -> SharedArray:
        """Return the array of `shape` in a file of memory that another process has handed to this one."""
        received = cls.__new__(cls)
        received._look_into(file, shape)
        return received

    def _look_into(self, file: int, shape: tuple[int, ...]) -> None:
        self.file, self.shape = file, shape
        self.array: NDArray[np.uint8] = np.frombuffer(mmap.mmap(file, prod(shape)), np.uint8).reshape(shape)

    def close(self) -> None:
        """Give the file back; the memory goes when nobody looks at its array any more."""
        os.close(self.file)

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.file), self.shape)


def _received(duplicate: Any, shape: tuple[int, ...]) -> SharedArray:
    return SharedArray.received(duplicate.detach(), shape)
