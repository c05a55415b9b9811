"""What a spot's neighbours add by cross-attention: from the spot to its nearest, sooner to those that are near.

Several members at once, each with its own weights. With q of the spot, k and v of a neighbour at distance d (in spot
pitches), a head's logits are q·k / √key − ½ eˡ d², ℓ learnt, beginning at 0, −1, −2 … for one head after another: some
look close, some far. Neighbours are seen as the mean over their views, which turning the slide does not change.

Letters: M members, b spots, u distinct neighbours, K neighbours of each spot, p values, H heads, w width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import nn
from torch.nn import functional as F

from nh2st_pipe.tiles.lattice import pitch_px

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import AttentionPart

__all__ = ["Attention", "Nearest", "nearest_of"]


_FAR = 1e4  # pitches; infinity would make the gradient of what it is multiplied with no number


@dataclass(frozen=True)
class Nearest:
    """The neighbourhoods of n spots."""

    rows: torch.Tensor
    """n × K, int64: the spot itself first; it stands in, too far to be seen, where it has fewer."""
    distance: torch.Tensor
    """n × K, float32, in spot pitches."""


def nearest_of(xy: NDArray[np.float64], k: int, device: torch.device) -> Nearest:
    """Find each spot's `k` nearest (itself among them) on one slide."""
    found = min(k, len(xy))
    far, near = cKDTree(xy).query(xy, k=found)
    distance, rows = np.asarray(far).reshape(len(xy), found), np.asarray(near).reshape(len(xy), found)
    missing = k - found
    rows = np.concatenate((rows, np.repeat(np.arange(len(xy))[:, None], missing, 1)), 1)
    distance = np.concatenate((distance / (pitch_px(xy) or 1.0), np.full((len(xy), missing), _FAR)), 1)
    return Nearest(torch.from_numpy(rows).to(device), torch.from_numpy(distance).float().to(device))


class Attention(nn.Module):
    """M cross-attentions p → w."""

    def __init__(self, members: int, features: int, width: int, recipe: AttentionPart) -> None:
        from nh2st_pipe.heads.members import uniform

        super().__init__()
        self.heads, self.key, self.dropout = recipe.heads, recipe.key, recipe.dropout
        self.query_weight = nn.Parameter(uniform(members, features, recipe.heads * recipe.key))
        self.key_weight = nn.Parameter(uniform(members, features, recipe.heads * recipe.key))
        self.value_weight = nn.Parameter(uniform(members, features, recipe.heads * recipe.value))
        self.out_weight = nn.Parameter(uniform(members, recipe.heads * recipe.value, width))
        self.nearness = nn.Parameter(-torch.arange(recipe.heads, dtype=torch.float32).repeat(members, 1))

    def forward(
        self,
        own_mbp: torch.Tensor,
        around: torch.Tensor,
        place_mbk: torch.Tensor | None,
        distance_mbk: torch.Tensor,
    ) -> torch.Tensor:
        """Return M × b × w: spots seen as `own`, their neighbours being the rows `place` of `around`, u × p; or, where
        there is no `place`, those that `around` has for each, M × b × K × p.
        """
        m, b, k = distance_mbk.shape
        query = torch.bmm(own_mbp, self.query_weight).view(m, b, self.heads, self.key)
        if place_mbk is None:
            weight = torch.cat((self.key_weight, self.value_weight), 2)
            both = torch.bmm(around.flatten(1, 2), weight).view(m, b, k, -1)
        else:
            # As a look-up in one table: its gradient is summed many times faster than that of an index.
            of_member = torch.arange(m, device=place_mbk.device)[:, None, None] * len(around)
            both = F.embedding(place_mbk + of_member, self.table(around).flatten(0, 1))
        keys, values = self._keys_and_values(both)
        logits = torch.einsum("mbhc,mbkhc->mbhk", query, keys) / self.key**0.5
        weights = F.dropout((logits - self._bias(distance_mbk)).softmax(-1), self.dropout, self.training)
        seen = torch.einsum("mbhk,mbkhv->mbhv", weights, values).reshape(m, b, -1)
        return torch.bmm(seen, self.out_weight)

    def table(self, around: torch.Tensor) -> torch.Tensor:
        """Return what spots u × p are looked at by: keys and values, M × u × c."""
        return torch.matmul(around, torch.cat((self.key_weight, self.value_weight), 2))

    def of_views(
        self, own_vbp: torch.Tensor, table: torch.Tensor, place_bk: torch.Tensor, distance_bk: torch.Tensor
    ) -> torch.Tensor:
        """Return M × V × b × w, without dropout: the same spots seen in V views, their neighbours `place_bk` of `table`
        looked up once for all of them.
        """
        m, (v, b, _) = len(table), own_vbp.shape
        query = torch.matmul(own_vbp.flatten(0, 1), self.query_weight).view(m, v, b, self.heads, self.key)
        both = table.index_select(1, place_bk.flatten()).view(m, *place_bk.shape, -1)
        keys, values = self._keys_and_values(both)
        logits = torch.einsum("mvbhc,mbkhc->mbhvk", query, keys) / self.key**0.5
        bias = self._bias(distance_bk.expand(m, -1, -1))
        weights = (logits - bias[:, :, :, None]).softmax(-1)
        seen = torch.einsum("mbhvk,mbkhe->mvbhe", weights, values).reshape(m, v * b, -1)
        return torch.bmm(seen, self.out_weight).view(m, v, b, -1)

    def _keys_and_values(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys M × b × K × heads × key, and values alike."""
        keys, values = both.split((self.heads * self.key, both.shape[-1] - self.heads * self.key), -1)
        return keys.unflatten(-1, (self.heads, self.key)), values.unflatten(-1, (self.heads, -1))

    def _bias(self, distance_mbk: torch.Tensor) -> torch.Tensor:
        """Return M × b × heads × K: how much less each head looks at what is far."""
        return 0.5 * self.nearness.exp()[:, None, :, None] * distance_mbk[:, :, None].square()
