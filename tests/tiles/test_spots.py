from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.tiles.spots import read_spots
from tests.conftest import GENES, write_spots

XY = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])


def test_spots_and_counts_are_joined_by_name(tmp_path: Path) -> None:
    counts = np.arange(36).reshape(3, 12)
    path = write_spots(tmp_path / "a.h5ad", XY, counts=counts, grid=np.array([[0, 0], [0, 1], [1, 0]]))
    spots = read_spots(path)
    assert spots.barcodes == ["s0", "s1", "s2"]
    assert spots.genes == GENES
    assert spots.counts is not None
    assert np.array_equal(spots.counts.toarray(), counts)
    assert np.array_equal(spots.xy, XY)
    moved = spots.take(np.array([2, 0, 1]))
    assert moved.barcodes == ["s2", "s0", "s1"]
    assert moved.counts is not None
    assert moved.counts[0, 0] == 24
    assert moved.array_row is not None
    assert moved.array_row.tolist() == [1, 0, 0]


def test_counts_layer_goes_before_x(tmp_path: Path) -> None:
    def normalised(data: anndata.AnnData) -> None:
        data.layers["counts"] = data.X * 2

    spots = read_spots(write_spots(tmp_path / "a.h5ad", XY, counts=np.ones((3, 12)), change=normalised))
    assert spots.counts is not None
    assert spots.counts.max() == 2


def test_spots_outside_the_tissue_are_left_out_and_said(tmp_path: Path) -> None:
    def partly(data: anndata.AnnData) -> None:
        data.obs["in_tissue"] = [1, 0, 1]

    spots = read_spots(write_spots(tmp_path / "a.h5ad", XY, change=partly))
    assert spots.barcodes == ["s0", "s2"]
    assert spots.notices == ("1 spots with in_tissue = 0 left out",)


def test_normalised_counts_are_said(tmp_path: Path) -> None:
    spots = read_spots(write_spots(tmp_path / "a.h5ad", XY, counts=np.full((3, 12), 0.5)))
    assert "not whole numbers" in spots.doubts[0]


@pytest.mark.parametrize(
    "values", [[True, False, True], ["True", "False", "TRUE"], ["1", "0", "1.0"], ["yes", "no", "yes"]]
)
def test_in_tissue_may_be_numbers_booleans_or_text(tmp_path: Path, values: list[Any]) -> None:
    def partly(data: anndata.AnnData) -> None:
        data.obs["in_tissue"] = values

    assert read_spots(write_spots(tmp_path / "a.h5ad", XY, change=partly)).barcodes == ["s0", "s2"]


def _in_tissue_words(data: anndata.AnnData) -> None:
    data.obs["in_tissue"] = ["1", "inside", "0"]


def _text_places(data: anndata.AnnData) -> None:
    data.obsm["spatial"] = np.array([["x", "y"], ["1", "2"], ["3", "4"]])


def _no_spatial(data: anndata.AnnData) -> None:
    del data.obsm["spatial"]


def _three_columns(data: anndata.AnnData) -> None:
    data.obsm["spatial"] = np.zeros((3, 3))


def _nan_place(data: anndata.AnnData) -> None:
    data.obsm["spatial"] = np.array([[0, 1], [np.nan, 1], [0, 1.0]])


def _half_row(data: anndata.AnnData) -> None:
    data.obs["array_row"] = [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": _no_spatial}, r"no obsm\['spatial'\] \(obsm holds nothing\)"),
        ({"change": _three_columns}, r"should be spots × 2"),
        ({"change": _nan_place}, r"not a number for 1 spots: s1"),
        ({"change": _in_tissue_words}, r"obs\['in_tissue'\] of spot s1 is 'inside', neither 1 nor 0"),
        ({"change": _text_places}, r"obsm\['spatial'\] holds text"),
        ({"change": _half_row}, r"obs\['array_row'\] of spot s1 is 0.5"),
        (
            {"counts": np.array([[0] * 12, [0, np.nan] + [0] * 10, [0] * 12])},
            "not a number in 1 places.*spot s1, gene G01",
        ),
        ({"counts": np.array([[0] * 12, [0] * 12, [0, 0, -3] + [0] * 9])}, "negative in 1 places.*spot s2, gene G02"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        read_spots(write_spots(tmp_path / "a.h5ad", XY, **options))


@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_barcodes_and_genes_twice(tmp_path: Path) -> None:
    with pytest.raises(ExpressionError, match=r"barcodes must be unique.*: s1"):
        read_spots(write_spots(tmp_path / "a.h5ad", XY, barcodes=["s0", "s1", "s1"]))
    with pytest.raises(ExpressionError, match=r"genes must be unique.*: G"):
        read_spots(write_spots(tmp_path / "b.h5ad", XY, genes=["G"] * 12))


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"not hdf5"), lambda path: path.write_bytes(b"")])
def test_a_file_that_is_no_h5ad(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "a.h5ad")
    with pytest.raises(ExpressionError, match=r"a\.h5ad cannot be read as an AnnData"):
        read_spots(tmp_path / "a.h5ad")


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("part", ["indices", "indptr"])
@pytest.mark.parametrize("where", ["X", "layers/counts"])
def test_counts_that_point_beyond_the_matrix_are_refused_before_any_arithmetic(
    tmp_path: Path, layout: str, part: str, where: str
) -> None:
    def as_layout(data: anndata.AnnData) -> None:
        data.X = sp.csc_matrix(data.X) if layout == "csc" else data.X
        data.layers["counts"] = data.X.copy()

    path = write_spots(tmp_path / "a.h5ad", XY, change=as_layout)
    with h5py.File(path, "r+") as file:
        if where == "X":
            del file["layers/counts"]
        values = file[f"{where}/{part}"]
        values[1] = 1_000_000
    with pytest.raises(ExpressionError, match=rf"a\.h5ad .*: {where} is damaged"):
        read_spots(path)


def test_whatever_else_is_wrong_is_a_fault_of_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise LookupError("odd")

    path = write_spots(tmp_path / "a.h5ad", XY)
    monkeypatch.setattr("nh2st_pipe.tiles.spots._grid_index", broken)
    with pytest.raises(ExpressionError, match=r"a\.h5ad cannot be used: odd"):
        read_spots(path)
