"""nh2st-nb: raw counts as they are, negative binomial, on the features of nh2st-context.

A spot's count of a gene has the mean s · exp(η) and the dispersion θ of its gene (variance μ + μ² / θ), s being the
spot's counts over all genes, a size factor that is not predicted. η is each training slide's own log rate of the gene,
plus what the network of nh2st-context (see `heads.context`) says of the spot; a prediction has the mean of the slides'
log rates. The loss is the negative log likelihood, so that spots and genes of few counts weigh little by themselves.

What is predicted is the run's target, of the mean: rates times `scale_to` (times the median size factor where counts
are not scaled), then its log. The mean of a log lies below the log of the mean, so that values are too high where
counts are few; PCC hardly minds. The distribution itself is `Prediction.distribution`: each spot's rate, and θ.

Letters: N spots, M members, b spots of a batch, G genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.memory import require
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import Distribution, Fit, Plan, Prediction
from nh2st_pipe.heads.context import Blurs, Context
from nh2st_pipe.heads.members import fit_members

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TargetRecipe, TrainRecipe

__all__ = ["NegativeBinomial", "nb_loss"]

_LEAST_RATE = 1e-7  # a count in ten million: of genes that a slide has and never counted
_DISPERSION = (0.1, 1000.0)  # from which θ begins
_PACE = 20.0  # of log θ beside the weights: it has one number a gene and has to come as far in as many steps


def nb_loss(counts: torch.Tensor, mean: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """Return the negative log likelihood of counts, negative binomial with `mean` and dispersion exp(`log_theta`)."""
    theta = log_theta.exp()
    log_sum = torch.log(theta + mean)
    return (
        torch.lgamma(theta)
        + torch.lgamma(counts + 1)
        - torch.lgamma(counts + theta)
        - theta * (log_theta - log_sum)
        - counts * (torch.log(mean) - log_sum)
    )


class NegativeBinomial(Context):
    """The head. `head` is its recipe's fields (see `recipes.train.NBHead`) as values, `targets` what is predicted."""

    log_rate: torch.Tensor
    log_theta: torch.Tensor
    """Where log θ begins."""
    size: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        head: dict[str, Any],
        targets: dict[str, Any],
        about: dict[str, Any] | None = None,
        kind: str = "nh2st-nb",
    ) -> None:
        from nh2st_pipe.recipes.train import NBHead, TargetRecipe

        super().__init__(dim, genes, NBHead.model_validate(head).features(), about, kind)
        self.targets: TargetRecipe = TargetRecipe.model_validate(targets)
        self.register_buffer("log_rate", torch.zeros(len(self.genes)))
        self.register_buffer("log_theta", torch.zeros(len(self.genes)))
        self.register_buffer("size", torch.ones(()))
        self.members.register_parameter("further", nn.Parameter(torch.zeros(len(self.genes))))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        head, targets = recipe.head.model_dump(mode="json"), recipe.targets.model_dump(mode="json")
        return cls(dim, genes, head=head, targets={**targets, "genes": len(genes)}, about=about)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel."""
        assert train.depth is not None
        network = self.recipe.network
        assert network is not None
        held = "counts of all spots and genes, which nh2st-nb holds with their rates,"
        require(8 * len(train) * len(self.genes), held, TrainError, "train on fewer genes (--genes)")
        counts = train.counts(torch.arange(len(train), device=train.device), self.genes)
        size = train.depth.clamp(min=1.0)
        self.size.copy_(size.quantile(0.5))
        self._fit_basis(train)
        blurs = Blurs(train, self.recipe)
        features, seen = self._network_features(blurs, plan.seed)
        offset = torch.empty_like(counts)
        of_slides = []
        for part in train.parts:
            rate = counts[part.rows].double().sum(0) / size[part.rows].sum()
            of_slides.append(rate.clamp(min=_LEAST_RATE).log())
            offset[part.rows] = (size[part.rows].log()[:, None] + of_slides[-1]).float()
        self.log_rate.copy_(torch.stack(of_slides).nanmean(0).nan_to_num(float(np.log(_LEAST_RATE))))
        self.log_theta.copy_(_moments(counts, offset).log())

        def loss(said_mbg: torch.Tensor, rows_mb: torch.Tensor) -> torch.Tensor:
            mean = (offset[rows_mb].nan_to_num(0.0) + said_mbg).clamp(max=30.0).exp()
            return nb_loss(counts[rows_mb].nan_to_num(0.0), mean, self._log_dispersion())

        return fit_members(
            self.members,
            train,
            lambda rows, views: features.gather(rows, views).float(),
            counts,
            torch.ones(len(train), device=train.device),
            network,
            plan.seed,
            plan.on_epoch,
            self._around(seen, train.parts),
            loss,
        )

    def _log_dispersion(self) -> torch.Tensor:
        """Return log θ, G."""
        return self.log_theta + _PACE * self.members.get_parameter("further")

    @torch.inference_mode()
    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """See HeadModel."""
        if not samples.parts:
            raise TrainError("nh2st-nb predicts whole slides; these samples do not say which slide they are of")
        self.eval()
        blurs = Blurs(samples, self.recipe)
        rate = torch.empty(len(samples), len(self.genes), device=samples.device)
        for part in samples.parts:
            rate[part.rows] = (self._of_members(blurs, part)[0] + self.log_rate).clamp_(max=0.0).exp_()
        theta = self._log_dispersion().exp()
        known = {"rate": rate.cpu().numpy(), "dispersion": theta.float().cpu().numpy()}
        values = _in_units(rate.double(), self.targets, float(self.size)).float().cpu().numpy()
        return Prediction(values, distribution=Distribution("negative binomial", known))


def _moments(counts: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return a first θ of each gene, G: from how far counts lie from their slide's rate."""
    mean = offset.exp()
    known = torch.isfinite(counts)
    squares, apart = (
        torch.where(known, each, 0.0).double().sum(0) for each in (mean.square(), (counts - mean).square() - mean)
    )
    return torch.where(apart > 0, squares / apart, _DISPERSION[1]).clamp(*_DISPERSION).float()


def _in_units(rate: torch.Tensor, targets: TargetRecipe, size: float) -> torch.Tensor:
    """Return what a target of counts with this mean is, before smoothing."""
    if targets.scale_to is None:
        scaled = rate * size
    else:
        scaled = rate * targets.scale_to
        if targets.scale_over == "panel":
            scaled = scaled / rate.sum(1, keepdim=True).clamp(min=_LEAST_RATE)
    if targets.log == "none":
        return scaled
    return torch.log10(scaled + 1) if targets.log == "log10" else torch.log1p(scaled)
