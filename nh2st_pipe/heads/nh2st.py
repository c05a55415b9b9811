"""NH2ST: Qu et al., "Spatially Gene Expression Prediction using Dual-Scale Contrastive Learning", MICCAI 2025,
arXiv 2506.23827, on frozen embeddings.

Departures from the paper, each because the encoder is frozen and its output cached:
- the image features are the pooled embedding of a tile (d values), not the trained encoder's 7 × 7 map;
- they are centred, scaled and clipped first (see FeatureScaler): nothing upstream can adapt to the head;
- the hyperedges come from the embeddings of view 0 and are computed once;
- a spot's neighbours are shown in the same dihedral view as the spot;
- the decoder's last bias begins at the mean of the training targets (`prepare`). Begun at zero, the first epochs go
  into learning that offset, through every weight;
- a prediction is the mean over the eight views, where the paper predicts from the tile as it is.

Prediction uses the spot's own tile alone: the decoder reads hᵖ before the cross-attention. The neighbours reach
it through training only.

Letters: b spots of a batch, K spots of a neighbourhood, d embedding, w width, G genes; p image side, g gene side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler, Fit, HeadModel, Plan
from nh2st_pipe.heads.fitting import fit_by_steps
from nh2st_pipe.heads.hypergraph import HypergraphConv, incidence, operator

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import TrainRecipe

__all__ = ["NH2ST", "CrossAttention", "contrastive_loss"]


def contrastive_loss(
    image_bw: torch.Tensor, gene_bw: torch.Tensor, temperature: float, off_diagonal: float
) -> torch.Tensor:
    """Return the cross-entropy towards the diagonal of image × gene cosine similarities over `temperature`.

    Logits of pairs that do not belong together are multiplied by `off_diagonal`. One direction only: each
    image looks for its expression.
    """
    logits = F.normalize(image_bw, dim=-1) @ F.normalize(gene_bw, dim=-1).T / temperature
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = torch.where(own, logits, logits * off_diagonal)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class CrossAttention(nn.Module):
    """LayerNorm → multi-head attention → residual → LayerNorm → MLP (GELU) → residual → LayerNorm.

    Each side is one token here. A softmax over one key is 1 whatever the query, so attention is the projected
    value, each head of it dropped out with the attention's dropout; the projections of query and key could
    neither act nor learn, and are left out. Equal to `nn.MultiheadAttention` on the same weights.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        hidden = int(width * mlp_ratio)
        self.heads, self.dropout = heads, dropout
        self.norm_kv = nn.LayerNorm(width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, query_bw: torch.Tensor, key_value_bw: torch.Tensor) -> torch.Tensor:
        """Return b × w: the query side, having looked at the other."""
        value = self.value(self.norm_kv(key_value_bw))
        if self.training and self.dropout:
            weight = F.dropout(value.new_ones(len(value), self.heads, 1), self.dropout)
            value = (value.view(len(value), self.heads, -1) * weight).flatten(1)
        x = query_bw + self.out(value)
        x = x + self.mlp(self.norm_mlp(x))
        return self.norm_out(x)  # type: ignore[no-any-return]


