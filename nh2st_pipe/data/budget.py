"""What of a study may lie in memory: one budget for all that training holds.

Embeddings are read most often, so they come first; counts stay in the store where all does not fit, and targets are
made of them slide by slide; what a head keeps of its own (`Study.spare`) has the rest. Whatever is chosen, results are
the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nh2st_pipe.core.machine import memory
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import Store

__all__ = ["Budget", "plan", "share_of_free"]

_SHARE, _SHARE_OF_GPU = 0.6, 0.8
_FEW = 16  # slides whose counts are looked at
_COPIES = 2.2  # of targets that training holds at most: those of a study, and of the slides of a fold
_WORK = 600_000_000  # bytes that solving and judging take whatever the study
_EMBEDDINGS, _TARGETS = 0.5, 0.25  # of what there is, where it is too little


@dataclass(frozen=True)
class Budget:
    """How many bytes each thing may take; None where it may lie in memory whole."""

    embeddings: int
    targets: int | None = None
    """Beyond them they are made of counts that stay in the store."""
    spare: int | None = None
    """What a head may keep beside them."""
    words: str = ""
    """What is done otherwise than in memory, and why."""


def plan(
    store: Store,
    names: Sequence[str],
    recipe: TrainRecipe,
    device: torch.device,
    most: int | None,
    jobs: int,
    sharing: int = 1,
) -> Budget:
    """Return what training `recipe` on the slides `names` may hold of `most` bytes, what this process has now included.

    None is six tenths of what is free, divided by as many processes as are `sharing` the machine.
    """
    spots = sum(store.tiles(name) for name in names)
    views = 1 if recipe.features.views == "first" else store.contract.views
    embeddings = 2 * spots * views * store.contract.dim
    cpu = torch.device("cpu")
    allowed = share_of_free(cpu) // sharing if most is None else max(0, most - held_now() - _WORK)
    counts, genes = _counts_and_genes(store, names, spots, recipe)
    targets = int(4 * spots * genes * (1 if recipe.targets.smooth == "none" else 2) * _COPIES) * max(1, jobs)
    on_gpu = device.type == "cuda"
    beside = counts + targets
    of_embeddings = share_of_free(device) if on_gpu else max(0, allowed - beside)
    if beside + (0 if on_gpu else embeddings) <= allowed:
        spare = None if most is None else allowed - beside - (0 if on_gpu else embeddings)
        return Budget(of_embeddings, None, spare)
    if not on_gpu:
        of_embeddings = int(_EMBEDDINGS * allowed)
    rest = allowed - (0 if on_gpu else min(embeddings, of_embeddings))
    words = (
        f"counts stay in the store and targets are made slide by slide: together they take {beside / 1e9:.1f} GB, and "
        f"{allowed / 1e9:.2f} GB of memory are for all that training holds"
    )
    return Budget(of_embeddings, int(_TARGETS * rest / max(1, jobs)), int(rest / 2 / max(1, jobs)), words)


def share_of_free(device: torch.device) -> int:
    """Return how many bytes of what is free on a device a study may take: training needs room beside it."""
    if device.type == "cuda":
        return int(_SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * memory())


def held_now() -> int:
    """Return how many bytes of memory this process has."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _counts_and_genes(store: Store, names: Sequence[str], spots: int, recipe: TrainRecipe) -> tuple[int, int]:
    """Return about how many bytes counts take, and how many genes there are to be predicted; of some slides."""
    some = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _FEW).astype(int))] if names else []
    seen = sum(store.tiles(name) for name in some)
    size = sum(store.counts_size(name) for name in some)
    wanted = recipe.targets.genes
    if isinstance(wanted, tuple):
        genes = len(wanted)
    else:
        there = min((store.n_genes(name) for name in some), default=0)
        genes = there if wanted == "all" else min(wanted, there)
    return int(size * spots / max(1, seen)), genes
