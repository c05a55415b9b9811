"""Which genes are predicted: a list of the user's, or the most expressed or most variable of the training slides."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError, UsageError, fault_of, listed, nearest
from nh2st_pipe.core.tables import read_text
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["choose_panel", "genes_named", "read_gene_file"]

_HEADERS = ("gene", "genes", "gene_name", "gene_names", "gene_symbol", "symbol")

_FILES = (".txt", ".csv", ".tsv", ".json")

_SEEN_IN = 0.01
"""Share of the spots in which a gene has to be seen, for its dispersion to say anything."""


def read_gene_file(path: Path) -> tuple[str, ...]:
    """Return the genes of a text file, one a line; empty lines, a header and lines beginning with # are passed over.

    Of a JSON file the list in it, or that called "genes", as in HEST-Benchmark's var_50genes.json.
    """
    text = read_text(path, UsageError)
    if path.suffix == ".json":
        with fault_of(UsageError, f"the gene file {path} is no JSON with a list of genes"):
            values = json.loads(text)
            named = values["genes"] if isinstance(values, dict) else values
            lines = [str(name) for name in named] if isinstance(named, list) else []
    else:
        lines = [line.strip().strip('"') for line in text.splitlines()]
    genes = [line for line in lines if line and not line.startswith("#")]
    if genes and genes[0].lower() in _HEADERS:
        del genes[0]
    twice = sorted({gene for gene in genes if genes.count(gene) > 1})
    if twice:
        raise UsageError(f"the gene file {path} names genes twice: {listed(twice)}")
    if not genes:
        raise UsageError(f"the gene file {path} names no genes; it should hold one a line")
    return tuple(genes)


def genes_named(wanted: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return genes, each once, as --genes names them: with commas between them, or a file with one a line.

    Raises UsageError where it names none, or what is called like a file is none.
    """
    if isinstance(wanted, Path) or (isinstance(wanted, str) and Path(wanted).is_file()):
        return read_gene_file(Path(wanted))
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else wanted
    found = tuple(dict.fromkeys(name for name in names if name))
    if not found:
        raise UsageError("--genes names no gene")
    if len(found) == 1 and Path(found[0]).suffix in _FILES:
        raise UsageError(f"there is no gene file {found[0]}")
    return found


def choose_panel(slides: Sequence[SlideData], recipe: TargetRecipe, others: Sequence[SlideData] = ()) -> list[str]:
    """Return the gene panel for training on `slides`.

    Of a list in the recipe, the genes that some training slide has are taken; one that neither these nor the `others`
    of the study have is an error. A number takes that
    many of the genes that every slide has, by the recipe's rule, fewer where there are no more; "all" takes all of
    them, in the same order. Ties go to the gene that stands first in the first slide.
    """
    if isinstance(recipe.genes, tuple):
        known = {gene for slide in slides for gene in slide.genes}
        anywhere = known.union(*(slide.genes for slide in others))
        unknown = [gene for gene in recipe.genes if gene not in anywhere]
        if unknown:
            like = nearest(unknown[0], anywhere)
            raise TrainError(f"{len(unknown)} genes of the panel are in no slide: {listed(unknown)}{like}")
        panel = [gene for gene in recipe.genes if gene in known]
        if not panel:
            raise TrainError(f"slides {listed(slide.slide_id for slide in slides)} have none of the panel's genes")
        return panel
    common = set(slides[0].genes).intersection(*(slide.genes for slide in slides[1:]))
    genes = [gene for gene in slides[0].genes if gene in common]
    if not genes:
        raise TrainError(_none_in_common(slides))
    score = (_mean_counts if recipe.panel == "mean" else _dispersion)(slides, genes)
    best = np.argsort(-score, kind="stable")[: None if recipe.genes == "all" else recipe.genes]
    return [genes[i] for i in best if np.isfinite(score[i])]


_ENSEMBL = re.compile(r"ENS[A-Z]{0,4}G\d{6,}")


def _none_in_common(slides: Sequence[SlideData]) -> str:
    """Say how slides name their genes where they have none in common: mostly they are called in two ways."""
    ways = dict[str, SlideData]()
    for slide in slides:
        by_id = sum(_ENSEMBL.match(gene) is not None for gene in slide.genes) > len(slide.genes) / 2
        ways.setdefault("Ensembl's ids" if by_id else "symbols", slide)
    kinds = list(ways.items()) if len(ways) > 1 else [("", slide) for slide in slides[:2]]
    shown = " and ".join(
        f"{slide.slide_id} has {f'{kind}, as ' if kind else ''}{listed(slide.genes, 3)}" for kind, slide in kinds
    )
    do = "; write the same kind of name into var_names of each .h5ad" if len(ways) > 1 else "; are they of one species?"
    return f"slides {listed(slide.slide_id for slide in slides)} have no gene in common: {shown}{do}"


def _columns(slide: SlideData, genes: list[str]) -> tuple[sp.csr_matrix, NDArray[np.int64]]:
    """Return a slide's counts and the columns of `genes` in them."""
    place = {gene: i for i, gene in enumerate(slide.genes)}
    return slide.counted(), np.array([place[gene] for gene in genes], dtype=np.int64)


def _of_spots(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()


def _mean_counts(slides: Sequence[SlideData], genes: list[str]) -> NDArray[np.float64]:
    total, n = np.zeros(len(genes)), 0
    for slide in slides:
        counts, columns = _columns(slide, genes)
        total += np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()[columns]
        n += len(slide)
    return total / max(n, 1)


def _dispersion(slides: Sequence[SlideData], genes: list[str]) -> NDArray[np.float64]:
    """Return variance over mean of each gene's scaled counts over all spots; −∞ for genes that are hardly seen."""
    sums = np.concatenate([_of_spots(slide.counted()) for slide in slides])
    middle = float(np.median(sums[sums > 0])) if (sums > 0).any() else 1.0
    total, squares, seen = np.zeros(len(genes)), np.zeros(len(genes)), np.zeros(len(genes))
    for slide in slides:
        counts, columns = _columns(slide, genes)
        of_spot = _of_spots(counts)
        scaled = sp.csr_matrix(sp.diags(middle / np.where(of_spot > 0, of_spot, 1.0)) @ counts.astype(np.float64))
        total += np.asarray(scaled.sum(axis=0)).ravel()[columns]
        squares += np.asarray(scaled.multiply(scaled).sum(axis=0)).ravel()[columns]
        seen += np.asarray((counts > 0).sum(axis=0)).ravel()[columns]
    mean = total / len(sums)
    variance = squares / len(sums) - mean**2
    often = seen >= _SEEN_IN * len(sums)
    return np.where(often, variance / np.where(mean > 0, mean, 1.0), -np.inf)
