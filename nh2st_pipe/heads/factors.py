"""Principal factors of targets: the few directions over the genes in which most of what is expressed varies.

Letters: n spots of a slide, G genes, r factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.alike import evenly

__all__ = ["LARGE", "axes", "centred", "loadings", "scores"]

LARGE = 2048
"""Genes and spots beyond which factors are found by iteration."""

_BESIDE, _ITERATIONS = 16, 12  # directions that are found beside those that are kept
_MOST_VALUES = 25_000_000  # of targets that factors are found from: 100 MB
_RIDGE = 1e-3  # of a factor, where a slide lacks genes


def loadings(train: Samples, mean: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """Return G × rank orthonormal directions in which the targets before smoothing of `train` vary most about each
    slide's mean; zeros where there are fewer. From a random part of the spots where those are very many values.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes = [part.stop - part.start for part in train.parts]
    most = max(2 * rank, _MOST_VALUES // train.n_genes)
    found = []
    for part, size, n in zip(train.parts, sizes, evenly(sizes, most), strict=True):
        rows = torch.randperm(size, generator=draw)[:n].sort().values if n < size else torch.arange(size)
        found.append(centred(train.raws(part.rows)[rows.to(train.device)].cpu().numpy()))
    kept = torch.from_numpy(axes(found, rank).copy()).to(mean)
    out = torch.zeros(train.n_genes, rank, dtype=mean.dtype, device=mean.device)
    out[:, : kept.shape[1]] = kept
    return out


def scores(raw: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return a slide's targets (n × G, NaN for genes that it lacks) less `mean` in the `directions`, n × r.

    Where genes are lacking, by least squares on the others.
    """
    apart, has = raw.to(mean.dtype) - mean, torch.isfinite(raw[0]) & torch.isfinite(mean)
    if bool(has.all()):
        return apart @ directions
    known = directions[has]
    gram = known.T @ known
    gram.diagonal().add_(_RIDGE)
    found: torch.Tensor = torch.linalg.solve(gram, known.T @ apart[:, has].T)
    return found.T


def centred(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a slide's values less their mean over spots; 0 for genes that it lacks."""
    known = np.where(np.isfinite(values), values, np.float32(0))
    return np.asarray(known - known.mean(axis=0, dtype=np.float64), np.float32)


def axes(slides: Sequence[NDArray[np.float32]], rank: int) -> NDArray[np.float64]:
    """Return the leading right singular vectors of slides' values, n × G each, one below the other: G × r.

    By the smaller of the two products; where both are large by subspace iteration (Halko et al. 2011), slide by slide.
    """
    genes, n = slides[0].shape[1], sum(len(values) for values in slides)
    if min(genes, n) > LARGE:
        spread, axes = _by_iteration(slides, rank + _BESIDE)
    elif genes <= n:
        spread, axes = np.linalg.eigh(_total(_product(values, values) for values in slides))
    else:
        values = np.concatenate(slides).astype(np.float64)
        spread, left = np.linalg.eigh(values @ values.T)
        with np.errstate(divide="ignore", invalid="ignore"):
            axes = values.T @ left / np.sqrt(np.maximum(spread, 0))
    there = int((spread > 1e-9 * max(float(spread[-1]), 1e-300)).sum())
    return np.asarray(axes[:, ::-1][:, : max(1, min(rank, there))])


def _by_iteration(slides: Sequence[NDArray[np.float32]], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the k largest eigenvalues of XᵀX, rising, and their vectors, G × k."""
    at = np.linalg.qr(np.random.default_rng(0).standard_normal((slides[0].shape[1], k)))[0]
    for _ in range(_ITERATIONS):
        at = np.linalg.qr(_total(_product(values, values @ at.astype(np.float32)) for values in slides))[0]
    along = [values @ at.astype(np.float32) for values in slides]
    spread, turned = np.linalg.eigh(_total(_product(values, values) for values in along))
    return spread, at @ turned


def _total(of: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the sum of arrays, one of which is there at a time."""
    each = iter(of)
    total = next(each)
    for other in each:
        total += other
    return total


def _product(one: NDArray[Any], two: NDArray[Any]) -> NDArray[np.float64]:
    """Return oneᵀ two, n × a and n × b, in double precision where that is small."""
    if one.shape[1] > LARGE:
        return np.asarray(one.T @ two, np.float64)
    return np.asarray(one.T.astype(np.float64) @ two.astype(np.float64))
