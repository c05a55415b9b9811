"""Spots as tensors on a device: what a head sees.

Letters: N spots (of all slides at hand), V dihedral views, d values per embedding, K spots in a neighbourhood,
G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nh2st_pipe.store.read import SlideData

__all__ = ["Samples"]

_CHUNK_SPOTS = 4096


@dataclass(frozen=True)
class Samples:
    """Spots of one or more slides, on one device."""

    views: torch.Tensor
    """N × V × d, float16."""
    neighbours: torch.Tensor
    """N × K, int64: rows of `views`, the spot itself first; the spot stands in where it has fewer neighbours."""
    target: torch.Tensor | None
    """N × G, float32."""

    def __len__(self) -> int:
        return len(self.views)

    @classmethod
    def of(
        cls,
        slides: Sequence[SlideData],
        targets: Sequence[NDArray[np.float32]] | None = None,
        *,
        neighbours: int,
        device: torch.device | None = None,
    ) -> Samples:
        """Put slides behind each other; rows of neighbours count on from slide to slide."""
        tables, offset = [], 0
        for slide in slides:
            rows = slide.neighbours[:, :neighbours].astype(np.int64)
            rows = np.where(rows < 0, np.arange(len(slide))[:, None], rows)
            tables.append(rows + offset)
            offset += len(slide)
        views = np.concatenate([slide.views for slide in slides])
        target = None if targets is None else torch.from_numpy(np.concatenate(targets)).to(device)
        return cls(
            views=torch.from_numpy(np.ascontiguousarray(views)).to(device),
            neighbours=torch.from_numpy(np.concatenate(tables)).to(device),
            target=target,
        )

    def chunks(self) -> list[slice]:
        """Return slices of at most a few thousand spots, for work that need not hold all of them in float32."""
        return [slice(i, i + _CHUNK_SPOTS) for i in range(0, len(self), _CHUNK_SPOTS)]
