"""Vectors of genes that somebody else made (GenePT, scGPT, Gene2vec, co-expression), read from a file.

A table has the genes' names in its first column and numbers in all others: `.csv`, `.tsv`, `.parquet`; text as word2vec
writes it (`.txt`, `.vec`: a name and its numbers, with spaces between them, maybe under a line with how many there
are). `.h5ad` has genes as observations and their vectors as X, `.npz` the arrays "genes" and "vectors". A pickle is
never read: code in it would run.

Letters: n genes of the file, k values of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError, UsageError, fault_of, listed
from nh2st_pipe.core.hashes import cache_of, remembered_sha256
from nh2st_pipe.core.tables import read_text

__all__ = ["GeneVectors", "read_gene_vectors", "vectors_sha256"]

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT = (".txt", ".vec")
_KINDS = (*_SEPARATORS, *_TEXT, ".parquet", ".h5ad", ".npz")
_PICKLES = (".pickle", ".pkl", ".pt", ".pth", ".npy")


@dataclass(frozen=True)
class GeneVectors:
    """Vectors of genes."""

    genes: tuple[str, ...]
    values: NDArray[np.float32]
    """n × k."""

    @cached_property
    def _place(self) -> dict[str, int]:
        return {gene: i for i, gene in enumerate(self.genes)}

    def __contains__(self, gene: str) -> bool:
        return gene in self._place

    def of(self, genes: Iterable[str]) -> NDArray[np.float32]:
        """Return the vectors of `genes`, len(genes) × k. Raises KeyError for one that has none."""
        return self.values[[self._place[gene] for gene in genes]]


def vectors_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of gene vectors. Raises UsageError where it cannot be read."""
    try:
        return remembered_sha256(path, cache_of(path))
    except OSError as error:
        raise UsageError(f"the gene vectors {path} cannot be read: {error.strerror or error}") from error


def read_gene_vectors(path: Path, sha256: str | None = None) -> GeneVectors:
    """Return the vectors of a file, which has to be that of `sha256` where it is given.

    Raises UsageError where it is no such file, TrainError where it is another by now.
    """
    found = vectors_sha256(path)
    if sha256 is not None and found != sha256:
        raise TrainError(f"the gene vectors {path} have changed since the training began; train anew")
    return _read(path, found)


@lru_cache(maxsize=1)
def _read(path: Path, sha256: str) -> GeneVectors:
    """Read a file once for all folds; `sha256` tells whether it is the same."""
    kind = path.suffix.lower()
    if kind in _PICKLES:
        raise UsageError(
            f"the gene vectors {path} may be a pickle, which could run code; save them as a table (.csv, .parquet): "
            "pandas.DataFrame.from_dict(vectors, orient='index').to_csv(...)"
        )
    if kind not in _KINDS:
        raise UsageError(f"the gene vectors {path}: {', '.join(_KINDS)} are read, by the name's end")
    with fault_of(UsageError, f"the gene vectors {path} cannot be read"):
        if kind == ".npz":
            genes, values = _of_arrays(path)
        elif kind == ".h5ad":
            genes, values = _of_h5ad(path)
        elif kind in _TEXT:
            genes, values = _of_text(path)
        else:
            genes, values = _of_table(path)
    return _checked(path, genes, values)


def _of_arrays(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    with np.load(path, allow_pickle=False) as arrays:
        if not {"genes", "vectors"} <= set(arrays):
            raise UsageError(f"the gene vectors {path} should hold the arrays genes and vectors, not {listed(arrays)}")
        return [str(gene) for gene in arrays["genes"]], np.asarray(arrays["vectors"], np.float32)


def _of_h5ad(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    from nh2st_pipe.core.h5ad import read_h5ad

    data = read_h5ad(path, UsageError)
    matrix = data.X
    dense = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    return [str(name) for name in data.obs_names], np.asarray(dense, np.float32)


def _of_text(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    lines = [line.split() for line in read_text(path, UsageError).splitlines() if line.strip()]
    if lines and len(lines[0]) == 2 and all(cell.isdecimal() for cell in lines[0]):
        del lines[0]  # how many genes, and how long their vectors are
    wide = len(lines[0]) if lines else 0
    odd = [f"line of {line[0]} ({len(line) - 1} numbers)" for line in lines if len(line) != wide]
    if odd:
        raise UsageError(f"the gene vectors {path} are of {wide - 1} numbers, and not so in the {listed(odd)}")
    return [line[0] for line in lines], np.array([line[1:] for line in lines], np.float32).reshape(len(lines), -1)


def _of_table(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    import polars as pl

    separator = _SEPARATORS.get(path.suffix.lower())
    table = (
        pl.read_parquet(path, glob=False)
        if separator is None
        else pl.read_csv(path, separator=separator, infer_schema_length=None, glob=False)
    )
    name, *others = table.columns
    words = [column for column in others if not table[column].dtype.is_numeric()]
    if words:
        raise UsageError(
            f"the gene vectors {path} have genes in the first column ({name or 'without a name'}), and numbers in all "
            f"others: not so in {listed(words)}"
        )
    values = table.select(pl.col(others).cast(pl.Float32)).to_numpy() if others else np.empty((len(table), 0))
    return table[name].cast(pl.String).fill_null("").to_list(), np.asarray(values, np.float32)


def _checked(path: Path, genes: list[str], values: NDArray[np.float32]) -> GeneVectors:
    if values.ndim != 2 or len(values) != len(genes):
        raise UsageError(f"the gene vectors {path}: {len(genes):,} genes, and vectors of shape {values.shape}")
    if not values.size:
        raise UsageError(f"the gene vectors {path} hold none: a gene's name, and its numbers beside it")
    unnamed = sum(not gene for gene in genes)
    if unnamed:
        raise UsageError(f"the gene vectors {path}: {unnamed:,} rows have no gene's name in the first column")
    if len(set(genes)) < len(genes):
        seen = set[str]()
        twice = [gene for gene in genes if gene in seen or seen.add(gene)]  # type: ignore[func-returns-value]
        raise UsageError(f"the gene vectors {path} have genes twice: {listed(dict.fromkeys(twice))}")
    strange = [gene for gene, row in zip(genes, values, strict=True) if not np.isfinite(row).all()]
    if strange:
        raise UsageError(f"the gene vectors {path} hold what is no number, for {listed(strange)}")
    return GeneVectors(tuple(genes), values)
