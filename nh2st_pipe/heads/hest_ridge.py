"""HEST-Benchmark's probe, the baseline that papers on encoders report (Jaume et al., NeurIPS 2024, arXiv 2406.16192).

Embeddings are standardised, reduced to their 256 leading principal components, and regressed on by ridge without an
intercept, its penalty 100 / (components · genes), by LSQR: as their code does, with scikit-learn, since its randomised
components and the tolerance of LSQR are part of the figure. A tile's first view alone is read, in training and at
prediction: the benchmark embeds each tile once. What is kept is the linear map that all of it comes to.

Departures: targets are those of the run, not log1p of raw counts. These are
`--set targets.scale_to=null --set targets.log=log1p --set targets.smooth=none`. Without an intercept predictions have a
mean of about 0 on the training spots, so that MSE and MAE say little of it; PCC, which the benchmark reports, does not
change with it.

Letters: n spots, d values per embedding, c components, G genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import Fit, HeadModel, Plan, Prediction

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["HestRidge"]

_PENALTY, _STEPS, _RANDOM_STATE = 100.0, 1000, 1


class HestRidge(HeadModel):
    """Standardised principal components and ridge, as one linear map d × G."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        components: int = 256,
        about: dict[str, Any] | None = None,
        kind: str = "hest-ridge",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind, self.components = list(genes), about or {}, kind, components
        self.register_buffer("weight", torch.zeros(dim, len(self.genes), dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(len(self.genes), dtype=torch.float64))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        assert recipe.head.kind == "hest-ridge"
        return cls(dim, genes, components=recipe.head.components, about=about)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel. A gene that a slide lacks is learnt from the others, with components of their spots."""
        for genes, spots in train.by_genes():
            assert spots.target is not None
            weight, bias = self._map(_first_view(spots), spots.target.double().cpu().numpy())
            self.weight[:, genes] = torch.from_numpy(weight).to(self.weight)
            self.bias[genes] = torch.from_numpy(bias).to(self.bias)
        return Fit()

    def _map(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weight d × G and bias G from embeddings n × d and targets n × G."""
        from sklearn.decomposition import PCA
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x)
        pca = PCA(n_components=min(self.components, *x.shape), random_state=_RANDOM_STATE)
        reduced = pca.fit_transform(scaler.transform(x))
        penalty = _PENALTY / (reduced.shape[1] * len(self.genes))
        ridge = Ridge(
            solver="lsqr", alpha=penalty, random_state=_RANDOM_STATE, fit_intercept=False, max_iter=_STEPS
        ).fit(reduced, y)
        coefficients = np.atleast_2d(ridge.coef_)  # G × c; of a single gene c alone
        onto = (coefficients @ pca.components_).T  # d × G
        return onto / scaler.scale_[:, None], -(scaler.mean_ / scaler.scale_ + pca.mean_) @ onto

    @torch.inference_mode()
    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """See HeadModel."""
        out = np.empty((len(samples), len(self.genes)), np.float32)
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            out[part] = (samples.gather(rows, 0).double() @ self.weight + self.bias).float().cpu().numpy()
        return Prediction(out)


def _first_view(samples: Samples) -> np.ndarray:
    rows = torch.arange(len(samples), device=samples.device)
    found: np.ndarray = samples.gather(rows, 0).double().cpu().numpy()
    return found
