"""Which genes to trust on a new slide: their PCC between halves of the training tissue.

A head is trained on one half of every slide but those of one group, and judged on the other half of that group's
slides, for each group and both ways round. Tissue, stain and place all differ between what is trained on and what is
judged, as they will on a new slide, and more so than where whole slides are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.training.choosing import by_slide, left_out, right_of, some_slides

__all__ = ["half_pcc"]

_FEWEST_SPOTS = 8  # of a half, for a correlation over them to say anything


def half_pcc(
    recipe: TrainRecipe, train: Samples, patients: dict[str, str], panel: list[str], tell: Callable[[str], None]
) -> dict[str, float | None]:
    """Return each gene's mean PCC over the halves that were judged, None where it is defined in none.

    Empty for heads that cannot be trained that often (`HeadRecipe.in_brief`). A single slide's halves are each judged
    by the other. Of very many slides some are taken (`some_slides`).
    """
    brief = recipe.head.in_brief()
    if brief is None or any(part.stop - part.start < 2 * _FEWEST_SPOTS for part in train.parts):
        return {}
    recipe = recipe.model_copy(update={"head": brief, "choose": {}})
    some = some_slides(train, patients, recipe.seed)
    if len(some) < len(train.parts):
        kept = torch.zeros(len(train), dtype=torch.bool, device=train.device)
        for part in train.parts:
            kept[part.rows] = part.name in some
        train = train.subset(kept)
    right = right_of(train, 0.5)
    every = torch.ones_like(right)
    groups = (
        [(every, every)] if len(train.parts) == 1 else [(~out, out) for out in left_out(train, patients, recipe.seed)]
    )
    found = []
    for i, (kept, out) in enumerate(groups):
        for j, side in enumerate((right, ~right)):
            tell(f"halves of the tissue, {2 * i + j + 1}/{2 * len(groups)}")
            learnt, judged = train.subset(kept & side), train.subset(out & ~side)
            model = registry.fit(recipe, learnt, panel, {}).model
            found += [gene_metrics(predicted, truth)["pcc"] for predicted, truth in by_slide(model, judged)]
    every_pcc = np.stack(found)
    known = np.isfinite(every_pcc)
    mean = np.where(known, every_pcc, 0).sum(0) / np.maximum(known.sum(0), 1)
    return {gene: float(m) if k else None for gene, m, k in zip(panel, mean, known.sum(0), strict=True)}
