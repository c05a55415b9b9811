"""The baselines that are solved rather than trained: the mean, and ridge regression with or without context.

Ridge minimises Σ‖y − ȳ − (x − x̄) W‖² + alpha · V · ‖W‖² over all training spots and views, x being the scaled
embedding, beside it (with `context`) the mean of the scaled embeddings of the spot's neighbourhood. It is solved by the
products of values with values, or of rows with rows where there are fewer of them: 500 spots of 25,088 values need no
matrix of 20 GB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import Blocked, FeatureScaler, Fit, HeadModel, LowRank, Plan

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["Mean", "Ridge"]

_BLOCK_VALUES = 1 << 24


class Mean(HeadModel):
    """Predict each gene's mean over the training spots."""

    streams = True

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
            self.mean[genes] = spots.target_mean().to(self.mean)
        return Fit()

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel."""
        return self.mean.expand(len(rows), -1)


class Ridge(HeadModel):
    """Ridge regression in closed form, all genes at once."""

    streams = True

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

    @torch.inference_mode()
    def blocked_unsmoothed(self, samples: Samples) -> Blocked:
        """See HeadModel: features in place of genes, where those are fewer."""
        if len(self.genes) <= len(self.weight):
            return super().blocked_unsmoothed(samples)
        x = torch.zeros(len(samples), len(self.weight), device=samples.device)
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            for view in range(samples.n_views):
                x[part] += self.features(samples, rows, view)
        return Blocked.of_low_rank(LowRank(x.div_(samples.n_views), self.weight.T, self.bias))

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

    def _products(self, train: Samples, dtype: torch.dtype = torch.float64) -> list[_Primal | _Dual]:
        """Fit the scaling; return what the solution is made of for each group of genes that the same slides have."""
        if isinstance(self.scaler, FeatureScaler):
            self.scaler.fit(train)
        return [self._products_of(genes, spots, dtype) for genes, spots in train.by_genes()]

    def _products_of(self, genes: torch.Tensor, train: Samples, dtype: torch.dtype) -> _Primal | _Dual:
        wide = len(self.weight) > len(train) * train.n_views
        return self._dual(genes, train, dtype) if wide else self._primal(genes, train, dtype)

    def _primal(self, genes: torch.Tensor, train: Samples, dtype: torch.dtype) -> _Primal:
        n_views, width = train.n_views, len(self.weight)
        rows_of = torch.arange(len(train), device=train.device)
        gram = torch.zeros((width, width), dtype=dtype, device=rows_of.device)
        cross = torch.zeros((width, len(genes)), dtype=dtype, device=rows_of.device)
        total = torch.zeros(width, dtype=dtype, device=rows_of.device)
        target_mean = train.target_mean()
        for part in train.chunks():
            y = (train.targets(part).double() - target_mean).to(dtype)
            for view in range(n_views):
                x = self.features(train, rows_of[part], view).to(dtype)
                gram += x.T @ x
                cross += x.T @ y
                total += x.sum(0)
        mean = total / (len(train) * n_views)
        gram -= len(train) * n_views * torch.outer(mean, mean)  # Σ(x − x̄)(x − x̄)ᵀ; Σy is zero already
        return _Primal(genes, mean, target_mean, n_views, gram, cross)

    def _dual(self, genes: torch.Tensor, train: Samples, dtype: torch.dtype) -> _Dual:
        n_views, n = train.n_views, len(train)
        rows_of = torch.arange(n, device=train.device)
        x = torch.empty((n_views * n, len(self.weight)), device=train.device)
        for part in train.chunks():
            for view in range(n_views):
                x[view * n + part.start : view * n + part.stop] = self.features(train, rows_of[part], view)
        mean = torch.empty(len(self.weight), dtype=dtype, device=train.device)
        kernel = torch.zeros((len(x), len(x)), dtype=dtype, device=train.device)
        for columns in _blocks(x):
            block = x[:, columns].to(dtype)
            mean[columns] = block.mean(0)
            block -= mean[columns]
            kernel += block @ block.T
        target_mean = train.target_mean()
        y = (train.targets(slice(None)).double() - target_mean).to(dtype).repeat(n_views, 1)
        return _Dual(genes, mean, target_mean, n_views, x, kernel, y)

    def _solve(self, of: _Primal | _Dual) -> None:
        weight = of.weight(self.alpha * of.n_views)
        self.weight[:, of.genes] = weight.to(self.weight)
        self.bias[of.genes] = (of.target_mean - of.mean @ weight).to(self.bias)


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of columns, few enough at a time that a copy of them costs little beside `x` itself."""
    step = max(1, _BLOCK_VALUES // len(x))
    for start in range(0, x.shape[1], step):
        yield slice(start, min(start + step, x.shape[1]))


@dataclass(frozen=True)
class _Products:
    """What the solution is made of, for genes that the same slides have: whatever the penalty, it is the same."""

    genes: torch.Tensor
    mean: torch.Tensor
    """w: x̄."""
    target_mean: torch.Tensor
    """G: ȳ."""
    n_views: int


@dataclass(frozen=True)
class _Primal(_Products):
    """Sums over all spots and views; x̄ and ȳ are taken off."""

    gram: torch.Tensor
    """w × w: Σ(x − x̄)(x − x̄)ᵀ."""
    cross: torch.Tensor
    """w × G: Σ(x − x̄)(y − ȳ)ᵀ."""

    def weight(self, penalty: float) -> torch.Tensor:
        """Return w × G."""
        gram = self.gram.clone()
        gram.diagonal().add_(penalty)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(gram))


@dataclass(frozen=True)
class _Dual(_Products):
    """The same where there are fewer rows (spots in their views) than values in each: products of rows with rows.

    W = Xᵀ (X Xᵀ + penalty)⁻¹ Y, and X Xᵀ is R × R where XᵀX would be w × w.
    """

    x: torch.Tensor
    """R × w, float32; x̄ is taken off when it is used."""
    kernel: torch.Tensor
    """R × R."""
    y: torch.Tensor
    """R × G, ȳ taken off."""

    def weight(self, penalty: float) -> torch.Tensor:
        """Return w × G."""
        kernel = self.kernel.clone()
        kernel.diagonal().add_(penalty)
        by_row = torch.cholesky_solve(self.y, torch.linalg.cholesky(kernel))
        weight = torch.empty((self.x.shape[1], by_row.shape[1]), dtype=by_row.dtype, device=by_row.device)
        for columns in _blocks(self.x):
            weight[columns] = (self.x[:, columns].to(by_row.dtype) - self.mean[columns]).T @ by_row
        return weight
