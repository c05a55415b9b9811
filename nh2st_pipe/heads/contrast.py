"""NH2ST's contrastive loss as an auxiliary: a spot's image and its expression are to lie near each other.

Both directions, with soft targets (as in BLEEP, Xie et al. 2023): spots of a batch that look alike or express alike are
not pushed apart as if they were strangers. Several members at once.

Letters: M members, b spots, h hidden values, G genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import ContrastPart

__all__ = ["Contrast"]


class Contrast(nn.Module):
    """Projections of both sides, and the loss between them; prediction does without."""

    def __init__(self, members: int, hidden: int, genes: int, recipe: ContrastPart) -> None:
        from nh2st_pipe.heads.members import uniform

        super().__init__()
        self.temperature = recipe.temperature
        self.image = nn.Parameter(uniform(members, hidden, recipe.width))
        self.gene = nn.Parameter(uniform(members, genes, recipe.width))

    def forward(self, hidden_mbh: torch.Tensor, target_mbg: torch.Tensor) -> torch.Tensor:
        """Return each member's loss, M."""
        image = F.normalize(torch.bmm(hidden_mbh, self.image), dim=-1)
        gene = F.normalize(torch.bmm(target_mbg, self.gene), dim=-1)
        logits = torch.bmm(image, gene.mT) / self.temperature
        alike = (torch.bmm(image, image.mT) + torch.bmm(gene, gene.mT)).detach() / (2 * self.temperature)
        soft = alike.softmax(-1)
        one_way = -(soft * logits.log_softmax(-1)).sum(-1)
        other_way = -(soft * logits.mT.log_softmax(-1)).sum(-1)
        return (one_way + other_way).mean(-1) / 2
