"""A head of your own: nh2st-pipe train --embeddings store.zarr --recipe head.py:Elastic --set head.alpha=0.01"""

import torch
from pydantic import Field
from sklearn.linear_model import ElasticNet

from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel
from nh2st_pipe.recipes.train import PlugInHead


class ElasticRecipe(PlugInHead):
    """The head's fields: typed, checked, and kept with every run."""

    alpha: float = Field(0.01, gt=0)
    l1_ratio: float = Field(0.5, ge=0, le=1)


class Elastic(HeadModel):
    """Elastic net on a spot's own embedding: few of its values for each gene."""

    recipe = ElasticRecipe

    def __init__(self, dim, genes, alpha=0.01, l1_ratio=0.5, about=None, kind=""):  # kept beside the weights
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.alpha, self.l1_ratio = alpha, l1_ratio
        self.scaler, self.linear = FeatureScaler(dim, clip=8.0), torch.nn.Linear(dim, len(genes))

    @classmethod
    def build(cls, recipe, dim, genes, about):
        """Return an untrained head for embeddings of `dim` values."""
        return cls(dim, genes, **recipe.head.model_dump(), about=about)

    def fit(self, train, plan):
        """Train on N spots: embeddings N × V × d (`train.gather(rows, view)`), targets N × G."""
        self.scaler.fit(train)
        features = self.scaler(train.gather(torch.arange(len(train), device=train.device), 0))
        net = ElasticNet(alpha=self.alpha, l1_ratio=self.l1_ratio, random_state=plan.seed)
        net.fit(features.cpu().numpy(), train.target.cpu().numpy())
        self.linear.load_state_dict({"weight": torch.tensor(net.coef_), "bias": torch.tensor(net.intercept_)})
        return Fit()

    def forward_view(self, samples, rows, view):
        """Return predictions b × G of the spots `rows` in one of the V views."""
        return self.linear(self.scaler(samples.gather(rows, view)))
