"""Space Ranger's output: Visium of every version, and Visium HD at a chosen bin or by its cells.

    <section>/outs/filtered_feature_bc_matrix.h5     or the folder of the same name (matrix.mtx.gz, barcodes, features)
    <section>/outs/spatial/tissue_positions.csv      or tissue_positions_list.csv (no header), or .parquet
    <section>/outs/spatial/scalefactors_json.json
    <section>/outs/binned_outputs/square_008um/…     Visium HD: the same three inside each bin's folder
    <section>/outs/segmented_outputs/                since version 4: filtered_feature_cell_matrix.h5 and
                                                     cell_segmentations.geojson, gathered into squares
    <section>/*.tif, *.btf, *.jpg, …                 the microscope's image that Space Ranger was given

Positions name the pixel row before the pixel column; columns run along the width. The microscope's image is in no
output of Space Ranger: it is given (`--images`), or lies in the section's folder, or beside it under its name, or
where the section's `_invocation` says that Space Ranger took it from. Without it the section is left out, as
tissue_hires_image.png shows a spot in some ten px, and CytAssist's own image is coarser still.
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
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, fault_of, listed, reason_of
from nh2st_pipe.core.h5ad import checked_matrix, require_h5
from nh2st_pipe.core.memory import require
from nh2st_pipe.datasets.common import (
    Found,
    Section,
    joined,
    left_out,
    needed,
    numbers,
    one_image,
    only_genes,
    read_frame,
    read_json,
    unreadable,
    whole_numbers,
)
from nh2st_pipe.slides.kinds import IMAGES, is_image, refused_kind

__all__ = ["find_visium", "matrix_of", "squares"]

_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_MATRICES = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
_CELL_MATRICES = ("filtered_feature_cell_matrix", "raw_feature_cell_matrix")
_CELLS = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_POSITIONS = (
    "tissue_positions.parquet",
    *("tissue_positions.csv", "tissue_positions_list.csv"),
    *("tissue_positions.csv.gz", "tissue_positions_list.csv.gz"),
)
_SCALES = "scalefactors_json.json"
_BIN = re.compile(r"square_(\d+)um")
_BIN_UM = 8
_SQUARES_UM = (20, 50, 55, 100, 200)
_NOT_OF_THE_MICROSCOPE = re.compile(
    r"cytassist|fiducial|aligned_tissue|detected_tissue|tissue_(hires|lowres)|_spatial\b|mask|label|overview",
    re.IGNORECASE,
)
_OF_THE_MICROSCOPE = re.compile(r"tissue_image\.[a-z0-9.]+$", re.IGNORECASE)
_PACKED = re.compile(r"(spatial|binned_outputs|segmented_outputs|feature_bc_matrix)\.tar\.gz$")
_INVOCATION = re.compile(r"tissue_image_paths?\s*=\s*\[?(.*?)[\]\n]", re.DOTALL)


def find_visium(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections: `folder` itself, its outs/, or folders in it. Raises ExpressionError where there is none.

    Of Visium HD each bin is one; that of 8 µm is taken, or the only one there is, unless `bin_um` says which;
    `cells_um` takes cells instead, gathered into squares. The filtered matrix is taken, unless `matrix`
    says raw.
    """
    found = list[Found]()
    for section in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")):
        name = section.resolve().name
        try:
            readings = _readings(section, name)
        except OSError as error:  # a folder that may not be looked into is no reason to leave out the others
            readings = [unreadable(name, error)] if section != folder else []
        found += readings
        if section == folder and readings:
            break
    if not found:
        packed = [path.name for path in sorted(folder.rglob("*.tar.gz")) if _PACKED.search(path.name)]
        unpack = f". Unpack {listed(packed, 3)} first (tar -xf)" if packed else ""
        raise ExpressionError(
            f"there is no output of Space Ranger in {folder}: a folder with {_MATRICES[0]}.h5 (or {_MATRICES[0]}/) and "
            f"spatial/ is expected, as it is or inside <section>/outs/{unpack}"
        )
    return found


