"""Genes left out in turn, beside slides: what a head says of genes that it never saw, on slides that it never saw.

The panel's genes are dealt into folds; in each, the head is trained on the others alone. Genes that are left out are
predicted by query: from their vectors in a file, with no count of them read, or, where there is none, from vectors
that training slides' counts give them (`heads.query`). Beside it: the mean of the predictions of the k genes whose
vectors are most alike, and the mean of those of all genes, which anything that follows the tissue reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.folds import Fold, kfold
from nh2st_pipe.data.gene_vectors import GeneVectors, read_gene_vectors
from nh2st_pipe.data.study import Study
from nh2st_pipe.data.targets import Targets
from nh2st_pipe.evaluation.judged import Judged, judge
from nh2st_pipe.evaluation.unseen import ALL, NEAREST, QUERY
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.query import Query, standardised
from nh2st_pipe.recipes.train import QueryHead, TrainRecipe
from nh2st_pipe.training.choosing import choose

__all__ = ["leave_genes_out", "nearest_genes"]

N_NEAREST = 10
"""k."""

_FEWEST_SEEN = 2


def leave_genes_out(
    study: Study,
    recipe: TrainRecipe,
    fold: Fold,
    panel: Sequence[str],
    truth: Mapping[str, Targets],
    tell: Callable[[str], None],
) -> dict[str, list[Judged]]:
    """Return the judged test slides of `fold` by what predicted the genes that were left out (`evaluation.unseen`).

    `truth` are the targets of `panel`. Genes without a vector are not in them.
    """
    assert recipe.leave_genes_out is not None
    assert isinstance(recipe.head, QueryHead)
    ordered, k = sorted(panel), recipe.leave_genes_out
    if len(ordered) - -(-len(ordered) // k) < _FEWEST_SEEN:
        raise TrainError(f"{len(ordered)} genes cannot be left out in {k} folds: too few are left to train on")
    file, patients = recipe.head.vectors, {name: slide.patient for name, slide in study.slides.items()}
    vectors = None if file is None else read_gene_vectors(Path(file), recipe.head.vectors_sha256)
    column = {gene: i for i, gene in enumerate(panel)}
    parts: dict[str, dict[str, list[Judged]]] = {of: {name: [] for name in fold.test} for of in (QUERY, NEAREST, ALL)}
    for number, places in enumerate(kfold(len(ordered), k, recipe.seed), start=1):
        out = [ordered[i] for i in places if vectors is None or ordered[i] in vectors]
        left = {ordered[i] for i in places}
        seen = [gene for gene in panel if gene not in left]
        if not out:
            continue
        words = f"{fold.name}, genes left out {number} of {k}"
        tell(words)
        train = study.samples(fold.train, recipe, study.targets(fold.train, seen, recipe))
        chosen = choose(recipe, train, patients, seen, lambda more, w=words: tell(f"{w}, {more}"))  # type: ignore[misc]
        model = registry.fit(recipe.chosen(chosen) if recipe.choose else recipe, train, seen, {}).model
        assert isinstance(model, Query)
        if vectors is None:
            of_others = study.samples(fold.train, recipe, study.targets(fold.train, out, recipe))
            asked = model.taught(train, of_others, out)
        else:
            asked = model.asking(out)
        near = nearest_genes(asked, seen, out, vectors)
        columns = [column[gene] for gene in out]
        for name in fold.test:
            slide = study.slides[name]
            said = asked.predict_spots(study.samples([name], recipe, None)).values
            own, others = said[:, : len(seen)], said[:, len(seen) :]
            by = {
                QUERY: others,
                NEAREST: np.stack([own[:, rows].mean(axis=1) for rows in near], axis=1),
                ALL: np.repeat(own.mean(axis=1)[:, None], len(out), axis=1),
            }
            for of, values in by.items():
                found = judge(
                    values,
                    truth[name].values[:, columns],
                    slide.xy,
                    slide_id=slide.slide_id,
                    patient=slide.patient,
                    genes=out,
                    fold=fold.name,
                    block=slide.block,
                    points=0,
                )
                parts[of][name].append(found)
    return {of: [_joined(slides[name]) for name in fold.test if slides[name]] for of, slides in parts.items()}


def nearest_genes(
    asked: Query, seen: Sequence[str], out: Sequence[str], vectors: GeneVectors | None
) -> list[NDArray[np.int64]]:
    """Return, for each gene of `out`, the places in `seen` of the k whose vectors have the highest cosine with its own.

    `asked` predicts `seen` and then `out`; without `vectors` of a file, its loadings are compared.
    """
    if vectors is None:
        profiles = asked.profiles()
        known, own, others = np.arange(len(seen)), profiles[: len(seen)], profiles[len(seen) :]
    else:
        known = np.array([i for i, gene in enumerate(seen) if gene in vectors])
        raw = vectors.of(gene for gene in seen if gene in vectors)
        scaled = standardised(raw)
        own, others = scaled.of(raw), scaled.of(vectors.of(out))
    like = _unit(others) @ _unit(own).T
    return [known[np.argsort(-row, kind="stable")[:N_NEAREST]] for row in like]


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.sqrt((values**2).sum(axis=1, keepdims=True))
    return np.asarray(values / np.where(length > 0, length, 1.0))


def _joined(parts: Sequence[Judged]) -> Judged:
    """Return one slide's genes, judged in parts, side by side."""
    first = parts[0]
    pcc, mse, mae, mean, spread = (
        np.concatenate([getattr(each, name) for each in parts]) for name in ("pcc", "mse", "mae", "mean", "null_spread")
    )
    return Judged(
        slide_id=first.slide_id,
        patient=first.patient,
        fold=first.fold,
        block=first.block,
        genes=tuple(gene for each in parts for gene in each.genes),
        n_spots=first.n_spots,
        pcc=pcc,
        mse=mse,
        mae=mae,
        mean=mean,
        picked=first.picked,
        null_spread=spread,
        null_top50=None,
        off=None,
    )
