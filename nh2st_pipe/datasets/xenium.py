"""Xenium's output, its transcripts or cells gathered into squares, on the H&E image of the same section.

    <section>/[outs/]experiment.xenium            pixel_size: µm per px of the morphology image, 0.2125
    <section>/[outs/]transcripts.parquet          feature_name, x_location, y_location (µm), qv, …; .csv.gz in the first
    <section>/[outs/]cells.parquet (or .csv.gz)   cell_id, x_centroid, y_centroid (µm)
    <section>/[outs/]cell_feature_matrix.h5       cells × features, as of Space Ranger; or the folder of that name
    <section>/[outs/]*he_image*.tif, *.svs, …     H&E, full resolution; the only other image than morphology*
    <section>/[outs/]*imagealignment*.csv         3 × 3: px of the H&E image (x, y, 1) → px of the morphology image

x runs along the width in all of them. A square of 100 µm is a spot; `--where bin_um=50` (of 20, 50, 55, 100, 200) takes
others, `--where cells_um=50` counts what is inside cells, each cell at its centre, in place of single transcripts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, reason_of
from nh2st_pipe.datasets.common import (
    CONTROLS,
    Found,
    Section,
    files_of,
    left_out,
    needed,
    numbers,
    one_image,
    read_frame,
    unreadable,
)
from nh2st_pipe.datasets.visium import matrix_of, squares
from nh2st_pipe.slides.kinds import is_image

__all__ = ["find_xenium"]

_SQUARES_UM, _USUAL_UM = (20, 50, 55, 100, 200), 100
_LEAST_QV = 20  # of a transcript that counts, as Xenium's own cell matrix has it
_TRANSCRIPTS = ("transcripts.parquet", "transcripts.csv.gz", "transcripts.csv")
_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
_MATRIX = "cell_feature_matrix"


def find_xenium(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections: `folder` itself, its outs/, or folders in it. Raises ExpressionError where there is none."""
    found = list[Found]()
    for section in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")):
        try:
            outs = next((at for at in (section / "outs", section) if (at / "experiment.xenium").is_file()), None)
        except OSError as error:  # a folder that may not be looked into is no reason to leave out the others
            found.append(unreadable(section.name, error))
            continue
        if outs is None:
            continue
        name = section.resolve().name
        by_transcripts = any((outs / each).is_file() for each in _TRANSCRIPTS)
        for key, taken in (("bin_um", by_transcripts), ("cells_um", not by_transcripts)):
            for um in _SQUARES_UM:
                read = partial(_read, section, outs, um, key == "cells_um", name)
                usual = taken and um == _USUAL_UM
                found.append(Found(name, read, {key: str(um)}, only_where=() if usual else (key,)))
        if section == folder:
            break
    if not found:
        raise ExpressionError(f"there is no experiment.xenium in {folder}, in a folder in it, or in <section>/outs/")
    return found


def _read(section: Path, outs: Path, um: int, by_cell: bool, name: str) -> Section:
    to_image, mpp = _to_image(outs / "experiment.xenium", _alignment(section, outs))
    at, genes, counts, notes = (_of_cells if by_cell else _of_transcripts)(outs, um)
    xy = np.column_stack(((at + 0.5) * um, np.ones(len(at)))) @ to_image.T
    return Section(
        image=partial(_image, section, outs),
        counts=counts,
        barcodes=[f"{x}x{y}" for x, y in at.tolist()],
        genes=genes,
        xy=xy,
        array_row=at[:, 1],
        array_col=at[:, 0],
        patient=name,
        mpp=mpp,
        mpp_source="Xenium's alignment of the H&E image",
        notes=[f"squares of {um} µm of {'cells' if by_cell else 'transcripts'}", *notes],
    )


_Squares = tuple[NDArray[np.int64], list[str], sp.csr_matrix, list[str]]
"""Columns and rows of squares n × 2, genes, counts n × g, and what to say."""


