"""nh2st-query: nh2st-context with a vector for each gene in place of an output for it, so that genes it never saw can
be asked for.

What is learnt from the image are scores of factors, principal directions over the genes it is trained on (`factors`).
What a gene has of each factor, its loadings, is mapped from the gene's vector: a prediction is scores · loadings +
mean. For genes that it is trained on these are their own; for others they are

- `taught`: from what training slides measured of the gene, by least squares on their scores (which says how far the
  head alone goes), or
- `asked`: from a file of vectors (GenePT, scGPT, Gene2vec …) alone, by ridge regression over the genes that it is
  trained on. Each factor has the penalty of the least error where one gene after another is left out, an infinite one
  (the mean of all genes) among them.

Letters: n spots of a slide, G genes that it is trained on, r factors, k values of a vector, U genes that are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError, UsageError, listed, nearest
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import Fit, Plan
from nh2st_pipe.heads.context import Context
from nh2st_pipe.heads.factors import scores

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import ContextFields

__all__ = ["FEWEST_GENES", "Query", "Vectors", "standardised"]

FEWEST_GENES = 10
"""Genes that a map from vectors is learnt from, at least."""

_PENALTIES = 10.0 ** np.arange(-3, 5)  # of the vectors' mean square
_SMALLEST = 1e-6
_RIDGE = 1e-3
_FLOOR = 0.1


class Query(Context):
    """The head; `head` is its recipe's fields (see `recipes.train.QueryHead`) as values."""

    fitted = (*Context.fitted, "asked_factors", "asked_mean")
    factor_sd: torch.Tensor
    asked_factors: torch.Tensor
    asked_mean: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        head: dict[str, Any],
        about: dict[str, Any] | None = None,
        kind: str = "nh2st-query",
    ) -> None:
        super().__init__(dim, genes, head, about, kind)
        r = self.factors.shape[1]
        self.unseen: tuple[str, ...] = ()
        """Those of `genes` that it was not trained on."""
        self.register_buffer("factor_sd", torch.ones(r))
        self.register_buffer("asked_factors", torch.zeros(0, r, dtype=torch.float16))
        self.register_buffer("asked_mean", torch.zeros(0))

    @classmethod
    def _fields(cls, head: dict[str, Any]) -> ContextFields:
        from nh2st_pipe.recipes.train import QueryHead

        return QueryHead.model_validate(head)

    def _n_factors(self, genes: int) -> int | None:
        """See Context: always in factors, as many as there are genes at most."""
        assert self.recipe.rank is not None
        return min(self.recipe.rank, genes)

    # ---- fitting

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel. With a file of vectors, what every gene in it would have of the factors is kept."""
        from nh2st_pipe.data.gene_vectors import read_gene_vectors
        from nh2st_pipe.recipes.train import QueryHead

        done = super().fit(train, plan)
        self.factor_sd = self._factor_sd(train)
        assert isinstance(self.recipe, QueryHead)
        if self.recipe.vectors is None:
            return done
        vectors = read_gene_vectors(Path(self.recipe.vectors), self.recipe.vectors_sha256)
        known = [i for i, gene in enumerate(self.genes) if gene in vectors and bool(self.target_mean[i].isfinite())]
        if len(known) < FEWEST_GENES:
            raise TrainError(
                f"the gene vectors {self.recipe.vectors} have {len(known)} of the {len(self.genes)} genes that are "
                f"trained on, and {FEWEST_GENES} are needed; they name genes as {listed(vectors.genes, 3)}, and the "
                f"slides as {listed(self.genes, 3)}"
            )
        learnt = _Map.of(
            vectors.of(self.genes[i] for i in known),
            self.factors[known].double().cpu().numpy(),
            self.target_mean[known].double().cpu().numpy(),
            self.factor_sd.double().cpu().numpy(),
        )
        own = set(self.genes)
        names = [gene for gene in vectors.genes if gene not in own]
        factors, mean = learnt.at(vectors.of(names)) if names else (np.empty((0, len(self.factor_sd))), np.empty(0))
        self.asked_factors = torch.from_numpy(factors).to(self.factors.device, torch.float16)
        self.asked_mean = torch.from_numpy(mean).to(self.target_mean)
        self.about["queries"] = {
            **(self.about.get("queries") or {}),
            "genes": names,
            "vectors": Path(self.recipe.vectors).name,
        }
        lacking = len(self.genes) - len(known)
        few = f"{lacking} of {len(self.genes)} genes have no vector in {self.recipe.vectors}" if lacking else ""
        return Fit(done.best_epoch, done.history, "; ".join(filter(None, (done.notice, few))))

    def _factor_sd(self, train: Samples) -> torch.Tensor:
        """Return the standard deviation of each factor's scores about their slide's mean, r."""
        total, n = torch.zeros(self.factors.shape[1], dtype=torch.float64, device=train.device), 0
        for part in train.parts:
            found = scores(train.raws(part.rows), self.target_mean, self.factors).double()
            total += (found - found.mean(0)).square_().sum(0)
            n += len(found)
        return (total / max(1, n)).sqrt().to(self.factors)

    # ---- genes that it was not trained on

    def asking(self, genes: Sequence[str]) -> Self:
        """Return the same head, which predicts `genes` too: those that it was trained on as before, others from their
        vectors.

        Raises UsageError for genes that it has no vector of.
        """
        own = set(self.genes)
        wanted = [gene for gene in dict.fromkeys(genes) if gene not in own]
        known = list((self.about.get("queries") or {}).get("genes", ()))
        if not known and wanted:
            raise UsageError(
                f"the head was not trained on {listed(wanted)}, and has no gene vectors to predict others from; train "
                "with --recipe nh2st-query --gene-vectors FILE"
            )
        place = {gene: i for i, gene in enumerate(known)}
        strangers = [gene for gene in wanted if gene not in place]
        if strangers:
            near = listed(f"{gene}{nearest(gene, [*self.genes, *known])}" for gene in strangers)
            raise UsageError(f"the head was not trained on {near}, and its gene vectors have none of that name")
        rows = [place[gene] for gene in wanted]
        return self._with(wanted, self.asked_factors[rows].to(self.factors), self.asked_mean[rows])

    def taught(self, seen: Samples, others: Samples, genes: Sequence[str]) -> Self:
        """Return the same head, which predicts `genes` too, by what training slides measured of them.

        `seen` are the samples that it was trained on, `others` the same spots with these genes' targets.
        """
        r = self.factors.shape[1]
        cross = torch.zeros(r, len(genes), dtype=torch.float64, device=seen.device)
        means, grams = list[torch.Tensor](), dict[bytes, tuple[torch.Tensor, torch.Tensor]]()
        for part, same in zip(seen.parts, others.parts, strict=True):
            x = scores(seen.raws(part.rows), self.target_mean, self.factors).double()
            y = others.raws(same.rows).double()
            means.append(y.mean(0))
            has = torch.isfinite(means[-1])
            x -= x.mean(0)
            key = has.cpu().numpy().tobytes()
            gram = x.T @ x
            grams[key] = has, gram + grams[key][1] if key in grams else gram
            cross += x.T @ torch.where(has, y - means[-1], 0.0)
        found = torch.zeros(len(genes), r, dtype=torch.float64, device=seen.device)
        by_slides = torch.stack([has for has, _ in grams.values()])
        every = torch.stack([gram for _, gram in grams.values()])
        for pattern in torch.unique(by_slides.T, dim=0):
            of = (pattern == by_slides.T).all(1)
            if bool(pattern.any()):
                gram = every[pattern].sum(0)
                gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=_SMALLEST))
                found[of] = torch.linalg.solve(gram, cross[:, of]).T
        mean = torch.stack(means).nanmean(0)
        return self._with(list(genes), found.to(self.factors), mean.to(self.target_mean))

    def profiles(self) -> NDArray[np.float64]:
        """Return what each of `genes` has of the factors, in units of their standard deviations, len(genes) × r."""
        return (self.factors.double() * self.factor_sd.double()).cpu().numpy()

    def _with(self, genes: list[str], factors: torch.Tensor, mean: torch.Tensor) -> Self:
        out = copy.copy(self)
        out._buffers = {**self._buffers}
        out.genes, out.unseen = [*self.genes, *genes], (*self.unseen, *genes)
        out.factors = torch.cat((self.factors, factors))
        out.target_mean = torch.cat((self.target_mean, mean))
        return out


@dataclass(frozen=True)
class Vectors:
    """How vectors are made alike."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    def of(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Return them about the mean, each value by its scale."""
        return np.asarray((vectors - self.mean) / self.scale, np.float64)


