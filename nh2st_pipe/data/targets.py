"""From raw counts to what is predicted (Qu et al. 2025): scaling, log, smoothing.

Letters: n spots, G genes of the panel. Genes are joined by name; a gene that a slide does not have is NaN there,
never zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["targets"]


def targets(slide: SlideData, panel: Sequence[str], recipe: TargetRecipe) -> NDArray[np.float32]:
    """Return the target values of one slide, n × G, float32; NaN for genes the slide does not have."""
    if slide.counts is None:
        raise TrainError(f"slide {slide.slide_id} has no expression in the store")
    place = {gene: i for i, gene in enumerate(slide.genes)}
    present = np.array([gene in place for gene in panel])
    columns = [place[gene] for gene in panel if gene in place]
    values = slide.counts[:, columns].toarray().astype(np.float64)
    if recipe.scale_to is not None:
        sums = values.sum(axis=1, keepdims=True)
        values *= recipe.scale_to / np.where(sums > 0, sums, 1.0)
    if recipe.log != "none":
        values = np.log10(values + 1) if recipe.log == "log10" else np.log1p(values)
    if recipe.smooth == "grid8":
        values = _grid_mean(slide) @ values
    out = np.full((len(slide), len(panel)), np.nan, np.float32)
    out[:, present] = values
    return out


def _grid_mean(slide: SlideData) -> sp.csr_matrix:
    """Return the n × n matrix that takes the mean over each spot and its up to eight grid neighbours."""
    if slide.array_row is None or slide.array_col is None:
        raise TrainError(
            f"slide {slide.slide_id} has no array_row and array_col, which smoothing over grid neighbours needs; "
            "add them to the .h5ad's obs, or train with --set targets.smooth=none"
        )
    grid = np.column_stack((slide.array_row, slide.array_col)).astype(np.float64)
    pairs = cKDTree(grid).query_pairs(1.0, p=np.inf, output_type="ndarray")
    n = len(slide)
    own = np.arange(n)
    i, j = np.concatenate((pairs[:, 0], pairs[:, 1], own)), np.concatenate((pairs[:, 1], pairs[:, 0], own))
    near = sp.csr_matrix((np.ones(len(i)), (i, j)), shape=(n, n))
    return sp.csr_matrix(sp.diags(1 / np.asarray(near.sum(axis=1)).ravel()) @ near)