class _NeighbourBranch(nn.Module):
    """Two hypergraph convolutions with ReLU, then the mean over the nodes."""

    def __init__(self, in_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.first = HypergraphConv(in_dim, hidden)
        self.second = HypergraphConv(hidden, width)

    def forward(
        self, distinct_ud: torch.Tensor, place_bk: torch.Tensor | None, operator_bkk: torch.Tensor
    ) -> torch.Tensor:
        """Return b × w from the u distinct spots of the batch and each neighbourhood's places among them."""
        b, k, _ = operator_bkk.shape
        projected_uh = self.first.project(distinct_ud)  # once per distinct spot, then gathered
        nodes = F.relu(self.first.spread(_placed(projected_uh, place_bk, b, k), operator_bkk))
        nodes = F.relu(self.second(nodes, operator_bkk))
        return nodes.mean(1)


def _distinct(wanted_bk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the u distinct values of `wanted`, and the place of each among them. On a GPU, where finding them takes
    longer than it saves, all of them one after another, and no places.
    """
    if wanted_bk.is_cuda:
        return wanted_bk.flatten(), None
    distinct, place_bk = torch.unique(wanted_bk, return_inverse=True)
    return distinct, place_bk


def _placed(values_uw: torch.Tensor, place_bk: torch.Tensor | None, b: int, k: int) -> torch.Tensor:
    """Return b × k × w from what was made of the distinct ones."""
    return values_uw.view(b, k, -1) if place_bk is None else values_uw[place_bk]


def _own(values_uw: torch.Tensor, place_bk: torch.Tensor | None, k: int) -> torch.Tensor:
    """Return b × w: the first of each k."""
    return values_uw[::k] if place_bk is None else values_uw[place_bk[:, 0]]


class NH2ST(HeadModel):
    """Query branch, neighbour branch, shared cross-attention, two contrastive losses, linear decoder."""

    def __init__(
        self,
        dim: int,
        genes: list[str],
        width: int = 512,
        hidden: int = 1024,
        decoder_hidden: int = 256,
        heads: int = 8,
        depth: int = 1,
        mlp_ratio: float = 1.0,
        dropout: float = 0.5,
        similar: int = 3,
        temperature: float = 0.05,
        off_diagonal: float = 0.1,
        query_weight: float = 1.0,
        neighbour_weight: float = 0.5,
        scale_features: bool = True,
        clip: float = 8.0,
        about: dict[str, Any] | None = None,
        kind: str = "nh2st",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.similar, self.temperature, self.off_diagonal = similar, temperature, off_diagonal
        self.query_weight, self.neighbour_weight = query_weight, neighbour_weight
        self.scaler = FeatureScaler(dim, clip) if scale_features else None
        n_genes = len(self.genes)
        self.query = nn.Linear(dim, width)
        self.gene_encoder = nn.Sequential(nn.Linear(n_genes, width), nn.Linear(width, width))
        self.image_neighbours = _NeighbourBranch(dim, hidden, width)
        self.gene_neighbours = _NeighbourBranch(width, hidden, width)
        self.cross = nn.ModuleList(CrossAttention(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.decoder = nn.Sequential(nn.Linear(width, decoder_hidden), nn.Linear(decoder_hidden, n_genes))

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        features = recipe.features
        scaling: dict[str, Any] = {"scale_features": features.scale == "robust", "clip": features.clip}
        return cls(dim, genes, **recipe.head.model_dump(), **scaling, about=about)

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """Train by steps; see `fit_by_steps`."""
        self.prepare(train)
        operators = self.operators(train)
        assert train.target is not None
        known = torch.isfinite(train.target)
        if not known.all():  # a gene that a slide lacks is encoded as its mean, and not judged
            train = replace(train, target=torch.where(known, train.target, train.target.nanmean(0)))
        return fit_by_steps(
            self, lambda rows, views: self.losses(train, operators, rows, views, known), train, plan, repeated=True
        )

    def features(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return … × d, float32, as the branches take them."""
        return embeddings.float() if self.scaler is None else self.scaler(embeddings)

    def prepare(self, samples: Samples) -> None:
        """Fit what is not trained by steps on the training samples: the scaling, and where the decoder begins."""
        if self.scaler is not None:
            self.scaler.fit(samples)
        assert samples.target is not None
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias.copy_(samples.target.nanmean(0))

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """See HeadModel."""
        out: torch.Tensor = self.decoder(self.query(self.features(samples.gather(rows, view))))
        return out

    def operators(self, samples: Samples) -> torch.Tensor:
        """Return the hypergraph operator of every spot's neighbourhood, N × K × K."""
        parts = [
            operator(incidence(samples.gather(samples.neighbours[part], 0), self.similar)) for part in samples.chunks()
        ]
        return torch.cat(parts)

    def losses(
        self,
        samples: Samples,
        operators: torch.Tensor,
        rows: torch.Tensor,
        views: torch.Tensor,
        known: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return `total` and its parts for the spots `rows`, each in its view of `views` (both of length b).

        `known` (N × G) says which targets the squared error is over; all where it is None.
        """
        assert samples.target is not None
        target = samples.target[rows]
        around_bk = samples.neighbours[rows]
        k = around_bk.shape[1]
        # A spot stands in several neighbourhoods; each distinct (spot, view) goes through a projection once.
        n_views = samples.n_views
        key, place_bk = _distinct(around_bk * n_views + views[:, None])
        image_ud = self.features(samples.gather(key // n_views, key % n_views))
        spot, gene_place_bk = _distinct(around_bk)
        gene_uw = self.gene_encoder(samples.target[spot])

        # The spot itself is first in its neighbourhood.
        h_p = self.query(_own(image_ud, place_bk, k))
        h_g = _own(gene_uw, gene_place_bk, k)
        z_p = self.image_neighbours(image_ud, place_bk, operators[rows])
        z_g = self.gene_neighbours(gene_uw, gene_place_bk, operators[rows])
        query, neighbour = self._compare(h_p, h_g, z_p, z_g)
        errors = (self.decoder(h_p) - target).square()
        judged = torch.ones_like(target, dtype=torch.bool) if known is None else known[rows]
        mse = torch.where(judged, errors, 0.0).sum() / judged.sum()
        parts = {"mse": mse, "query": query, "neighbour": neighbour}
        total = parts["mse"] + self.query_weight * parts["query"] + self.neighbour_weight * parts["neighbour"]
        return {"total": total, **parts}

    def _compare(
        self, h_p: torch.Tensor, h_g: torch.Tensor, z_p: torch.Tensor, z_g: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the contrastive losses of query and neighbour pair after the shared cross-attention, in turn.

        The two pairs go through the shared blocks as one batch.
        """
        image, gene = torch.cat((h_p, z_p)), torch.cat((h_g, z_g))
        for block in self.cross:
            image = block(image, gene)
            gene = block(gene, image)
        b = len(h_p)
        return (
            contrastive_loss(image[:b], gene[:b], self.temperature, self.off_diagonal),
            contrastive_loss(image[b:], gene[b:], self.temperature, self.off_diagonal),
        )