def standardised(vectors: NDArray[Any]) -> Vectors:
    """Return mean and scale of vectors G × k, as those of embeddings (`base.FeatureScaler`)."""
    values = np.asarray(vectors, np.float64)
    sd = values.std(axis=0)
    return Vectors(values.mean(axis=0), np.maximum(np.maximum(sd, _FLOOR * np.median(sd)), _SMALLEST))


@dataclass(frozen=True)
class _Map:
    """From a gene's vector to its loadings and mean, a linear one."""

    scaled: Vectors
    weight: NDArray[np.float64]
    """k × (r + 1)."""
    bias: NDArray[np.float64]
    """r + 1: loadings in units of the factors' standard deviations, and the mean."""
    factor_sd: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        vectors: NDArray[Any],
        factors: NDArray[np.float64],
        mean: NDArray[np.float64],
        factor_sd: NDArray[np.float64],
    ) -> _Map:
        """Learn it from vectors G × k, loadings G × r and means G of genes.

        A gene weighs as one over its variance, so that those that vary most do not decide alone.
        """
        scaled = standardised(vectors)
        share = factors * factor_sd
        variance = (share**2).sum(axis=1)
        weights = 1 / np.maximum(variance, _FLOOR * np.median(variance) + _SMALLEST)
        weight, bias = _ridge(scaled.of(vectors), np.column_stack((share, mean)), weights)
        return cls(scaled, weight, bias, factor_sd)

    def at(self, vectors: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loadings U × r and means U."""
        found = self.scaled.of(vectors) @ self.weight + self.bias
        return found[:, :-1] / np.maximum(self.factor_sd, _SMALLEST), found[:, -1]


def _ridge(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return coefficients k × t and intercepts t of ridge regressions of y (G × t) on x (G × k), rows weighing
    `weights`; each t with the penalty of the least error where one row after another is left out, or none at all of x.
    """
    share = weights / weights.sum()
    middle_x, middle = share @ x, share @ y
    root = np.sqrt(weights / weights.mean())[:, None]
    about = root * (y - middle)
    left, length, right = np.linalg.svd(root * (x - middle_x), full_matrices=False)
    along, square = left.T @ about, length**2
    best = np.square(about / (1 - share)[:, None]).sum(axis=0)  # each left out, by the mean of the others
    coefficients = np.zeros((x.shape[1], y.shape[1]))
    for penalty in _PENALTIES * max(float(square.mean()), _SMALLEST):
        shrunk = square / (square + penalty)
        own = np.square(left) @ shrunk + share
        error = np.square((about - left @ (shrunk[:, None] * along)) / np.maximum(1 - own, _SMALLEST)[:, None])
        better = error.sum(axis=0) < best
        best = np.where(better, error.sum(axis=0), best)
        coefficients[:, better] = right.T @ ((length / (square + penalty))[:, None] * along[:, better])
    return coefficients, middle - middle_x @ coefficients
