"""Targets of samples that do not lie in memory: made slide by slide when they are asked for.

What is made is what would lie in memory, to the bit. Letters: n spots of a part, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nh2st_pipe.data.targets import StreamedTargets

__all__ = ["Cut", "Truth"]


@dataclass(frozen=True, eq=False)
class Cut:
    """Some of a slide's spots, as a subset of samples took them."""

    rows: NDArray[np.int64]
    """Which of those that were there."""
    mean: Any = None
    """Smooths over what was kept, where the target is to be smoothed anew; None takes it as it was."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The targets of samples, part by part."""

    of: StreamedTargets
    names: tuple[str, ...]
    """The parts', in their order."""
    cuts: tuple[tuple[Cut, ...], ...]
    """What was taken of each part, one after another."""
    columns: NDArray[np.int64] | None = None
    """Which genes of the panel; None for all."""

    @classmethod
    def whole(cls, of: StreamedTargets, names: Sequence[str]) -> Truth:
        """Return the targets of whole slides."""
        return cls(of, tuple(names), ((),) * len(names))

    @property
    def n_genes(self) -> int:
        """G."""
        return len(self.of.panel) if self.columns is None else len(self.columns)

    def has(self, part: int) -> NDArray[np.bool_]:
        """Return which genes the slide of a part has, G."""
        there = self.of.has(self.names[part])
        return there if self.columns is None else there[self.columns]

    def made(self, part: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what is judged, and the same before smoothing, of one part: n × G each."""
        found = self.of[self.names[part]]
        values, raw = found.values, found.raw
        for cut in self.cuts[part]:
            same, before = raw is values, values
            raw = raw[cut.rows]
            if same:
                values = raw
            elif cut.mean is None:
                values = before[cut.rows]
            else:
                values = (cut.mean @ raw.astype(np.float64)).astype(np.float32)
        if self.columns is None:
            return values, raw
        taken = values[:, self.columns]
        return taken, taken if raw is values else raw[:, self.columns]

    def only(self, parts: Sequence[int], cuts: Sequence[Cut | None]) -> Truth:
        """Return the targets of some parts, each cut as it says; None takes all of its spots."""
        taken = [self.cuts[i] if cut is None else (*self.cuts[i], cut) for i, cut in zip(parts, cuts, strict=True)]
        return replace(self, names=tuple(self.names[i] for i in parts), cuts=tuple(taken))

    def of_genes(self, genes: NDArray[np.int64]) -> Truth:
        """Return the targets of some of these genes."""
        return replace(self, columns=genes if self.columns is None else self.columns[genes])
