"""The files of a slide that are made here: what anndata and zarr would have written, and what they read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, write_elem
from zarr.codecs import Crc32cCodec, ZstdCodec

from nh2st_pipe.core.location import Location
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.store import elements
from nh2st_pipe.store.files import SlideFiles

_RNG = np.random.default_rng(0)
_NAMES = ["AAAC-1", "Fängt", "", "x"]
_COLUMNS = {"array_row": np.array([3, 0, 2, 1]), "array_col": np.array([0, 0, 0, 0])}
_MATRIX = sp.csr_matrix(np.array([[0, 1.5, 0], [0, 0, 0], [2, 0, 3], [0, 0, 0]], np.float32))


def laid(folder: Path, files: Iterable[tuple[str, bytes]]) -> Any:
    """Write files into a group in a folder, and open it."""
    Location(folder.parent).write_all(folder.name, elements.group(".", elements.ANNDATA))
    Location(folder.parent).write_all(folder.name, files)
    return zarr.open_group(folder, mode="r")


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.relative_to(folder).as_posix(): json.loads(file.read_bytes())
        for file in folder.rglob("zarr.json")
        if file.parent != folder
    }


def without_codecs(document: dict[str, Any]) -> dict[str, Any]:
    """Return metadata but for how values are packed, and what an array within a matrix is called."""
    packed = {key: value for key, value in document.items() if key != "codecs"}
    return packed | ({"attributes": {}} if document["attributes"] == elements.ARRAY else {})


def test_parts_of_a_slide_are_described_as_anndata_describes_them(tmp_path: Path) -> None:
    files = [
        *elements.frame("obs", _NAMES, "barcode", _COLUMNS),
        *elements.anndata_dict("obsm"),
        *elements.array("obsm/spatial", np.array([[0.5, 2.0], [1.0, 3.0]])),
        *elements.anndata_dict("obsp"),
        *elements.csr("obsp/spatial_distances", _MATRIX),
    ]
    laid(tmp_path / "ours", files)
    theirs = zarr.open_group(tmp_path / "theirs", mode="w", zarr_format=3)
    with quiet_warnings(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        frame = pd.DataFrame(_COLUMNS, index=pd.Index(_NAMES, name="barcode", dtype=object))
        write_elem(theirs, "obs", frame)
        write_elem(theirs, "obsm", {"spatial": np.array([[0.5, 2.0], [1.0, 3.0]])})
        write_elem(theirs, "obsp", {"spatial_distances": _MATRIX})
    ours, expected = documents(tmp_path / "ours"), documents(tmp_path / "theirs")
    assert len(ours) == 11
    assert {name: without_codecs(each) for name, each in ours.items()} == {
        name: without_codecs(each) for name, each in expected.items()
    }


@pytest.mark.parametrize("per_chunk", [1 << 20, 5, 3, 1], ids=["one chunk", "a last that is shorter", "3", "1"])
def test_what_is_written_is_what_anndata_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_chunk: int) -> None:
    monkeypatch.setattr(elements, "_VALUES_PER_CHUNK", per_chunk)
    names, values = [f"spot {number} ü" for number in range(7)], np.arange(7)
    wide, empty = _RNG.normal(size=(7, 1)), sp.csr_matrix(np.zeros((4, 3), np.float32))
    files = [
        *elements.frame("obs", names, "barcode", {"array_row": values}),
        *elements.array("wide", wide),
        *elements.csr("matrix", _MATRIX),
        *elements.csr("empty", empty),
    ]
    group = laid(tmp_path, files)
    with quiet_warnings():
        obs = read_elem(group["obs"])
        assert (list(obs.index), obs.index.name, list(obs["array_row"])) == (names, "barcode", list(values))
        assert np.array_equal(group["wide"][:], wide)
        for name, matrix in (("matrix", _MATRIX), ("empty", empty)):
            read = read_elem(group[name])
            assert (read.shape, read.dtype) == (matrix.shape, matrix.dtype)
            assert np.array_equal(read.toarray(), matrix.toarray())


@pytest.mark.parametrize("tail", [(6,), (3, 6)], ids=["values", "views × values"])
@pytest.mark.parametrize("rows", [1, 4, 11, 16, 40], ids=lambda n: f"{n} rows")
def test_shards_are_to_the_byte_what_zarr_writes(tmp_path: Path, rows: int, tail: tuple[int, ...]) -> None:
    """Whole chunks, a last one that is not, shards of several and a last one that is not full."""
    values = _RNG.normal(size=(rows, *tail)).astype(np.float16)
    theirs = zarr.open_group(tmp_path / "theirs", mode="w", zarr_format=3).create_array(
        "X",
        shape=values.shape,
        chunks=(4, *tail),
        shards=(16, *tail),
        dtype="float16",
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
    )
    theirs[:] = values
    theirs.attrs.update(elements.ARRAY)
    laid(tmp_path / "ours", elements.sharded("X", values.shape, "float16", 4, 16))
    for start in range(0, rows, 32):  # as they come
        for name, data in elements.shards("X", values[start : start + 32], start, 4, 16):
            Location(tmp_path / "ours").write(name, data)

    def content(folder: Path) -> dict[str, Any]:
        files = [file for file in (folder / "X").rglob("*") if file.is_file()]
        return {
            file.relative_to(folder).as_posix(): json.loads(file.read_bytes())
            if file.name == "zarr.json"
            else file.read_bytes()
            for file in files
        }

    assert content(tmp_path / "ours") == content(tmp_path / "theirs")


@pytest.mark.parametrize("known", [True, False], ids=["known", "read back"])
def test_metadata_are_gathered_as_zarr_gathers_them(tmp_path: Path, known: bool) -> None:
    location = Location(tmp_path)
    files = SlideFiles(location, "slide")
    files.lay(elements.group("embedding", elements.ANNDATA))
    files.lay(elements.frame("embedding/obs", _NAMES, "barcode", _COLUMNS))
    files.lay(elements.anndata_dict("embedding/obsp"))
    files.lay(elements.csr("embedding/obsp/far", _MATRIX))
    with quiet_warnings():
        zarr.consolidate_metadata(tmp_path, path="slide/embedding", zarr_format=3)
    place = tmp_path / "slide/embedding/zarr.json"
    expected = json.loads(place.read_bytes())
    writer = files if known else SlideFiles(location, "slide")
    for _ in range(2):  # what is gathered already is gathered again
        writer.consolidate(("embedding", "expression"))
        assert json.loads(place.read_bytes()) == expected
    assert not (tmp_path / "slide/expression").exists()
    assert writer.listed["embedding/zarr.json"][0] == place.stat().st_size