def _readings(section: Path, name: str) -> list[Found]:
    """Return every way in which a section can be read: at each bin, by cells, filtered or raw."""
    outs = next((place for place in (section / "outs", section) if _places(place) or _cells(place)), None)
    if outs is None:
        return []
    found, places = list[Found](), _places(outs)
    taken = min(places, key=lambda um: abs(um - _BIN_UM), default=None)
    for um, place in places.items():
        kinds = {each: kind for each, kind in zip(("filtered", "raw"), _MATRICES, strict=True) if _has(place, kind)}
        for number, (kind, matrix) in enumerate(kinds.items()):
            about = {**({"bin_um": str(um)} if um else {}), "matrix": kind}
            read = partial(_read, section, outs, place, matrix, name)
            other = ("bin_um",) * (um != taken) + ("matrix",) * (number > 0)
            found.append(Found(name, read, about, only_where=other))
    cells = _cells(outs)
    for um in _SQUARES_UM:
        if cells is None:
            break
        usual = not places and um == _SQUARES_UM[2]
        read = partial(_read_cells, section, outs, cells, um, name)
        found.append(Found(name, read, {"cells_um": str(um)}, only_where=() if usual else ("cells_um",)))
    return found


def _has(place: Path, matrix: str) -> bool:
    return _file(place, f"{matrix}.h5") is not None or _file(place, matrix) is not None


def _file(place: Path, name: str) -> Path | None:
    """Return what is called so in a folder, or has the dataset's name before it, as 10x's website gives it away."""
    if (place / name).exists():
        return place / name
    found = [path for path in sorted(place.glob(f"*_{name}")) if path.is_dir() == ("." not in name)]
    return found[0] if len(found) == 1 else None


def _places(outs: Path) -> dict[int, Path]:
    """Return the folders that hold a matrix and positions, by the µm of their bins; 0 where there are spots."""
    if (outs / "spatial").is_dir() and any(_has(outs, name) for name in _MATRICES):
        return {0: outs}
    parent = outs / "binned_outputs"
    bins = [(_BIN.fullmatch(path.name), path) for of in (parent, outs) for path in sorted(of.glob("square_*um"))]
    found = {int(name.group(1)): path for name, path in reversed(bins) if name and (path / "spatial").is_dir()}
    return {um: path for um, path in sorted(found.items()) if any(_has(path, name) for name in _MATRICES)}


def _cells(outs: Path) -> Path | None:
    """Return the folder of segmented cells; None where there is none."""
    for place in (outs / "segmented_outputs", outs):
        if any(_has(place, name) for name in _CELL_MATRICES) and any(_file(place, name) for name in _CELLS):
            return place
    return None


def _read(section: Path, outs: Path, place: Path, kind: str, name: str) -> Section:
    counts, barcodes, genes, ids, counts_file, notes = matrix_of(place, kind)
    positions = next((place / "spatial" / name for name in _POSITIONS if (place / "spatial" / name).is_file()), None)
    if positions is None:
        raise ExpressionError(f"there is no {listed(_POSITIONS)} in {place / 'spatial'}")
    at = read_frame(positions, _COLUMNS)
    needed(at, _COLUMNS, positions)
    at = at.filter(pl.col("barcode").is_not_null())
    inside = numbers(at, ("in_tissue",), positions)[:, 0] == 1
    if not inside.any():
        raise ExpressionError(f"{positions}: no spot is in tissue (in_tissue)")
    pairs = joined(barcodes, [str(each) for each in at["barcode"]], counts_file, positions)
    on_tissue = inside[pairs[:, 1]]
    if not on_tissue.any():
        raise ExpressionError(f"{positions}: no spot of {counts_file.name} is in tissue (in_tissue)")
    pairs, outside = pairs[on_tissue], int((~on_tissue).sum())
    without = left_out(
        len(barcodes), int(inside.sum()) + outside, len(pairs) + outside, "counts", "a position in tissue"
    )
    here = at[pairs[:, 1]]
    mpp = _scales(place / "spatial" / _SCALES).get("microns_per_pixel")
    return Section(
        image=partial(_image, section, outs, name),
        counts=sp.csr_matrix(counts[pairs[:, 0]]),
        barcodes=[barcodes[i] for i in pairs[:, 0]],
        genes=genes,
        gene_ids=ids,
        xy=numbers(here, ("pxl_col_in_fullres", "pxl_row_in_fullres"), positions),
        array_row=whole_numbers(numbers(here, ("array_row",), positions)[:, 0]),
        array_col=whole_numbers(numbers(here, ("array_col",), positions)[:, 0]),
        patient=name,
        mpp=mpp,
        mpp_source="Space Ranger" if mpp else "",
        notes=[*notes, *([f"{outside:,} outside the tissue left out"] if outside else []), *without],
    )


