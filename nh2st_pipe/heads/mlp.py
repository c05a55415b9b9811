"""The baseline that is a network on the spot's own embedding: what nonlinearity alone is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel, Plan, Prediction
from nh2st_pipe.heads.members import Members, fit_members

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["MLP"]


class MLP(HeadModel):
    """Scaled embedding d → ReLU → G, trained on the squared error of the target. A random view per spot and step.

    `network` is its recipe's fields (see `recipes.train.MembersRecipe`) as values.
    """

    target_mean: torch.Tensor
    target_scale: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        network: dict[str, Any],
        scale_features: bool = True,
        clip: float = 8.0,
        about: dict[str, Any] | None = None,
        kind: str = "mlp",
    ) -> None:
        from nh2st_pipe.recipes.train import MembersRecipe

        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.recipe = recipe = MembersRecipe.model_validate(network)
        self.scaler: nn.Module = FeatureScaler(dim, clip) if scale_features else nn.Identity()
        self.register_buffer("target_mean", torch.zeros(len(self.genes)))
        self.register_buffer("target_scale", torch.ones(()))
        self.members = Members(
            recipe.members, dim, recipe.width, len(self.genes), recipe.output_scale, contrast=recipe.contrast
        )

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        head, features = recipe.head, recipe.features
        assert head.kind == "mlp"
        return cls(
            dim,
            genes,
            network=head.network.model_dump(mode="json"),
            scale_features=features.scale == "robust",
            clip=features.clip,
            about=about,
        )

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel."""
        assert train.target is not None
        if isinstance(self.scaler, FeatureScaler):
            self.scaler.fit(train)
        self.target_mean.copy_(train.target.double().nanmean(0))
        y = train.target - self.target_mean
        scale = y.square().nanmean().sqrt()
        self.target_scale.copy_(scale if scale > 0 else torch.ones_like(scale))
        return fit_members(
            self.members,
            train,
            lambda rows, views: self.features(train, rows, views),
            y / self.target_scale,
            torch.ones(len(train), device=train.device),
            self.recipe,
            plan.seed,
            plan.on_epoch,
        )

    def features(self, samples: Samples, rows: torch.Tensor, views: int | torch.Tensor) -> torch.Tensor:
        """Return … × d, float32."""
        out: torch.Tensor = self.scaler(samples.gather(rows, views)).float()
        return out

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel."""
        return self.target_mean + self.target_scale * self.members.agreed([self.features(samples, rows, view)])[0]

    @torch.inference_mode()
    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """See HeadModel."""
        self.eval()
        values = np.empty((len(samples), len(self.genes)), np.float32)
        spread = np.empty_like(values) if self.recipe.members > 1 else None
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            views = [self.features(samples, rows, view) for view in range(samples.n_views)]
            mean, apart = self.members.agreed(views)
            values[part] = (self.target_mean + self.target_scale * mean).cpu().numpy()
            if spread is not None and apart is not None:
                spread[part] = (self.target_scale * apart).cpu().numpy()
        return Prediction(values, spread=spread)
