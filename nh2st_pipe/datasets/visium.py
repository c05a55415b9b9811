"""Space Ranger's output: Visium, v1 and v2 names, and Visium HD at a chosen bin.

    <section>/outs/filtered_feature_bc_matrix.h5     or the folder of the same name (matrix.mtx.gz, barcodes, features)
    <section>/outs/spatial/tissue_positions.csv      or tissue_positions_list.csv (no header), or .parquet
    <section>/outs/spatial/scalefactors_json.json
    <section>/outs/binned_outputs/square_008um/…     Visium HD: the same three inside each bin's folder
    <section>/*.tif, *.jpg, …                        the microscope's image that Space Ranger was given

Positions name the pixel row before the pixel column; columns run along the width. The microscope's image is in no
output of Space Ranger: it lies in the section's folder, or beside it under the section's name. Without it the section
is left out, as tissue_hires_image.png shows a spot in some ten px.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp

from nh2st_pipe.core.errors import ExpressionError, listed, reason_of
from nh2st_pipe.core.h5ad import checked_matrix, require_h5
from nh2st_pipe.core.memory import require
from nh2st_pipe.datasets.common import (
    IMAGES,
    Found,
    Section,
    files_of,
    joined,
    needed,
    one_image,
    read_delimited,
    whole_numbers,
)

__all__ = ["find_visium", "matrix_of_h5"]

_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_MATRICES = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_BIN = re.compile(r"square_(\d+)um")
_BIN_UM = 8


def find_visium(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections: `folder` itself, its outs/, or folders in it. Raises ExpressionError where there is none.

    Of Visium HD each bin is one; that of 8 µm is taken, or the only one there is, unless `bin_um` says which.
    """
    found = []
    for section in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")):
        outs = next((place for place in (section / "outs", section) if _places(place)), None)
        if outs is None:
            continue
        places = _places(outs)
        taken = min(places, key=lambda um: abs(um - _BIN_UM))
        for um, place in places.items():
            about = {"bin_um": str(um)} if um else {}
            read = partial(_read, section, outs, place)
            found.append(Found(section.name, read, about, only_where=() if um == taken else ("bin_um",)))
        if section == folder:
            break
    if not found:
        raise ExpressionError(
            f"there is no output of Space Ranger in {folder}: a folder with {_MATRICES[0]}.h5 (or {_MATRICES[0]}/) and "
            "spatial/ is expected, as it is or inside <section>/outs/"
        )
    return found


def _places(outs: Path) -> dict[int, Path]:
    """Return the folders that hold a matrix and positions, by the µm of their bins; 0 where there are spots."""
    matrices = [outs / f"{name}{ending}" for name in _MATRICES for ending in ("", ".h5")]
    if (outs / "spatial").is_dir() and any(path.exists() for path in matrices):
        return {0: outs}
    bins = ((_BIN.fullmatch(path.name), path) for path in sorted((outs / "binned_outputs").glob("square_*um")))
    return {int(name.group(1)): path for name, path in bins if name and (path / "spatial").is_dir()}


def _read(section: Path, outs: Path, place: Path) -> Section:
    counts, barcodes, genes, ids, counts_file = _matrix(place)
    positions = next((place / "spatial" / name for name in _POSITIONS if (place / "spatial" / name).is_file()), None)
    if positions is None:
        raise ExpressionError(f"there is no {listed(_POSITIONS)} in {place / 'spatial'}")
    at = _positions(positions)
    pairs = joined(barcodes, [str(each) for each in at["barcode"]], counts_file, positions)
    inside = at["in_tissue"].to_numpy()[pairs[:, 1]] == 1
    if not inside.any():
        raise ExpressionError(f"{positions}: no spot of {counts_file.name} is in tissue")
    pairs, here = pairs[inside], at[pairs[inside, 1]]
    mpp = _scales(place / "spatial" / "scalefactors_json.json").get("microns_per_pixel")
    return Section(
        image=_image(section, outs),
        counts=sp.csr_matrix(counts[pairs[:, 0]]),
        barcodes=[barcodes[i] for i in pairs[:, 0]],
        genes=genes,
        gene_ids=ids,
        xy=here.select("pxl_col_in_fullres", "pxl_row_in_fullres").to_numpy().astype(np.float64),
        array_row=whole_numbers(here["array_row"]),
        array_col=whole_numbers(here["array_col"]),
        patient=section.name,
        mpp=mpp,
        mpp_source="Space Ranger" if mpp else "",
        notes=[f"{int((~inside).sum())} outside the tissue left out"] if not inside.all() else [],
    )


