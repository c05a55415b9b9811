"""Gene sets (GMT) as maps: the mean of a set's genes, each standardised on the slide.

What is shown is a pattern, not a level: standardised values have a mean of 0 on every slide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError, reason_of

__all__ = ["PREFIX", "GeneSet", "read_gmt", "score_of"]

PREFIX = "set: "
_FEWEST = 2


@dataclass(frozen=True)
class GeneSet:
    """A set of genes."""

    name: str
    genes: tuple[str, ...]

    def of(self, known: Sequence[str], doubted: Collection[str]) -> tuple[list[int], str]:
        """Return the places of its genes among those that are `known`, and in words which these are; none where there
        are fewer than two. Those that are `doubted`, as they are not to be trusted, are left out.
        """
        place = {gene: i for i, gene in enumerate(known)}
        there = [gene for gene in self.genes if gene in place]
        used = [place[gene] for gene in there if gene not in doubted]
        less = f", {len(there) - len(used):,} left out that are not to be trusted" if len(used) < len(there) else ""
        words = f"{len(used):,} of its {len(self.genes):,} genes{less}"
        return (used if len(used) >= _FEWEST else []), words


def read_gmt(path: str | Path) -> list[GeneSet]:
    """Read gene sets: a line each, name, description and genes with tabs between them (MSigDB's format).

    Raises UsageError naming the file and the line that is none, or that has a name a second time.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the gene sets {path} cannot be read: {reason_of(error)}") from error
    found: dict[str, GeneSet] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = (cell.strip() for cell in line.split("\t"))
        genes = tuple(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not name or not genes:
            raise UsageError(
                f"{path}, line {number}, is no gene set: a name, a description and genes, with tabs between them, "
                "are expected"
            )
        if name in found:
            raise UsageError(f"{path}, line {number}: there is a gene set {name} already")
        found[name] = GeneSet(name, genes)
    if not found:
        raise UsageError(f"{path} holds no gene set")
    return list(found.values())


def score_of(values: NDArray[np.float32], places: Mapping[str, list[int]]) -> NDArray[np.float32]:
    """Return the score n × S of each set: the mean over its genes' columns of `values` (n × G), each with mean 0 and
    standard deviation 1 on the slide. A gene without values, or that does not vary, counts as not there; NaN where
    none is left.
    """
    scores = np.full((len(values), len(places)), np.nan, np.float32)
    for number, columns in enumerate(places.values() if len(values) else ()):
        some = values[:, columns].astype(np.float64)
        some = some[:, np.isfinite(some).all(axis=0)]
        spread = some.std(axis=0)
        some, spread = some[:, spread > 0], spread[spread > 0]
        if some.shape[1]:
            scores[:, number] = ((some - some.mean(axis=0)) / spread).mean(axis=1)
    return scores
