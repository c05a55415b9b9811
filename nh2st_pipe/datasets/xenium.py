"""Xenium's output, its transcripts or cells gathered into squares, on the H&E image of the same section.

    <section>/[outs/]experiment.xenium            pixel_size: µm per px of the morphology image, 0.2125
    <section>/[outs/]transcripts.parquet          feature_name, x_location, y_location (µm), qv, …
    <section>/[outs/]cells.parquet (or .csv.gz)   cell_id, x_centroid, y_centroid (µm)
    <section>/[outs/]cell_feature_matrix.h5       cells × features, as Space Ranger writes it
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
from nh2st_pipe.datasets.common import IMAGES, Found, Section, files_of, needed, read_delimited
from nh2st_pipe.datasets.visium import matrix_of_h5

__all__ = ["find_xenium"]

_SQUARES_UM, _USUAL_UM = (20, 50, 55, 100, 200), 100
_LEAST_QV = 20  # of a transcript that counts, as Xenium's own cell matrix has it
_NO_GENES = ("NegControl", "BLANK", "Unassigned", "UnassignedCodeword", "antisense", "Intergenic", "Deprecated")


def find_xenium(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections: `folder` itself, its outs/, or folders in it. Raises ExpressionError where there is none."""
    found = list[Found]()
    for section in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")):
        outs = next((place for place in (section / "outs", section) if (place / "experiment.xenium").is_file()), None)
        if outs is None:
            continue
        by_transcripts = (outs / "transcripts.parquet").is_file()
        for key, taken in (("bin_um", by_transcripts), ("cells_um", not by_transcripts)):
            for um in _SQUARES_UM:
                read = partial(_read, section, outs, um, key == "cells_um")
                usual = taken and um == _USUAL_UM
                found.append(Found(section.name, read, {key: str(um)}, only_where=() if usual else (key,)))
        if section == folder:
            break
    if not found:
        raise ExpressionError(f"there is no experiment.xenium in {folder}, in a folder in it, or in <section>/outs/")
    return found


def _read(section: Path, outs: Path, um: int, by_cell: bool) -> Section:
    image, alignment = _image(section, outs)
    to_image, mpp = _to_image(outs / "experiment.xenium", alignment)
    at, genes, counts = (_of_cells if by_cell else _of_transcripts)(outs, um)
    xy = np.column_stack(((at + 0.5) * um, np.ones(len(at)))) @ to_image.T
    return Section(
        image=image,
        counts=counts,
        barcodes=[f"{x}x{y}" for x, y in at.tolist()],
        genes=genes,
        xy=xy,
        array_row=at[:, 1],
        array_col=at[:, 0],
        patient=section.name,
        mpp=mpp,
        mpp_source="Xenium's alignment of the H&E image",
        notes=[f"squares of {um} µm of {'cells' if by_cell else 'transcripts'}"],
    )


def _of_transcripts(outs: Path, um: int) -> tuple[NDArray[np.int64], list[str], sp.csr_matrix]:
    """Return the squares' columns and rows n × 2, the genes, and counts n × g, without holding all transcripts."""
    file = outs / "transcripts.parquet"
    if not file.is_file():
        raise ExpressionError(f"{file} is missing; --where cells_um={um} counts what is inside cells")
    try:
        lazy = pl.scan_parquet(file)
        names = lazy.collect_schema().names()
        lacking = [name for name in ("feature_name", "x_location", "y_location") if name not in names]
        if lacking:
            raise ExpressionError(f"{file} lacks the columns {', '.join(lacking)}")
        gene = pl.col("feature_name").cast(pl.String)
        kept = ~pl.any_horizontal(gene.str.starts_with(start) for start in _NO_GENES)
        if "is_gene" in names:
            kept &= pl.col("is_gene")
        if "qv" in names:
            kept &= pl.col("qv") >= _LEAST_QV
        squares = [(pl.col(f"{axis}_location") / um).floor().cast(pl.Int64).alias(axis) for axis in ("x", "y")]
        table = lazy.filter(kept).group_by(*squares, gene.alias("gene")).len().collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{file} is not a readable table: {reason_of(error)}") from error
    if table.is_empty():
        raise ExpressionError(f"{file} has no transcript of a gene with a quality (qv) of {_LEAST_QV} or more")
    at, row = np.unique(table.select("x", "y").to_numpy(), axis=0, return_inverse=True)
    genes, column = np.unique(table["gene"].to_numpy().astype(str), return_inverse=True)
    counts = sp.csr_matrix((table["len"].to_numpy().astype(np.float32), (row, column)), shape=(len(at), len(genes)))
    return at, genes.tolist(), counts


def _of_cells(outs: Path, um: int) -> tuple[NDArray[np.int64], list[str], sp.csr_matrix]:
    """The same from the counts of cells."""
    file = next(
        (outs / name for name in ("cells.parquet", "cells.csv.gz", "cells.csv") if (outs / name).is_file()), None
    )
    matrix = outs / "cell_feature_matrix.h5"
    if file is None or not matrix.is_file():
        raise ExpressionError(f"{matrix if file else outs / 'cells.parquet'} is missing")
    try:
        cells = pl.read_parquet(file) if file.suffix == ".parquet" else read_delimited(file, ",")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{file} is not a readable table: {reason_of(error)}") from error
    needed(cells, ("cell_id", "x_centroid", "y_centroid"), file)
    counts, barcodes, names, _ = matrix_of_h5(matrix)
    identity = cells["cell_id"]
    known = identity.cast(pl.String) if identity.dtype != pl.Binary else identity.map_elements(bytes.decode, pl.String)
    place = {name: row for row, name in enumerate(known)}
    both = [(row, place[name]) for row, name in enumerate(barcodes) if name in place]
    if not both:
        raise ExpressionError(f"{matrix} and {file} have no cell in common")
    rows, cell = np.array(both).T
    gene = np.array([not name.startswith(_NO_GENES) for name in names])
    centres = cells.select("x_centroid", "y_centroid").to_numpy()[cell]
    at, square = np.unique(np.floor(centres / um).astype(np.int64), axis=0, return_inverse=True)
    fold = sp.csr_matrix((np.ones(len(rows), np.float32), (square.ravel(), np.arange(len(rows)))), (len(at), len(rows)))
    summed = sp.csr_matrix(fold @ counts[rows][:, gene])
    return at, [name for name, keep in zip(names, gene, strict=True) if keep], summed


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


def _image(section: Path, outs: Path) -> tuple[Path, Path]:
    """Return the H&E image and its alignment."""
    every = [path for place in dict.fromkeys((section, outs)) for path in files_of(place, "*")]
    alignments = [path for path in every if "imagealignment" in path.name.lower() and path.suffix == ".csv"]
    images = [path for path in every if path.suffix.lower() in IMAGES and not path.name.startswith("morphology")]
    images = [path for path in images if "he_image" in path.name.lower()] or images
    for what, found in (("H&E image", images), ("alignment of the H&E image (*imagealignment.csv)", alignments)):
        if len(found) != 1:
            raise ExpressionError(f"{'no' if not found else len(found)} {what} in {section}; one is expected")
    return images[0], alignments[0]