def _image(section: Path, outs: Path) -> Path:
    own = [path for place in {section, outs} for path in files_of(place, "*")]
    beside = [path for path in files_of(section.parent, "*") if path.stem.startswith(section.name)]
    inside = [path for path in own if path.suffix.lower() in IMAGES]
    return one_image(inside or beside, f"of the microscope in {section}, or beside it under its name")


def _matrix(place: Path) -> tuple[sp.csr_matrix, list[str], list[str], list[str], Path]:
    for name in _MATRICES:
        file, folder = place / f"{name}.h5", place / name
        if file.is_file():
            return (*matrix_of_h5(file), file)
        if folder.is_dir():
            return (*_of_mtx(folder), folder)
    raise ExpressionError(f"there is neither {_MATRICES[0]}.h5 nor {_MATRICES[0]}/ in {place}")


def matrix_of_h5(path: Path) -> tuple[sp.csr_matrix, list[str], list[str], list[str]]:
    """Read 10x's HDF5: v3 has `matrix` with `features`, v2 a group named after the genome with `gene_names`."""
    import h5py

    def text(values: Any) -> list[str]:
        return [each.decode() for each in values[:]]

    try:
        require_h5(path)
        with h5py.File(path) as opened:
            group = opened["matrix"] if "matrix" in opened else opened[next(iter(opened))]
            names, ids = (
                (group["features/name"], group["features/id"])
                if "features" in group
                else (group["gene_names"], group["genes"])
            )
            n_genes, n_spots = (int(n) for n in group["shape"][:])
            parts = (group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:])
            counts = sp.csr_matrix(parts, shape=(n_spots, n_genes))  # the file is genes × spots by columns
            checked_matrix(counts, "the matrix")
            return counts, text(group["barcodes"]), text(names), text(ids)
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise ExpressionError(f"{path} is no matrix of Space Ranger: {reason_of(error)}") from error


def _check_declared(matrix: Path) -> None:
    """Raise where a Matrix Market file declares more entries than its bytes can hold, or than there is memory for."""
    import gzip

    with gzip.open(matrix) if matrix.suffix == ".gz" else matrix.open("rb") as file:
        line = next((line for line in file if not line.startswith(b"%")), b"")
    entries = int(line.split()[-1]) if line.split() else 0
    most = matrix.stat().st_size * (_DEFLATE if matrix.suffix == ".gz" else 1) // _LEAST_LINE
    if entries > most:
        raise ValueError(f"it declares {entries:,} entries, which its bytes cannot hold")
    require(_ENTRY_BYTES * entries, str(matrix), ExpressionError)


_DEFLATE = 1032  # to 1, as gzip packs at most
_LEAST_LINE = 6  # bytes of "1 1 1"
_ENTRY_BYTES = 60  # of an entry, while the matrix is turned


def _of_mtx(folder: Path) -> tuple[sp.csr_matrix, list[str], list[str], list[str]]:
    from scipy.io import mmread

    def lines(*names: str) -> list[list[str]]:
        import gzip

        for name in names:
            for path in (folder / f"{name}.gz", folder / name):
                if path.is_file():
                    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                    return [line.split("\t") for line in data.decode().splitlines()]
        raise ExpressionError(f"there is no {listed(names)} in {folder}")

    matrix = next((folder / name for name in ("matrix.mtx.gz", "matrix.mtx") if (folder / name).is_file()), None)
    if matrix is None:
        raise ExpressionError(f"there is no matrix.mtx.gz in {folder}")
    features, barcodes = lines("features.tsv", "genes.tsv"), lines("barcodes.tsv")
    try:
        _check_declared(matrix)
        counts = sp.csr_matrix(mmread(matrix)).T.tocsr()
    except (OSError, ValueError) as error:
        raise ExpressionError(f"{matrix} cannot be read: {reason_of(error)}") from error
    if counts.shape != (len(barcodes), len(features)):
        of = f"{len(features)} features and {len(barcodes)} barcodes"
        raise ExpressionError(f"{matrix} is {counts.shape[1]} × {counts.shape[0]}, for {of}")
    return (
        counts,
        [line[0] for line in barcodes],
        [line[min(1, len(line) - 1)] for line in features],
        [line[0] for line in features],
    )


def _positions(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        try:
            table = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ExpressionError(f"{path} is not a readable table: {reason_of(error)}") from error
    else:
        with path.open("rb") as file:
            header = file.readline().startswith(b"barcode")  # Space Ranger 1 writes none
        table = read_delimited(path, ",", header=header)
        table = table if header else table.rename(dict(zip(table.columns, _COLUMNS, strict=False)))
    needed(table, _COLUMNS, path)
    return table


def _scales(path: Path) -> dict[str, float]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float)) and value > 0}
