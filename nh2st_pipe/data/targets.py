"""From raw counts to what is predicted (Qu et al. 2025): scaling, log, smoothing.

Letters: n spots, G genes of the panel. Genes are joined by name; a gene that a slide does not have is NaN there,
never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.smoothing import grid_mean
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["Targets", "targets"]


@dataclass(frozen=True)
class Targets:
    """The targets of one slide."""

    values: NDArray[np.float32]
    """n × G: what is judged."""
    raw: NDArray[np.float32]
    """n × G: the same before smoothing; `values` itself where nothing is smoothed."""
    depth: NDArray[np.float64]
    """n: each spot's counts over all genes that slides have in common."""


def targets(
    slide: SlideData, panel: Sequence[str], recipe: TargetRecipe, common: Sequence[str] | None = None
) -> Targets:
    """Return the targets of one slide; NaN for genes the slide does not have.

    `common` are the genes that its counts are scaled over, where slides measure different ones: those of them that it
    has. None takes all of its own.
    """
    if slide.counts is None:
        raise TrainError(f"slide {slide.slide_id} has no expression in the store")
    place = {gene: i for i, gene in enumerate(slide.genes)}
    present = np.array([gene in place for gene in panel])
    if not present.any():
        raise TrainError(
            f"slide {slide.slide_id} has none of the {len(panel)} genes of the panel; leave it out of the manifest, or "
            "give genes under the names that its expression file has"
        )
    columns = [place[gene] for gene in panel if gene in place]
    values = slide.counts[:, columns].toarray().astype(np.float64)
    of_all = recipe.scale_to is not None and recipe.scale_over == "all"
    depth = _depth(slide, place, common, needed=of_all)
    if recipe.scale_to is not None:
        sums = depth if of_all else values.sum(axis=1)
        values *= (recipe.scale_to / np.where(sums > 0, sums, 1.0))[:, None]
    if recipe.log != "none":
        values = np.log10(values + 1) if recipe.log == "log10" else np.log1p(values)

    def whole(of_present: NDArray[np.float64]) -> NDArray[np.float32]:
        out = np.full((len(slide), len(panel)), np.nan, np.float32)
        out[:, present] = of_present
        return out

    raw = whole(values)
    if recipe.smooth == "none":
        return Targets(raw, raw, depth)
    if slide.grid is None:
        raise TrainError(
            f"slide {slide.slide_id} has no array_row and array_col, which smoothing over grid neighbours needs; "
            "add them to the .h5ad's obs, or train with --set targets.smooth=none"
        )
    return Targets(whole(grid_mean(slide.grid) @ values), raw, depth)


def _depth(
    slide: SlideData, place: Mapping[str, int], common: Sequence[str] | None, *, needed: bool
) -> NDArray[np.float64]:
    """Return each spot's counts over the genes `common` that the slide has (None: over all of its own), n.

    Where it has none of them, over its own too, unless they are `needed`: values are scaled by it then.
    """
    counts = slide.counts
    assert counts is not None
    if common is not None and len(common) < len(slide.genes):
        columns = [place[gene] for gene in common if gene in place]
        if not columns and needed:
            raise TrainError(
                f"slide {slide.slide_id} has none of the {len(common)} genes that counts are scaled over; leave it out "
                "of the manifest, or train with --set targets.scale_over=panel"
            )
        counts = counts[:, columns] if columns else counts
    return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
