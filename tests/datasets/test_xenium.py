"""Xenium's bundles as its versions write them."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.datasets.generated import GENES, Tissue, xenium
from tests.datasets.test_layouts import bring, spots


@pytest.mark.parametrize("way", ["csv.gz", "csv", "bytes", "is_gene"])
def test_transcripts_are_read_as_any_version_writes_them(tmp_path: Path, way: str) -> None:
    """Version 1 had text, and names as bytes in Parquet; version 3 has Parquet alone, and says what is a gene."""
    folder, said = xenium(tmp_path / "data"), list[str]()
    path = folder / "A1/outs/transcripts.parquet"
    table = pl.read_parquet(path)
    if way == "bytes":
        table.with_columns(pl.col("feature_name").cast(pl.Binary)).write_parquet(path)
    elif way == "is_gene":
        gene = pl.col("feature_name")
        named = gene.replace({"NegControlProbe_1": "Intergenic_Region_1", "BLANK_7": "Odd_probe"})
        table.with_columns(is_gene=~gene.str.contains("NegControl|BLANK"), feature_name=named).write_parquet(path)
    else:
        path.unlink()
        text = table.write_csv().encode()
        (path.parent / f"transcripts.{way}").write_bytes(gzip.compress(text) if way.endswith("gz") else text)
    data = spots(bring("xenium", folder, look=False, said=said), "A1")
    assert sorted(data.var_names) == sorted(GENES)
    assert data.X.sum() == Tissue(0).counts.sum()
    assert "2 transcripts of control probes left out; 1 transcripts of a quality below 20 left out" in said[0]


@pytest.mark.parametrize("way", ["csv.gz", "numbers", "bytes"])
def test_cells_are_read_as_any_version_writes_them(tmp_path: Path, way: str) -> None:
    folder, said = xenium(tmp_path / "data"), list[str]()
    outs = folder / "A1/outs"
    cells = pl.read_parquet(outs / "cells.parquet")
    if way == "csv.gz":
        (outs / "cells.parquet").unlink()
        (outs / "cells.csv.gz").write_bytes(gzip.compress(cells.write_csv().encode()))
    elif way == "bytes":
        cells.with_columns(pl.col("cell_id").cast(pl.Binary)).write_parquet(outs / "cells.parquet")
    else:  # as version 1 counted them
        number = pl.col("cell_id").str.extract(r"cell(\d+)-1").cast(pl.Int64)
        cells.with_columns(number).write_parquet(outs / "cells.parquet")
        with h5py.File(outs / "cell_feature_matrix.h5", "a") as file:
            n = len(file["matrix/barcodes"])
            del file["matrix/barcodes"]
            file["matrix/barcodes"] = np.array([str(i) for i in range(n)], "S")
    data = spots(bring("xenium", folder, look=False, where={"cells_um": "100"}, said=said), "A1")
    assert data.X.sum() == Tissue(0).counts.sum()
    assert sorted(data.var_names) == sorted(GENES)
    assert "features that are no genes left out: 1 control probes" in said[0]


def test_features_of_cells_are_genes_by_their_type(tmp_path: Path) -> None:
    """Xenium with proteins: an antibody has a gene's name."""
    folder = xenium(tmp_path / "data")
    with h5py.File(folder / "A1/outs/cell_feature_matrix.h5", "a") as file:
        types = ["Gene Expression"] * (len(GENES) - 1) + ["Protein Expression", "Negative Control Codeword"]
        file["matrix/features/feature_type"] = np.array(types, "S")
    data = spots(bring("xenium", folder, look=False, where={"cells_um": "100"}), "A1")
    assert sorted(data.var_names) == sorted(GENES[:-1])


def test_cells_without_counts_and_counts_without_cells_are_both_counted(tmp_path: Path) -> None:
    folder, said = xenium(tmp_path / "data"), list[str]()
    path = folder / "A1/outs/cells.parquet"
    cells = pl.read_parquet(path)
    more = pl.DataFrame({"cell_id": ["x-1"], "x_centroid": [5], "y_centroid": [5]})
    pl.concat([cells[:-3], more]).write_parquet(path)
    bring("xenium", folder, look=False, where={"cells_um": "100"}, said=said)
    assert "cells: 3 with counts and without a place left out; cells: 1 with a place and without counts" in said[0]


def test_a_bundle_without_transcripts_or_cells_says_what_it_lacks(tmp_path: Path) -> None:
    folder = xenium(tmp_path / "data", cells=False)
    (folder / "A1/outs/transcripts.parquet").unlink()
    with pytest.raises(ExpressionError, match=r"cells\.parquet is missing"):
        bring("xenium", folder, look=False)
