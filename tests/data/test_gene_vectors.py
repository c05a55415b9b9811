from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.gene_vectors import read_gene_vectors, vectors_sha256

GENES = ["ERBB2", "GNAS", "CD3E"]
VALUES = np.array([[1, 2], [3, 4], [5, 6.5]], np.float32)


def table(path: Path) -> pl.DataFrame:
    return pl.DataFrame({"": GENES, "0": VALUES[:, 0].tolist(), "1": VALUES[:, 1].tolist()})


def as_h5ad(path: Path) -> None:
    anndata.AnnData(VALUES, obs=pd.DataFrame(index=GENES)).write_h5ad(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "of.csv": lambda path: table(path).write_csv(path),
    "of.tsv": lambda path: table(path).write_csv(path, separator="\t"),
    "of.parquet": lambda path: table(path).rename({"": "gene"}).write_parquet(path),
    "of.txt": lambda path: path.write_text("3 2\nERBB2 1 2\nGNAS 3 4\nCD3E 5 6.5\n"),
    "of.vec": lambda path: path.write_text("ERBB2 1 2\nGNAS 3 4\n\nCD3E 5 6.5\n"),
    "of.npz": lambda path: np.savez(path, genes=np.array(GENES), vectors=VALUES),
    "of.h5ad": as_h5ad,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_vectors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = read_gene_vectors(path)
    assert found.genes == tuple(GENES)
    assert np.array_equal(found.values, VALUES)
    assert np.array_equal(found.of(["CD3E", "ERBB2"]), VALUES[[2, 0]])
    assert "GNAS" in found
    assert "TP53" not in found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("of.csv", "gene,a\nX,1\nX,2\n", "genes twice: X"),
        ("of.csv", "gene,a,b\nX,1,high\n", "numbers in all others: not so in b"),
        ("of.csv", "gene,a\nX,1\nY,\n", "no number, for Y"),
        ("of.csv", "gene,a\n,1\n", "1 rows have no gene's name"),
        ("of.csv", "gene\nX\n", "hold none"),
        ("of.csv", "", "of.csv cannot be read"),
        ("of.txt", "X 1 2\nY 1\n", r"are of 2 numbers, and not so in the line of Y \(1 numbers\)"),
        ("of.txt", "X 1 two\n", "of.txt cannot be read"),
        ("of.npz", "no archive", "of.npz cannot be read"),
        ("of.xlsx", "", "of.xlsx: .csv, .tsv"),
    ],
)
def test_what_is_no_table_of_vectors_is_refused_by_name(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_gene_vectors(path)


def test_a_file_that_is_not_there_or_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "of.csv"
    with pytest.raises(UsageError, match=r"of\.csv cannot be read: No such file"):
        read_gene_vectors(path)
    table(path).write_csv(path)
    known = vectors_sha256(path)
    assert read_gene_vectors(path, known).genes == tuple(GENES)
    path.write_text(path.read_text().replace("6.5", "7.5"))
    with pytest.raises(TrainError, match=r"of\.csv have changed"):
        read_gene_vectors(path, known)
    assert read_gene_vectors(path).values[2, 1] == 7.5


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('run')",)

    for name, data in (("of.pickle", pickle.dumps(Bomb())), ("of.npz", b"")):
        path = tmp_path / name
        if data:
            path.write_bytes(data)
        else:
            np.savez(path, genes=np.array([Bomb()], dtype=object), vectors=VALUES[:1])
        with pytest.raises(UsageError, match="pickle"):
            read_gene_vectors(path)