def _read_cells(section: Path, outs: Path, place: Path, um: int, name: str) -> Section:
    """Read segmented cells, each at its outline's centre, gathered into squares of `um` µm."""
    kind = next(name for name in _CELL_MATRICES if _has(place, name))
    counts, barcodes, genes, ids, counts_file, notes = matrix_of(place, kind)
    outlines = next(file for name in _CELLS if (file := _file(place, name)) is not None)
    mpp = _scales(place / "spatial" / _SCALES).get("microns_per_pixel")
    if mpp is None:
        raise ExpressionError(f"{place / 'spatial' / _SCALES} does not say microns_per_pixel")
    centres = _centres(outlines)
    named = {f"cellid_{number:09d}-1": at for number, at in centres.items()}
    pairs = joined(barcodes, list(named), counts_file, outlines)
    xy = np.array(list(named.values()), np.float64)[pairs[:, 1]]
    at, folded = squares(xy * mpp, sp.csr_matrix(counts[pairs[:, 0]]), um)
    without = left_out(len(barcodes), len(named), len(pairs), "counts", "an outline")
    return Section(
        image=partial(_image, section, outs, name),
        counts=folded,
        barcodes=[f"{x}x{y}" for x, y in at.tolist()],
        genes=genes,
        gene_ids=ids,
        xy=np.asarray((at + 0.5) * um / mpp, np.float64),
        array_row=at[:, 1],
        array_col=at[:, 0],
        patient=name,
        mpp=mpp,
        mpp_source="Space Ranger",
        notes=[*notes, f"{len(pairs):,} cells in squares of {um} µm", *without],
    )


def squares(um_xy: NDArray[np.float64], counts: sp.csr_matrix, um: int) -> tuple[NDArray[np.int64], sp.csr_matrix]:
    """Add up the counts (n × g) of what lies (n × 2, µm) in the same square; return their columns and rows too."""
    at, square = np.unique(np.floor(um_xy / um).astype(np.int64), axis=0, return_inverse=True)
    n = len(um_xy)
    fold = sp.csr_matrix((np.ones(n, np.float32), (square.ravel(), np.arange(n))), (len(at), n))
    return at, sp.csr_matrix(fold @ counts)


def _centres(outlines: Path) -> dict[int, tuple[float, float]]:
    """Return x and y of every cell's outline, level-0 px, by the number of the cell."""
    from shapely.geometry import shape

    centres = dict[int, tuple[float, float]]()
    with fault_of(ExpressionError, f"{outlines} cannot be read as outlines of cells"):
        for feature in json.loads(outlines.read_bytes())["features"]:
            point = shape(feature["geometry"]).centroid
            centres[int(feature["properties"]["cell_id"])] = (point.x, point.y)
    return centres


def _image(section: Path, outs: Path, name: str) -> Path:
    """Return the microscope's image. Raises ExpressionError saying where it was looked for, and under which names."""
    inside = [path for place in dict.fromkeys((section, outs)) for path in place.iterdir() if path.name[0] not in "._"]
    beside = [path for path in section.resolve().parent.iterdir() if _begins(path.name, name)]
    recorded = _invoked(section)
    told = [place / path.name for path in recorded for place in (section, section.resolve().parent, path.parent)]
    of_others = [*inside, *beside]
    for candidates in (inside, beside, [path for path in told if path.is_file()]):
        images = [path for path in dict.fromkeys(candidates) if is_image(path)]
        kept = [path for path in images if not _NOT_OF_THE_MICROSCOPE.search(path.name)]
        kept = [path for path in kept if _OF_THE_MICROSCOPE.search(path.name)] or kept
        if len({path.resolve() for path in kept}) == 1:
            return kept[0]
        if kept:
            return one_image(kept, f"of the microscope in {section}")
    cytassist = any("cytassist" in path.name.lower() for path in of_others)
    was = f". Space Ranger was given {listed(path.name for path in recorded)}" if recorded else ""
    others = [words for words in map(refused_kind, of_others) if words is not None]
    own = ". CytAssist has an image of its own, which is too coarse" if cytassist else ""
    raise ExpressionError(
        f"there is no image of the microscope in {section}, nor beside it as {name}{{{', '.join(IMAGES[:3])}, …}}: "
        f"Space Ranger copies it nowhere{was}{own}. Say where it is: --images FOLDER, 'PATTERN', or a CSV of "
        "section,image" + "".join(f". {words}" for words in others[:1])
    )


