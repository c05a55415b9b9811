"""Exact search: queries held against every vector of an index, which is read once, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.searching.index import IndexedSlide

__all__ = ["Found", "nearest_tiles", "slide_distance"]

_ROWS = 65_536
Found = list[tuple[float, str, int]]
"""Likeness (a cosine), slide and row, the likest first."""


def nearest_tiles(
    queries: NDArray[np.float16],
    slides: Iterable[IndexedSlide],
    k: int,
    mask_of: Callable[[IndexedSlide], NDArray[np.bool_] | None] = lambda _: None,
) -> list[Found]:
    """Return the `k` likest tiles of each of q × d queries. `mask_of` a slide says which of its tiles may be found."""
    asked = torch.from_numpy(queries.astype(np.float32))
    best = torch.full((len(asked), 0), 0.0)
    ids = torch.zeros((len(asked), 0), dtype=torch.int64)
    starts, names, total = list[int](), list[str](), 0
    waiting, width = list[tuple[NDArray[np.float16], NDArray[np.int64]]](), 0

    def hold() -> None:
        nonlocal best, ids, waiting, width
        if not waiting:
            return
        vectors = torch.from_numpy(np.concatenate([part for part, _ in waiting])).float()
        numbers = torch.from_numpy(np.concatenate([rows for _, rows in waiting]))
        like = asked @ vectors.T
        top = like.topk(min(k, like.shape[1]), dim=1)
        both, which = torch.cat((best, top.values), dim=1), torch.cat((ids, numbers[top.indices]), dim=1)
        kept = both.topk(min(k, both.shape[1]), dim=1)
        best, ids = kept.values, which.gather(1, kept.indices)
        waiting, width = [], 0

    for slide in slides:
        starts.append(total)
        names.append(slide.slide_id)
        mask, vectors = mask_of(slide), slide.vectors()
        rows = np.arange(slide.tiles) if mask is None else np.flatnonzero(mask)
        for at in range(0, len(rows), _ROWS):
            some = rows[at : at + _ROWS]
            part = vectors[some[0] : some[-1] + 1] if len(some) == some[-1] - some[0] + 1 else vectors[some]
            waiting.append((np.asarray(part), some + total))
            width += len(some)
            if width >= _ROWS:
                hold()
        total += slide.tiles
    hold()
    found = list[Found]()
    for likeness, row_ids in zip(best.tolist(), ids.tolist(), strict=True):
        of = np.searchsorted(starts, row_ids, side="right") - 1
        found.append([(like, names[s], row - starts[s]) for like, row, s in zip(likeness, row_ids, of, strict=True)])
    return found


def slide_distance(queries: NDArray[np.float16], slide: IndexedSlide) -> float:
    """Return how far a slide is from another's tiles q × d: the median over these of 1 − the cosine to the likest.

    As Yottixel holds slides against each other (Kalra et al., Medical Image Analysis 65, 2020).
    """
    asked = torch.from_numpy(queries.astype(np.float32))
    best = torch.full((len(asked),), -2.0)
    vectors = slide.vectors()
    for start in range(0, len(vectors), _ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + _ROWS])).float()
        best = torch.maximum(best, (asked @ block.T).max(dim=1).values)
    return float((1 - best).median())
