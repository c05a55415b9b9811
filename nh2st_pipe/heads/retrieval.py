"""The baseline that retrieves: a spot gets the mean target of the training spots that look most like it.

As retrieval heads do (BLEEP, Xie et al. 2023), without learning the space: likeness is the cosine of scaled embeddings,
each the mean over its views, searched exactly through FAISS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel, Plan, Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["KNN"]


class KNN(HeadModel):
    """Mean target of the `k` most alike training spots; of all of them where there are fewer."""

    keeps_tiles = "keys"
    keys: torch.Tensor
    values: torch.Tensor
    mean: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        k: int = 50,
        scale_features: bool = True,
        clip: float = 8.0,
        about: dict[str, Any] | None = None,
        kind: str = "knn",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind, self.k = list(genes), about or {}, kind, k
        self.scaler: nn.Module = FeatureScaler(dim, clip) if scale_features else nn.Identity()
        self.register_buffer("keys", torch.zeros(0, dim))
        self.register_buffer("values", torch.zeros(0, len(self.genes)))
        self.register_buffer("mean", torch.zeros(len(self.genes)))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        head, features = recipe.head, recipe.features
        assert head.kind == "knn"
        scaled = features.scale == "robust"
        return cls(dim, genes, k=head.k, scale_features=scaled, clip=features.clip, about=about)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the number of training spots from what is loaded."""
        for name in ("keys", "values"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """Keep the training spots."""
        assert train.target is not None
        if isinstance(self.scaler, FeatureScaler):
            self.scaler.fit(train)
        self.keys = torch.cat([self._key(train, part) for part in train.chunks()])
        self.values = train.target.clone()
        self.mean = train.target.nanmean(0)
        return Fit()

    @classmethod
    def fit_each(
        cls, recipes: Sequence[TrainRecipe], train: Samples, genes: list[str], about: dict[str, Any], plan: Plan
    ) -> Iterator[HeadModel]:
        """See HeadModel: whatever k, the spots that are kept are the same."""
        first = cls.build(recipes[0], train.dim, genes, about).to(train.device)
        first.fit(train, plan)
        for recipe in recipes:
            assert recipe.head.kind == "knn"
            first.k = recipe.head.k
            yield first

    def _key(self, samples: Samples, part: slice) -> torch.Tensor:
        rows = torch.arange(part.start, part.stop, device=samples.device)
        return F.normalize(self.scaler(samples.gather(rows, slice(None))).float().mean(1))

    @torch.inference_mode()
    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """See HeadModel."""
        import faiss

        self.eval()
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(self.keys.shape[1])
        index.add(self.keys.cpu().numpy())
        out: list[NDArray[np.float32]] = [np.empty((0, len(self.genes)), np.float32)]
        for part in samples.chunks():
            found = index.search(self._key(samples, part).cpu().numpy(), min(self.k, index.ntotal))[1]
            mean = self.values[torch.from_numpy(found).to(self.values.device)].nanmean(1)
            out.append(torch.where(torch.isfinite(mean), mean, self.mean).cpu().numpy())  # none of the k has the gene
        return Prediction(np.concatenate(out))
