"""Fifty genes for a mean over the best, picked where nothing is judged: on the training slides.

Papers give the mean PCC of the 50 genes that are predicted best on the test fold; those it picks reach 0.4 and more on
maps that have nothing to do with the tissue. Here they are those that retrieval (the baseline knn) predicts best where
training slides are left out in turn: the same genes for every head, and no head's own choice.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.evaluation.metrics import TOP, gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.training.choosing import left_out

__all__ = ["picked_genes"]

_NEAREST, _FEWEST_NEAREST, _SHARE = 50, 3, 7  # at most a seventh of the spots, for their mean to say something
_MOST_SPOTS = 4000  # of all slides: what is ranked is genes, not spots
_FEWEST_OF_A_SLIDE = 50
_MOST_VALUES = 100_000_000  # of targets: 400 MB


def picked_genes(recipe: TrainRecipe, train: Samples, patients: dict[str, str], panel: list[str]) -> NDArray[np.int64]:
    """Return the places in `panel` of the (at most) 50 genes that are best predicted inside `train`.

    `patients` are the slides' patients by name. All genes of a panel that has no more.
    """
    if len(panel) <= TOP:
        return np.arange(len(panel))
    shared = {key: getattr(recipe, key) for key in ("targets", "features", "protocol", "seed")}
    knn = load_train_recipe("knn").model_copy(update=shared)
    some = train.subset(_drawn(train, recipe.seed), smooth_anew=False).in_memory()
    total, count = (np.zeros(len(panel)) for _ in range(2))
    for out in left_out(some, patients, recipe.seed):
        inner, watched = (some.subset(rows, smooth_anew=False) for rows in (~out, out))
        if not (len(inner) and len(watched)):
            continue
        k = max(_FEWEST_NEAREST, min(_NEAREST, len(inner) // _SHARE))
        of_k = knn.chosen({"head.k": k})
        predicted = registry.fit(of_k, inner, panel, {}).model.predict_unsmoothed(watched).values
        assert watched.target is not None
        truth = watched.target.cpu().numpy()
        for part in watched.parts:
            pcc = gene_metrics(predicted[part.rows], truth[part.rows])["pcc"]
            known = np.isfinite(pcc)
            total[known] += pcc[known]
            count += known
    mean = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    return np.sort(np.argsort(-mean, kind="stable")[:TOP])


def _drawn(train: Samples, seed: int) -> torch.Tensor:
    """Return N booleans: all spots, or as many of each slide as there may be."""
    kept = torch.ones(len(train), dtype=torch.bool)
    of_each = max(_FEWEST_OF_A_SLIDE, _MOST_SPOTS // max(1, len(train.parts)))
    draw = torch.Generator().manual_seed(seed)
    for part in train.parts:
        n = part.stop - part.start
        if n > of_each:
            kept[part.rows] = False
            kept[torch.randperm(n, generator=draw)[:of_each] + part.start] = True
    most = max(_MOST_SPOTS, _MOST_VALUES // train.n_genes)
    if int(kept.sum()) > most:  # many slides: some of them, whole as they were drawn
        for i in torch.randperm(len(train.parts), generator=draw).tolist():
            if int(kept.sum()) <= most:
                break
            kept[train.parts[i].rows] = False
    return kept.to(train.device)
