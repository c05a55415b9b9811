"""Predictions that are made by blocks of genes, so that those of all genes need not be in memory at once.

Letters: N spots, G genes, r factors, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.heads.carry import Carried

__all__ = ["Blocked", "Distribution", "LowRank", "Prediction", "blocks_of", "joined"]

Values = NDArray[np.float32]

_AT_ONCE = 1 << 22  # values of a block, about: 16 MB


@dataclass(frozen=True)
class Distribution:
    """How counts of N spots are distributed, as a head that says more than a mean has it, before any smoothing."""

    kind: str
    """Its name, for example "negative binomial"."""
    parameters: dict[str, NDArray[np.float32]]
    """By name: of each spot and gene, N × G, or of each gene, G."""


@dataclass(frozen=True)
class Prediction:
    """What a head says about N spots."""

    values: Values
    """N × G."""
    likeness: NDArray[np.float32] | None = None
    """N: how like each spot is to the training spots, 0 to 1; None where the head cannot tell."""
    spread: Values | None = None
    """N × G: standard deviation over the head's members; None where it has a single one."""
    carried: Carried | None = None
    """What of it carries over, the mean over slides; None where nothing is weighed."""
    distribution: Distribution | None = None
    """None where the head predicts a value alone. Neither smoothed nor weighed."""


@dataclass(frozen=True)
class LowRank:
    """Values that are a few scores of each spot times directions over the genes: scores @ directionsᵀ + offset."""

    scores: torch.Tensor
    """N × r."""
    directions: torch.Tensor
    """G × r."""
    offset: torch.Tensor
    """G."""
    apart: torch.Tensor | None = None
    """M × N × r: how far each member's scores are from their mean; None for one."""

    def values(self, genes: slice) -> Values:
        """Return N × g."""
        found = torch.addmm(self.offset[genes], self.scores, self.directions[genes].T)
        return np.asarray(found.cpu().numpy(), np.float32)

    def spread(self, genes: slice) -> Values:
        """Return N × g: the standard deviation over members."""
        assert self.apart is not None
        total = torch.zeros(len(self.scores), len(self.offset[genes]), device=self.scores.device)
        for of_member in self.apart:
            total += (of_member @ self.directions[genes].T).square_()
        return np.asarray(total.div_(len(self.apart)).sqrt_().cpu().numpy(), np.float32)

    def onto(self, basis: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return N × b: the values about their means times a basis G × b."""
        turned = self.directions.double().T @ torch.from_numpy(basis).to(self.scores.device)
        about = self.scores.double() - self.scores.double().mean(0)
        return np.asarray((about @ turned).cpu().numpy())

    def smoothed(self, smooth: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> LowRank:
        """Return the same with its scores smoothed, and with them its values; the spread is of before."""
        scores = torch.from_numpy(smooth(self.scores.cpu().numpy())).to(self.scores)
        return LowRank(scores, self.directions, self.offset, self.apart)


@dataclass(frozen=True)
class Blocked:
    """What a head says about N spots, as Prediction, made by blocks of genes when they are asked for."""

    shape: tuple[int, int]
    """N × G."""
    values: Callable[[slice], Values]
    likeness: NDArray[np.float32] | None = None
    spread: Callable[[slice], Values] | None = None
    carried: Carried | None = None
    distribution: Distribution | None = None
    low_rank: LowRank | None = None
    """What values are made from, where they are of low rank."""

    @classmethod
    def of(cls, dense: Prediction) -> Blocked:
        """Return one whose values are there."""
        values, spread = dense.values, dense.spread
        return cls(
            (values.shape[0], values.shape[1]),
            lambda genes: values[:, genes],
            dense.likeness,
            None if spread is None else lambda genes: spread[:, genes],
            dense.carried,
            dense.distribution,
        )

    @classmethod
    def of_low_rank(cls, made: LowRank, likeness: NDArray[np.float32] | None = None) -> Blocked:
        """Return one whose values are made from scores."""
        shape = len(made.scores), len(made.offset)
        spread = None if made.apart is None else made.spread
        return cls(shape, made.values, likeness, spread, low_rank=made)

    def dense(self) -> Prediction:
        """Return all values."""
        spread = None if self.spread is None else self._whole(self.spread)
        return Prediction(self._whole(self.values), self.likeness, spread, self.carried, self.distribution)

    def _whole(self, of: Callable[[slice], Values]) -> Values:
        blocks = list(blocks_of(self.shape))
        if len(blocks) == 1:
            return of(slice(0, self.shape[1]))
        out = np.empty(self.shape, np.float32)
        for genes in blocks:
            out[:, genes] = of(genes)
        return out


def blocks_of(shape: tuple[int, int], at_once: int = _AT_ONCE) -> Iterator[slice]:
    """Yield slices of the genes of N × G, few enough that a block of values is small; one for none."""
    step = max(1, at_once // max(1, shape[0]))
    for start in range(0, max(1, shape[1]), step):
        yield slice(start, min(start + step, shape[1]))


def joined(of: Sequence[tuple[NDArray[np.int64], Blocked]], n: int) -> Blocked:
    """Return the prediction of n spots from those of some of them, each with its rows."""
    if len(of) == 1:  # all of them, in their order
        return of[0][1]

    def put(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> NDArray[np.float32]:
        out = np.empty((n, *parts[0][1].shape[1:]), np.float32)
        for rows, values in parts:
            out[rows] = values
        return out

    first = of[0][1]
    spreads = [(rows, each.spread) for rows, each in of if each.spread is not None]
    like = [(rows, each.likeness) for rows, each in of if each.likeness is not None]
    carried = [(float(len(rows)), each.carried) for rows, each in of if each.carried is not None]
    said = [(rows, each.distribution) for rows, each in of if each.distribution is not None]
    distribution = None
    if said:
        last = said[-1][1]
        parameters = {
            name: put([(rows, each.parameters[name]) for rows, each in said]) if values.ndim > 1 else values
            for name, values in last.parameters.items()
        }
        distribution = Distribution(last.kind, parameters)
    return Blocked(
        (n, first.shape[1]),
        lambda genes: put([(rows, each.values(genes)) for rows, each in of]),
        put(like) if like else None,
        (lambda genes: put([(rows, spread(genes)) for rows, spread in spreads])) if spreads else None,
        Carried.mean(carried) if carried else None,
        distribution,
    )
