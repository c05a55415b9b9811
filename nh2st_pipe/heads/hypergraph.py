"""Hypergraph convolution over the nine spots of a neighbourhood.

With H the node × hyperedge incidence, D the node degrees and B the hyperedge sizes, one convolution is

    X' = D⁻¹ H B⁻¹ Hᵀ X Θ + b        (Bai et al. 2021, arXiv 1901.08150; PyTorch Geometric's HypergraphConv)

The embeddings are frozen, so H never changes: `operator` makes the K × K matrix A = D⁻¹ H B⁻¹ Hᵀ of every spot
once, and a convolution is A (X Θ) + b.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["HypergraphConv", "incidence", "operator"]


def incidence(features_nkd: torch.Tensor, similar: int) -> torch.Tensor:
    """Return the incidence n × K × K of K hyperedges per neighbourhood: [n, i, j] is 1 where node i is in edge j.

    Hyperedge j holds node j and the `similar` nodes (fewer where there are no more) most like it by cosine
    similarity of `features_nkd`, itself left out.
    """
    unit = nn.functional.normalize(features_nkd.float(), dim=-1)
    like = unit @ unit.transpose(1, 2)
    k = like.shape[-1]
    like.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = like.topk(min(similar, k - 1), dim=-1).indices  # n × K × similar: the members of each edge
    edges_nkk = torch.zeros_like(like).scatter_(2, nearest, 1.0)
    edges_nkk.diagonal(dim1=1, dim2=2).fill_(1.0)
    return edges_nkk.transpose(1, 2)


def operator(incidence_nkk: torch.Tensor) -> torch.Tensor:
    """Return A = D⁻¹ H B⁻¹ Hᵀ (n × K × K); the row of a node that is in no hyperedge is zero."""
    degree = incidence_nkk.sum(2, keepdim=True)
    size = incidence_nkk.sum(1, keepdim=True)
    over_degree = torch.where(degree > 0, incidence_nkk / degree, 0.0)
    over_size = torch.where(size > 0, incidence_nkk / size, 0.0)
    return over_degree @ over_size.transpose(1, 2)


class HypergraphConv(nn.Module):
    """X' = A (X Θ) + b with A from `operator`."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_dim, out_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_dim))
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, nodes_bkd: torch.Tensor, operator_bkk: torch.Tensor) -> torch.Tensor:
        """Return b × K × out_dim from b × K × in_dim."""
        return self.spread(self.project(nodes_bkd), operator_bkk)

    def spread(self, projected_bkd: torch.Tensor, operator_bkk: torch.Tensor) -> torch.Tensor:
        """Return the convolution of nodes that have been through `project` already."""
        return operator_bkk @ projected_bkd + self.bias
