"""From raw counts to what is predicted (Qu et al. 2025): scaling, log, smoothing.

Letters: n spots, G genes of the panel. Genes are joined by name; a gene that a slide does not have is NaN there,
never zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.memory import give_back
from nh2st_pipe.data.smoothing import grid_mean
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["StreamedTargets", "Targets", "TargetsOf", "targets"]


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
    return TargetsOf(slide, panel, recipe, common).made()


class TargetsOf:
    """What makes the targets of one slide, for some of the panel's genes at a time; arguments as in `targets`."""

    def __init__(
        self, slide: SlideData, panel: Sequence[str], recipe: TargetRecipe, common: Sequence[str] | None = None
    ) -> None:
        counts, place = _counts(slide), {gene: i for i, gene in enumerate(slide.genes)}
        self._recipe, self._n, self._panel = recipe, len(slide), panel
        self._place = np.array([place.get(gene, -1) for gene in panel])
        _check(slide, panel, recipe)
        self._counts = counts
        self._by_gene: sp.csc_matrix | None = None
        self.depth = _depth(slide, counts, place, common, recipe)
        self._mean = None if recipe.smooth == "none" or slide.grid is None else grid_mean(slide.grid)
        if recipe.scale_to is not None:
            sums = self.depth if _over_all(recipe) else _sums(counts[:, self._place[self._place >= 0]])
            self._scale = (recipe.scale_to / np.where(sums > 0, sums, 1.0))[:, None]

    def made(self, genes: slice = slice(None)) -> Targets:
        """Return the targets of some genes of the panel, n × g."""
        place = self._place[genes]
        present = place >= 0
        if len(place) < len(self._panel) and self._by_gene is None:
            self._by_gene = sp.csc_matrix(self._counts)
        matrix = self._counts if self._by_gene is None else self._by_gene
        values = matrix[:, place[present]].toarray().astype(np.float64)
        if self._recipe.scale_to is not None:
            values *= self._scale
        if self._recipe.log != "none":
            values = np.log10(values + 1) if self._recipe.log == "log10" else np.log1p(values)

        def whole(of_present: NDArray[np.float64]) -> NDArray[np.float32]:
            out = np.full((self._n, len(place)), np.nan, np.float32)
            out[:, present] = of_present
            return out

        raw = whole(values)
        return Targets(raw if self._mean is None else whole(self._mean @ values), raw, self.depth)

    def values(self, genes: slice) -> NDArray[np.float32]:
        """Return what is judged of some genes of the panel, n × g."""
        return self.made(genes).values


class StreamedTargets(Mapping[str, Targets]):
    """The targets of slides by name, made of their counts when they are asked for.

    `keep` is how many bytes of them stay in memory: of the first that were asked for, and of the last. `depths`, by
    slide, are taken from what is given and put there: of every panel they are the same, and counts are read for them.
    """

    def __init__(
        self,
        slides: Mapping[str, SlideData],
        panel: Sequence[str],
        recipe: TargetRecipe,
        common: Sequence[str] | None,
        keep: int,
        depths: dict[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self.panel, self._slides, self._recipe, self._common = tuple(panel), slides, recipe, common
        self._depths = {} if depths is None else depths
        self._left, self._kept = keep, dict[str, Targets]()
        self._last: tuple[str, Targets | None] = ("", None)

    def __len__(self) -> int:
        return len(self._slides)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slides)

    def __getitem__(self, name: str) -> Targets:
        found = self._kept.get(name) or (self._last[1] if self._last[0] == name else None)
        if found is None:
            found = targets(self._slides[name], self.panel, self._recipe, self._common)
            self._last = name, found
            give_back()
            size = found.values.nbytes + (0 if found.raw is found.values else found.raw.nbytes)
            if size <= self._left:
                self._kept[name], self._left = found, self._left - size
        return found

    def depth(self, name: str) -> NDArray[np.float64]:
        """Return the depth of a slide's spots, n. Raises TrainError where there can be no targets of it."""
        slide = self._slides[name]
        _check(slide, self.panel, self._recipe)
        if name not in self._depths:
            place = {gene: i for i, gene in enumerate(slide.genes)}
            self._depths[name] = _depth(slide, _counts(slide), place, self._common, self._recipe)
        return self._depths[name]

    def has(self, name: str) -> NDArray[np.bool_]:
        """Return which genes of the panel a slide has, G."""
        there = set(self._slides[name].genes)
        return np.array([gene in there for gene in self.panel])


def _counts(slide: SlideData) -> sp.csr_matrix:
    if not slide.measured:
        raise TrainError(f"slide {slide.slide_id} has no expression in the store")
    return slide.counted()


def _over_all(recipe: TargetRecipe) -> bool:
    return recipe.scale_to is not None and recipe.scale_over == "all"


def _sums(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()


def _check(slide: SlideData, panel: Sequence[str], recipe: TargetRecipe) -> None:
    """Raise TrainError where there can be no targets of a slide."""
    if set(slide.genes).isdisjoint(panel):
        raise TrainError(
            f"slide {slide.slide_id} has none of the {len(panel)} genes of the panel; leave it out of the manifest, or "
            "give genes under the names that its expression file has"
        )
    if recipe.smooth != "none" and slide.grid is None:
        raise TrainError(
            f"slide {slide.slide_id} has no array_row and array_col, which smoothing over grid neighbours needs; "
            "add them to the .h5ad's obs, or train with --set targets.smooth=none"
        )


def _depth(
    slide: SlideData,
    counts: sp.csr_matrix,
    place: Mapping[str, int],
    common: Sequence[str] | None,
    recipe: TargetRecipe,
) -> NDArray[np.float64]:
    """Return each spot's counts over the genes `common` that the slide has (None: over all of its own), n.

    Where it has none of them, over its own too, unless values are scaled by it.
    """
    if common is not None and len(common) < len(slide.genes):
        columns = [place[gene] for gene in common if gene in place]
        if not columns and _over_all(recipe):
            raise TrainError(
                f"slide {slide.slide_id} has none of the {len(common)} genes that counts are scaled over; leave it out "
                "of the manifest, or train with --set targets.scale_over=panel"
            )
        counts = counts[:, columns] if columns else counts
    return _sums(counts)
