"""Tiles under other stains, in silico, and how far an encoder's embeddings move with them.

A tile's optical density OD = −ln((I + 1) / 256) is split into haematoxylin, eosin and the rest (Ruifrok & Johnston
2001); each concentration c becomes α · c + β. What the embeddings of a slide move by on average is a direction in which
slides differ without their tissue differing: heads may leave it out (`heads.blocks.stain_basis`).

Letters: b tiles, V views, d values, S stains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nh2st_pipe.encoders.encoder import TileEncoder

__all__ = ["STAINS", "VERSION", "restain", "stain_shift", "stained", "tiles_for_shift"]

STAINS = 8
VERSION = "hed-1"
"""Which stains these are, for stores to say: other vectors, ranges or draws are another version."""

_TILES = 48
_VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # haematoxylin, eosin, residual
_GAIN, _OFFSET = (0.75, 1.25), 0.03


def tiles_for_shift(n: int) -> NDArray[np.int64]:
    """Return which of a slide's n tiles are stained anew: 48 spread evenly over it, or all where there are fewer."""
    return np.unique(np.linspace(0, n - 1, min(n, _TILES)).round().astype(np.int64))


def _draws() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return α and β of every stain and channel, S × 3: the same ones for every slide."""
    draw = np.random.default_rng(0)
    return draw.uniform(*_GAIN, (STAINS, 3)), draw.uniform(-_OFFSET, _OFFSET, (STAINS, 3))


def restain(tiles_bhwc: NDArray[np.uint8], stain: int) -> NDArray[np.uint8]:
    """Return RGB tiles as they would look under synthetic stain 0 … S − 1."""
    gain, offset = _draws()
    return stained(tiles_bhwc, gain[stain], offset[stain])


def stained(pixels: NDArray[np.uint8], gain: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return RGB pixels, … × 3, with each concentration multiplied by its `gain` and moved by its `offset`, of 3."""
    vectors = torch.from_numpy(_VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True)).float()
    density = -torch.log((torch.from_numpy(pixels).float() + 1) / 256)
    alpha, beta = torch.from_numpy(gain).float(), torch.from_numpy(offset).float()
    changed = ((density @ torch.linalg.inv(vectors)) * alpha + beta) @ vectors
    out = (256 * torch.exp(-changed) - 1).round_().clamp_(0, 255)
    return out.to(torch.uint8).numpy()


def stain_shift(
    encoder: TileEncoder, tiles_bhwc: NDArray[np.uint8], embeddings_bvd: NDArray[np.float16]
) -> NDArray[np.float32]:
    """Return S × d: the mean over tiles of each stain's embedding less the tile's own.

    Stain v is seen in view v % V. `embeddings_bvd` are those of the tiles as they are.
    """
    views = embeddings_bvd.shape[1]
    shifts = np.empty((STAINS, embeddings_bvd.shape[2]), np.float32)
    for stain in range(STAINS):
        view = stain % views
        stained = encoder.encode(restain(tiles_bhwc, stain), view=view)[:, 0]
        shifts[stain] = (stained.astype(np.float64) - embeddings_bvd[:, view]).mean(0)
    return shifts
