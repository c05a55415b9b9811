"""How many tiles a device takes at once: found by trying a few, before the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from nh2st_pipe.encoders.encoder import Encoder

__all__ = ["batch_that_fits", "fitting"]

_ON_CPU = 8  # more leave the processor's caches
_ON_OTHERS = 64
_LEAST, _MOST = 8, 256  # tiles; more fill no GPU better, and wait longer for their readers
_SHARE = 0.7  # of the memory that is free, for two batches at work at once
_FEW, _MORE = 4, 12


def batch_that_fits(encoder: Encoder, views: int) -> int:
    """Return how many tiles of `views` views to encode at once; found once for an encoder, and remembered by it."""
    if encoder.device.type != "cuda":
        return _ON_CPU if encoder.device.type == "cpu" else _ON_OTHERS
    px = encoder.recipe.input_px

    def peak(tiles: int) -> int:
        torch.cuda.reset_peak_memory_stats(encoder.device)
        encoder.encode(np.zeros((tiles, px, px, 3), np.uint8), views)
        return torch.cuda.max_memory_allocated(encoder.device)

    if encoder.batch is None:
        encoder.batch = fitting(peak, torch.cuda.mem_get_info(encoder.device)[0], encoder.images_at_once // views)
    return encoder.batch


def fitting(peak: Callable[[int], int], free: int, most: int) -> int:
    """Return the number of tiles, a power of two, whose batch takes a share of `free` bytes; `most` go through at once.

    `peak` tells what the device held at most while so many tiles were encoded.
    """
    peak(_FEW)  # what is made once, at the first batch, is no tile's
    few, more = peak(_FEW), peak(_MORE)
    each = max((more - few) / (_MORE - _FEW), 1.0)
    tiles = min(int(_SHARE * free / 2 / each), _MOST, max(most, _LEAST))
    return int(2 ** np.floor(np.log2(max(tiles, _LEAST))))
