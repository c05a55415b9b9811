"""Kernel ridge regression on blocks of features, low-count spots weighing less, of reduced rank over the genes.

The kernel is the mean over blocks of exp(−D² / median D²), D² the squared distances in that block and the median over
all pairs of training spots, each with itself too. With spot weights w, K the kernel among training spots and Y the
centred targets, A = (K + a · diag(1/w))⁻¹ Y; the fitted values' leading directions over the genes, V (right singular
vectors of diag(√w) K A), are all that is predicted: k* A V Vᵀ.

With many spots, m landmarks stand in for them (Nyström): A = (Kᵀ W K + a · K_zz)⁻¹ Kᵀ W Y, K being spots × landmarks;
with every spot a landmark the two are the same. Letters: N spots, m landmarks, B blocks, d values, G genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

_AT_ONCE = 4096  # spots whose kernel values are in memory at a time

__all__ = ["Kernel", "low_count_weights", "solve", "solve_landmarks"]


@dataclass(frozen=True)
class Kernel:
    """A fitted kernel part."""

    blocks: torch.Tensor
    """B × m × d: the spots that others are compared with."""
    medians: torch.Tensor
    """B."""
    coefficients: torch.Tensor
    """m × G: A V Vᵀ."""

    def similarity(self, blocks: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Return n × m kernel values of spots, given as B blocks of n × d."""
        return _mean_kernel(blocks, self.blocks.to(blocks[0].dtype), self.medians.to(blocks[0].dtype)).double()

    def similarities(self, blocks: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the same for some spots after others, so that little of it is in memory."""
        for rows in _in_turn(len(blocks[0])):
            yield rows, self.similarity([block[rows] for block in blocks])


def low_count_weights(depth: torch.Tensor, strength: float) -> torch.Tensor:
    """Return 1 / (1 + strength · median(N) / N) for the counts N of each spot; a spot without counts has one."""
    counts = depth.clamp(min=1.0)
    return 1 / (1 + strength * _median(counts) / counts)


def solve(blocks: torch.Tensor, y_ng: torch.Tensor, weights: torch.Tensor, ridge: float, rank: int) -> Kernel:
    """Fit on all spots: `blocks` B × N × d, centred targets N × G, weights N.

    A gene whose target is NaN in some spots is solved for on the others.
    """
    medians = torch.stack([_median(_squared(block, block).flatten()) for block in blocks])
    medians = torch.where(medians > 0, medians, torch.ones_like(medians))  # spots that are all alike
    k = _mean_kernel(blocks, blocks, medians)
    system = k + ridge * torch.diag(1 / weights)
    a = torch.zeros_like(y_ng)
    for rows, genes in _groups(torch.isfinite(y_ng)):
        if len(rows) == len(y_ng):
            a[:, genes] = torch.linalg.solve(system, y_ng[:, genes])
        else:
            place = rows[:, None], genes
            a[place] = torch.linalg.solve(system[rows[:, None], rows], y_ng[place])
    v = _leading((k @ a) * weights.sqrt()[:, None], rank)
    return Kernel(blocks, medians, (a @ v) @ v.T)


def solve_landmarks(
    landmarks: torch.Tensor,
    spots: Iterable[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]],
    ridge: float,
    rank: int,
) -> Kernel:
    """Fit with `landmarks` B × m × d; `spots` yields (blocks, centred targets, weights) of one slide after another.

    A gene that a slide lacks (its targets are NaN) is solved for on the other slides.
    """
    medians = torch.stack([_median(_squared(block, block).flatten()) for block in landmarks])
    medians = torch.where(medians > 0, medians, torch.ones_like(medians))
    k_zz = _mean_kernel(landmarks, landmarks, medians).double()
    grams: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}  # by the genes that slides have
    cross: torch.Tensor | None = None
    for blocks, y, weights in spots:
        has = torch.isfinite(y).all(0)
        key = has.cpu().numpy().tobytes()
        for rows in _in_turn(len(y)):
            k = _mean_kernel([block[rows] for block in blocks], landmarks, medians).double()
            weighted = k * weights[rows, None]
            gram = k.T @ weighted
            grams[key] = has, grams[key][1].add_(gram) if key in grams else gram
            part = weighted.T @ torch.where(has, y[rows], 0.0)
            cross = part if cross is None else cross.add_(part)
    assert cross is not None
    by_slides = torch.stack([has for has, _ in grams.values()])
    every = torch.stack([gram for _, gram in grams.values()])
    gram = every.sum(0)
    jitter = 1e-10 * k_zz.diagonal().mean() * torch.eye(len(k_zz), dtype=k_zz.dtype, device=k_zz.device)
    a = torch.zeros_like(cross)
    for which, genes in _groups(by_slides):
        a[:, genes] = torch.linalg.solve(every[which].sum(0) + ridge * (k_zz + jitter), cross[:, genes])
    # (√w K A)ᵀ (√w K A) = Aᵀ (Kᵀ W K) A: the directions need no pass over the spots.
    values, vectors = torch.linalg.eigh(gram)
    half = (values.clamp(min=0).sqrt()[:, None] * vectors.T) @ a
    v = _leading(half, rank)
    return Kernel(landmarks, medians, (a @ v) @ v.T)


def _in_turn(n: int) -> list[slice]:
    return [slice(start, min(start + _AT_ONCE, n)) for start in range(0, n, _AT_ONCE)]


def _groups(has: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a boolean matrix's columns in groups that are true in the same rows: (rows, columns)."""
    patterns, of_column = torch.unique(has.T, dim=0, return_inverse=True)
    groups = [(torch.nonzero(p)[:, 0], torch.nonzero(of_column == i)[:, 0]) for i, p in enumerate(patterns)]
    return [(rows, columns) for rows, columns in groups if len(rows)]


def _leading(values_ng: torch.Tensor, rank: int) -> torch.Tensor:
    """Return G × r: the first right singular vectors."""
    directions: torch.Tensor = torch.linalg.svd(values_ng, full_matrices=False)[2]
    return directions[:rank].T


def _mean_kernel(left: Iterable[torch.Tensor], right: torch.Tensor, medians: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor | None = None
    for x, z, median in zip(left, right, medians, strict=True):
        k = _squared(x, z).div_(-median).exp_()
        total = k if total is None else total.add_(k)
    assert total is not None
    return total / len(medians)


def _squared(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return squared distances n × m by |x|² + |z|² − 2 x·z; a spot's own is exactly zero."""
    middle = z.mean(0)  # taken off first, so that little is lost where two large numbers cancel
    x, z = x - middle, z - middle
    out = torch.addmm(x.square().sum(1)[:, None] + z.square().sum(1), x, z.T, alpha=-2).clamp_(min=0)
    if x.shape == z.shape and torch.equal(x, z):
        out.fill_diagonal_(0)
    return out


def _median(values: torch.Tensor) -> torch.Tensor:
    """Return the median as NumPy has it: the mean of the middle two where the number is even."""
    half = len(values) // 2
    upper = values.kthvalue(half + 1).values
    return upper if len(values) % 2 else (upper + values.kthvalue(half).values) / 2
