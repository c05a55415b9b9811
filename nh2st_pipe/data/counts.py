"""The raw counts of a slide's spots, left where they are until some are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nh2st_pipe.store.read import SlideData

__all__ = ["Counts"]


@dataclass(frozen=True)
class Counts:
    """Rows of a sparse matrix of counts, by gene."""

    matrix: Callable[[], sp.csr_matrix]
    """Gives all the slide's spots'."""
    genes: Sequence[str]
    rows: NDArray[np.int64]
    """Those that are meant."""

    @classmethod
    def of(cls, slide: SlideData) -> Counts | None:
        """Return those of all of a slide's spots; None where it has none."""
        return cls(slide.counted, slide.genes, np.arange(len(slide))) if slide.measured else None

    def subset(self, kept: NDArray[np.bool_]) -> Counts:
        """Return the rows that are `kept`; no count is copied."""
        return replace(self, rows=self.rows[kept])

    def values(self, rows: NDArray[np.int64], genes: Sequence[str]) -> NDArray[np.float32]:
        """Return the counts of `rows` of these, len(rows) × len(genes), NaN for genes that the slide lacks."""
        wanted = set(genes)
        place: Mapping[str, int] = {gene: i for i, gene in enumerate(self.genes) if gene in wanted}
        out = np.full((len(rows), len(genes)), np.nan, np.float32)
        have = [i for i, gene in enumerate(genes) if gene in place]
        if have:
            columns = [place[genes[i]] for i in have]
            out[:, have] = self.matrix()[self.rows[rows]][:, columns].toarray()
        return out
