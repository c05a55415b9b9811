"""From raw counts to what is predicted (Qu et al. 2025): gene panel, scaling, log, smoothing.

Letters: n spots, G genes of the panel. Genes are joined by name; a gene that a slide does not have is NaN there,
never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import TrainError, UsageError, listed
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["choose_panel", "read_gene_file", "targets"]


def read_gene_file(path: Path) -> tuple[str, ...]:
    """Return the genes of a text file, one a line; empty lines and lines beginning with # are passed over."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the gene file {path} cannot be read: {error}") from error
    genes = [line for line in lines if line and not line.startswith("#")]
    twice = sorted({gene for gene in genes if genes.count(gene) > 1})
    if twice:
        raise UsageError(f"the gene file {path} names genes twice: {listed(twice)}")
    if not genes:
        raise UsageError(f"the gene file {path} names no genes; it should hold one a line")
    return tuple(genes)


def choose_panel(slides: Sequence[SlideData], recipe: TargetRecipe) -> list[str]:
    """Return the gene panel for training on `slides`.

    A list in the recipe is taken as it is, and each of its genes must be in some training slide. A number takes
    the genes with the highest mean raw count over all spots of `slides`, among those that every one of them
    has; fewer where there are no more. Ties go to the gene that stands first in the first slide.
    """
    if not isinstance(recipe.genes, int):
        known = {gene for slide in slides for gene in slide.genes}
        unknown = [gene for gene in recipe.genes if gene not in known]
        if unknown:
            raise TrainError(f"{len(unknown)} genes of the panel are in no training slide: {listed(unknown)}")
        return list(recipe.genes)
    common = set(slides[0].genes).intersection(*(slide.genes for slide in slides[1:]))
    genes = [gene for gene in slides[0].genes if gene in common]
    if not genes:
        raise TrainError(f"slides {listed(slide.slide_id for slide in slides)} have no gene in common")
    total = np.zeros(len(genes))
    for slide in slides:
        assert slide.counts is not None
        place = {gene: i for i, gene in enumerate(slide.genes)}
        sums = np.asarray(slide.counts.sum(axis=0), dtype=np.float64).ravel()
        total += sums[[place[gene] for gene in genes]]
    best = np.argsort(-total, kind="stable")[: recipe.genes]
    return [genes[i] for i in best]


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
