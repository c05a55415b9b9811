"""Which genes are predicted: the user's own list, or the most expressed ones of the training slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nh2st_pipe.core.errors import TrainError, UsageError, listed
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["choose_panel", "read_gene_file"]


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
