"""The baselines that are solved rather than trained: the mean, and ridge regression with or without context.

Ridge minimises Σ‖y − ȳ − (x − x̄) W‖² + alpha · V · ‖W‖² over all training spots and views, x being the scaled
embedding, beside it (with `context`) the mean of the scaled embeddings of the spot's neighbourhood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel, Plan

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["Mean", "Ridge"]


class Mean(HeadModel):
    """Predict each gene's mean over the training spots."""

    mean: torch.Tensor

    def __init__(self, genes: list[str], about: dict[str, Any] | None = None, kind: str = "mean") -> None:
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.register_buffer("mean", torch.zeros(len(self.genes)))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        return cls(genes, about=about)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """Take the mean of the targets."""
        for genes, spots in train.by_genes():
            assert spots.target is not None
            self.mean[genes] = spots.target.double().mean(0).to(self.mean)
        return Fit()

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel."""
        return self.mean.expand(len(rows), -1)


class Ridge(HeadModel):
    """Ridge regression in closed form, all genes at once."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        context: bool = False,
        alpha: float = 3000.0,
        scale_features: bool = True,
        clip: float = 8.0,
        about: dict[str, Any] | None = None,
        kind: str = "ridge",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.context, self.alpha = context, alpha
        self.scaler: nn.Module = FeatureScaler(dim, clip) if scale_features else nn.Identity()
        self.register_buffer("weight", torch.zeros(dim * (1 + context), len(self.genes)))
        self.register_buffer("bias", torch.zeros(len(self.genes)))

    def features(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """Return b × d, or b × 2d with context, float32."""
        own: torch.Tensor = self.scaler(samples.gather(rows, view)).float()
        if not self.context:
            return own
        around: torch.Tensor = self.scaler(samples.gather(samples.neighbours[rows], view)).float()
        return torch.cat((own, around.mean(1)), 1)

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel."""
        return self.features(samples, rows, view) @ self.weight + self.bias

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        head, features = recipe.head, recipe.features
        assert head.kind == "ridge"
        return cls(
            dim,
            genes,
            context=head.context,
            alpha=head.alpha,
            scale_features=features.scale == "robust",
            clip=features.clip,
            about=about,
        )

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """Solve for `weight` and `bias` on all spots and views of `train`, in float64."""
        for products in self._products(train):
            self._solve(products)
        return Fit()

    @classmethod
    def fit_each(
        cls, recipes: Sequence[TrainRecipe], train: Samples, genes: list[str], about: dict[str, Any], plan: Plan
    ) -> Iterator[HeadModel]:
        """See HeadModel: whatever alpha, scaling and products are the same. In float32: it is a comparison."""
        head, products = None, []
        for recipe in recipes:
            wanted = cls.build(recipe, train.dim, genes, about)
            if head is None or wanted.context != head.context:
                head = wanted.to(train.device)
                products = head._products(train, torch.float32)
            head.alpha = wanted.alpha
            for each in products:
                head._solve(each)
            yield head

    def _products(self, train: Samples, dtype: torch.dtype = torch.float64) -> list[_Products]:
        """Fit the scaling; return what the solution is made of for each group of genes that the same slides have."""
        if isinstance(self.scaler, FeatureScaler):
            self.scaler.fit(train)
        return [self._products_of(genes, spots, dtype) for genes, spots in train.by_genes()]

    def _products_of(self, genes: torch.Tensor, train: Samples, dtype: torch.dtype) -> _Products:
        assert train.target is not None
        n_views, width = train.n_views, len(self.weight)
        rows_of = torch.arange(len(train), device=train.device)
        gram = torch.zeros((width, width), dtype=dtype, device=rows_of.device)
        cross = torch.zeros((width, len(genes)), dtype=dtype, device=rows_of.device)
        total = torch.zeros(width, dtype=dtype, device=rows_of.device)
        target_mean = train.target.double().mean(0)
        for part in train.chunks():
            y = (train.target[part].double() - target_mean).to(dtype)
            for view in range(n_views):
                x = self.features(train, rows_of[part], view).to(dtype)
                gram += x.T @ x
                cross += x.T @ y
                total += x.sum(0)
        mean = total / (len(train) * n_views)
        gram -= len(train) * n_views * torch.outer(mean, mean)  # Σ(x − x̄)(x − x̄)ᵀ; Σy is zero already
        return _Products(genes, gram, cross, mean, target_mean, n_views)

    def _solve(self, of: _Products) -> None:
        gram = of.gram.clone()
        gram.diagonal().add_(self.alpha * of.n_views)
        weight = torch.cholesky_solve(of.cross, torch.linalg.cholesky(gram))
        self.weight[:, of.genes] = weight.to(self.weight)
        self.bias[of.genes] = (of.target_mean - of.mean @ weight).to(self.bias)


@dataclass(frozen=True)
class _Products:
    """Sums over all spots and views of the slides that have the genes; x̄ and ȳ are taken off."""

    genes: torch.Tensor
    gram: torch.Tensor
    """w × w: Σ(x − x̄)(x − x̄)ᵀ."""
    cross: torch.Tensor
    """w × G: Σ(x − x̄)(y − ȳ)ᵀ."""
    mean: torch.Tensor
    """w: x̄."""
    target_mean: torch.Tensor
    """G: ȳ."""
    n_views: int