def _begins(file: str, section: str) -> bool:
    """Whether a file is named after a section: S1 is no name for S10.tif."""
    return file.startswith(section) and not file[len(section) : len(section) + 1].isalnum()


def _invoked(section: Path) -> list[Path]:
    """Return the images that Space Ranger was given, as the record of its call beside outs/ names them."""
    file = section / "_invocation"
    if not file.is_file():
        return []
    named = _INVOCATION.search(file.read_text("utf-8", "replace"))
    return [] if named is None else [Path(each) for each in re.findall(r'"([^"]+)"', named.group(1))]


def matrix_of(place: Path, name: str) -> tuple[sp.csr_matrix, list[str], list[str], list[str], Path, list[str]]:
    """Return counts (n × g), barcodes, genes, their ids, the file, and what to say of the features that are none.

    Raises ExpressionError where there is neither `name`.h5 nor a folder of that name, or it is damaged.
    """
    file, folder = _file(place, f"{name}.h5"), _file(place, name)
    found = file or folder
    if found is None:
        raise ExpressionError(f"there is neither {name}.h5 nor {name}/ in {place}")
    counts, barcodes, names, ids, types = _of_h5(found) if found is file else _of_mtx(found)
    counts, names, ids, notes = only_genes(counts, names, ids, types)
    return counts, barcodes, names, ids, found, notes


_Features = tuple[sp.csr_matrix, list[str], list[str], list[str], list[str] | None]


def _of_h5(path: Path) -> _Features:
    """Read 10x's HDF5: v3 has `matrix` with `features`, v2 a group named after the genome with `gene_names`.

    Of several genomes each is a group of its own, with the same barcodes or others.
    """
    import h5py

    try:
        require_h5(path)
        with h5py.File(path) as opened:
            groups = ["matrix"] if "matrix" in opened else [name for name in opened if "indptr" in opened[name]]
            if len(groups) > 1:
                raise ValueError(f"it holds {len(groups)} matrices, of the genomes {listed(groups)}; one is expected")
            group = opened[groups[0]]
            features = "features" in group
            names, ids = ("features/name", "features/id") if features else ("gene_names", "genes")
            types = _texts(group["features/feature_type"]) if "features/feature_type" in group else None
            n_genes, n_spots = (int(n) for n in group["shape"][:])
            parts = (group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:])
            counts = sp.csr_matrix(parts, shape=(n_spots, n_genes))  # the file is genes × spots by columns
            checked_matrix(counts, "the matrix")
            found = _texts(group["barcodes"]), _texts(group[names]), _texts(group[ids])
            if [len(found[0]), len(found[1]), len(found[2])] != [n_spots, n_genes, n_genes]:
                raise ValueError(
                    f"it has {n_spots:,} × {n_genes:,} counts, {len(found[0]):,} barcodes and {len(found[1]):,} genes"
                )
            return (counts, *found, types)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise ExpressionError(f"{path} is no matrix of Space Ranger: {reason_of(error)}") from error


def _texts(values: Any) -> list[str]:
    return [each.decode() if isinstance(each, bytes) else str(each) for each in values[:]]


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


def _of_mtx(folder: Path) -> _Features:
    from scipy.io import mmread

    def lines(*names: str) -> list[list[str]]:
        import gzip

        for name in names:
            for path in (folder / f"{name}.gz", folder / name):
                if path.is_file():
                    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                    return [line.split("\t") for line in data.decode().splitlines() if line]
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
        [line[2] for line in features] if all(len(line) > 2 for line in features) else None,
    )


def _scales(path: Path) -> dict[str, float]:
    values = read_json(path)
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float)) and value > 0}