def _of_transcripts(outs: Path, um: int) -> _Squares:
    """Return squares of single transcripts, without holding all of those."""
    file = next((outs / name for name in _TRANSCRIPTS if (outs / name).is_file()), None)
    if file is None:
        raise ExpressionError(f"{outs / _TRANSCRIPTS[0]} is missing; --where cells_um={um} counts what is inside cells")
    try:
        lazy = pl.scan_parquet(file) if file.suffix == ".parquet" else pl.scan_csv(file, infer_schema_length=10_000)
        names = lazy.collect_schema().names()
        lacking = [name for name in ("feature_name", "x_location", "y_location") if name not in names]
        if lacking:
            raise ExpressionError(f"{file} lacks the columns {', '.join(lacking)}")
        gene = pl.col("feature_name").cast(pl.String)
        is_gene = ~pl.any_horizontal(gene.str.starts_with(start) for start in CONTROLS)
        if "is_gene" in names:
            is_gene &= pl.col("is_gene").cast(pl.String).str.to_lowercase().is_in(["true", "1"])
        sure = pl.col("qv") >= _LEAST_QV if "qv" in names else pl.lit(True)
        squares_of = [(pl.col(f"{axis}_location") / um).floor().cast(pl.Int64).alias(axis) for axis in ("x", "y")]
        table = lazy.filter(is_gene & sure).group_by(*squares_of, gene.alias("gene")).len().collect(engine="streaming")
        other = lazy.select((~is_gene).sum().alias("controls"), (is_gene & ~sure).sum().alias("unsure"))
        controls, unsure = other.collect(engine="streaming").row(0)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{file} is not a readable table: {reason_of(error)}") from error
    if table.is_empty():
        raise ExpressionError(f"{file} has no transcript of a gene with a quality (qv) of {_LEAST_QV} or more")
    at, row = np.unique(table.select("x", "y").to_numpy(), axis=0, return_inverse=True)
    genes, column = np.unique(table["gene"].to_numpy().astype(str), return_inverse=True)
    counts = sp.csr_matrix((table["len"].to_numpy().astype(np.float32), (row, column)), shape=(len(at), len(genes)))
    said = [(controls, "of control probes"), (unsure, f"of a quality below {_LEAST_QV}")]
    return at, genes.tolist(), counts, [f"{number:,} transcripts {of} left out" for number, of in said if number]


def _of_cells(outs: Path, um: int) -> _Squares:
    """The same from the counts of cells."""
    file = next((outs / name for name in _CELLS if (outs / name).is_file()), None)
    if file is None:
        raise ExpressionError(f"{outs / _CELLS[0]} is missing")
    cells = read_frame(file)
    needed(cells, ("cell_id", "x_centroid", "y_centroid"), file)
    counts, barcodes, genes, _, matrix, notes = matrix_of(outs, _MATRIX)
    identity = cells["cell_id"]
    known = identity.cast(pl.String) if identity.dtype != pl.Binary else identity.map_elements(bytes.decode, pl.String)
    place = {name: row for row, name in enumerate(known)}
    both = [(row, place[name]) for row, name in enumerate(barcodes) if name in place]
    if not both:
        raise ExpressionError(f"{matrix} and {file} have no cell in common")
    rows, cell = np.array(both).T
    centres = numbers(cells[cell], ("x_centroid", "y_centroid"), file)
    at, summed = squares(centres, sp.csr_matrix(counts[rows]), um)
    notes += [f"cells: {words}" for words in left_out(len(barcodes), cells.height, len(both), "counts", "a place")]
    return at, genes, summed, notes


def _to_image(experiment: Path, alignment: Path) -> tuple[NDArray[np.float64], float]:
    """Return the map 2 × 3 from µm (x, y, 1) to px of the H&E image, and the image's µm per px."""
    try:
        size = float(json.loads(experiment.read_text("utf-8"))["pixel_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExpressionError(f"{experiment} does not say pixel_size: {reason_of(error)}") from error
    try:
        to_morphology = np.loadtxt(alignment, delimiter=",", dtype=np.float64)
        from_morphology = np.linalg.inv(to_morphology)
    except (OSError, ValueError, np.linalg.LinAlgError) as error:
        raise ExpressionError(f"{alignment} is no 3 × 3 matrix that can be turned round: {reason_of(error)}") from error
    if to_morphology.shape != (3, 3) or not np.allclose(to_morphology[2], (0, 0, 1), atol=1e-6):
        raise ExpressionError(f"{alignment}: an affine matrix of 3 × 3 numbers is expected, the last row 0, 0, 1")
    scale = float(np.sqrt(abs(np.linalg.det(to_morphology[:2, :2]))))
    to_image = from_morphology[:2].astype(np.float64) * np.array((1 / size, 1 / size, 1))
    return np.asarray(to_image, np.float64), size * scale


def _image(section: Path, outs: Path) -> Path:
    """Return the H&E image."""
    every = [path for place in dict.fromkeys((section, outs)) for path in place.iterdir() if path.name[0] not in "._"]
    images = [path for path in every if is_image(path) and not path.name.startswith("morphology")]
    images = [path for path in images if "he_image" in path.name.lower()] or images
    return one_image(images, f"of H&E in {section}")


def _alignment(section: Path, outs: Path) -> Path:
    """Return the file that says how the H&E image lies on the morphology image."""
    every = [path for place in dict.fromkeys((section, outs)) for path in files_of(place, "*")]
    found = [path for path in every if "imagealignment" in path.name.lower() and path.suffix == ".csv"]
    if len(found) != 1:
        what = "alignment of the H&E image (*imagealignment.csv)"
        raise ExpressionError(f"{len(found) or 'no'} {what} in {section}; one is expected")
    return found[0]
