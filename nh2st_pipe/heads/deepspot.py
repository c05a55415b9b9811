"""DeepSpot's head (Nonchev et al. 2025, medRxiv 2025.02.09.25321567) on kept embeddings: sets of neighbours, pooled.

φ, a small network, is applied to the spot and, shared, to each of its neighbours; over the neighbours its largest
values are taken; ρ maps the two side by side to expression. Both are ensembles inside the network: the median of ten φ,
the mean of ten ρ. Squared error, AdamW; how many epochs is chosen inside the training slides, and so is what its recipe
leaves to `choose`.

Departures, as the embeddings are kept: a spot has no sub-spot tiles; its neighbours are those of the store, nearest
first, in place of all within a radius; embeddings are scaled as the baselines' are; the last bias begins at the mean of
the training targets; a prediction is the mean over views. The median of ten is their fifth, as torch has it.

Letters: b spots, k neighbours, d values per embedding, w width, m networks of an ensemble, G genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel, Plan
from nh2st_pipe.heads.fitting import fit_by_steps
from nh2st_pipe.heads.members import uniform

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["DeepSpot"]


class DeepSpot(HeadModel):
    """φ and ρ; the arguments are its recipe's fields (see `recipes.train.DeepSpotHead`)."""

    def __init__(
        self,
        dim: int,
        genes: list[str],
        width: int = 512,
        networks: int = 10,
        dropout: float = 0.3,
        output_dropout: float = 0.1,
        scale_features: bool = True,
        clip: float = 8.0,
        about: dict[str, Any] | None = None,
        kind: str = "deepspot",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.width, self.networks, self.dropout, self.output_dropout = width, networks, dropout, output_dropout
        self.scaler: nn.Module = FeatureScaler(dim, clip) if scale_features else nn.Identity()
        self.phi = nn.Linear(dim, networks * width)
        self.rho = nn.Parameter(uniform(networks, 2 * width, len(self.genes)))
        self.rho_bias = nn.Parameter(torch.zeros(networks, 1, len(self.genes)))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        head, features = recipe.head, recipe.features
        assert head.kind == "deepspot"
        fields = head.model_dump(mode="json", exclude={"kind"})
        return cls(dim, genes, scale_features=features.scale == "robust", clip=features.clip, about=about, **fields)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel."""
        assert train.target is not None
        target = train.target
        known = torch.isfinite(target)
        if isinstance(self.scaler, FeatureScaler):
            self.scaler.fit(train)
        with torch.no_grad():
            self.rho_bias.copy_(target.double().nanmean(0).nan_to_num(0.0))

        def losses(rows: torch.Tensor, views: torch.Tensor) -> dict[str, torch.Tensor]:
            around = train.neighbours[rows]
            x = self.scaler(train.gather(around, views[:, None])).float()
            seen = self._phi(x)
            out = self._rho(seen[:, 0], seen[:, 1:] if seen.shape[1] > 1 else seen)
            has = known[rows]
            squares = torch.where(has, out - target[rows], 0.0).square().sum()
            return {"total": squares / has.sum().clamp(min=1)}

        return fit_by_steps(self, losses, train, plan, repeated=True)

    def _phi(self, x: torch.Tensor) -> torch.Tensor:
        """Return … × w from … × d: the median of the networks, value by value."""
        of_each = F.relu(F.dropout(self.phi(x), self.dropout, self.training)).unflatten(-1, (self.networks, self.width))
        found: torch.Tensor = of_each.median(dim=-2).values
        return found

    def _rho(self, own_bw: torch.Tensor, near_bkw: torch.Tensor) -> torch.Tensor:
        """Return b × G, the mean of the networks."""
        joined = torch.cat((own_bw, near_bkw.amax(1)), 1)
        hidden = F.relu(F.dropout(joined.expand(self.networks, -1, -1), self.dropout, self.training))
        of_each = torch.baddbmm(self.rho_bias, hidden, self.rho)
        return F.dropout(of_each, self.output_dropout, self.training).mean(0)

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel. Each spot that several are near is seen once."""
        distinct, place = torch.unique(samples.neighbours[rows], return_inverse=True)
        seen = self._phi(self.scaler(samples.gather(distinct, view)).float())[place]
        return self._rho(seen[:, 0], seen[:, 1:] if seen.shape[1] > 1 else seen)
