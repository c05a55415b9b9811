"""What every importer shares: a section as it was published, written as `.h5ad`, and what is done where one fails.

An importer finds the sections of its layout and says how each is read. Reading one may fail: it is named, and the
others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import OF_ONE_SLIDE, ExpressionError, UsageError, fault_of, listed, nearest, reason_of
from nh2st_pipe.core.h5ad import write_h5ad
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.tiles.manifest import SlideRow

__all__ = [
    "IMAGES",
    "PATCH",
    "Found",
    "Made",
    "Section",
    "chosen",
    "counts_of",
    "files_of",
    "import_sections",
    "joined",
    "left_out",
    "needed",
    "one_image",
    "put_together",
    "read_delimited",
    "whole_numbers",
    "write_section",
]

PATCH = 224
"""Side of the patches that datasets without slides have, px."""

_COLUMNS_AT_ONCE = 1000
_TILE = 512

IMAGES = (".jpg", ".jpeg", ".tif", ".tiff", ".png", ".svs", ".ndpi")


@dataclass(frozen=True)
class Made:
    """An image that is not among the published files as it is needed: it is made of what is."""

    name: str
    """Of the file."""
    write: Callable[[Path], None]


@dataclass
class Section:
    """One section as it was published. n spots, g genes."""

    image: Path | Made
    counts: sp.csr_matrix
    """n × g, raw."""
    barcodes: list[str]
    genes: list[str]
    xy: NDArray[np.float64]
    """n × 2: spot centres, full-resolution px of `image`, x (along its width) then y."""
    array_row: NDArray[np.int64] | None = None
    array_col: NDArray[np.int64] | None = None
    patient: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    gene_ids: list[str] | None = None
    """Other names of the genes (Ensembl's)."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: what was left out, and where a value is from."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns of the manifest."""


@dataclass(frozen=True)
class Found:
    """A section that was found, not yet read."""

    slide_id: str
    read: Callable[[], Section]
    about: Mapping[str, str] = field(default_factory=dict)
    """What is known of it beforehand, for choosing among many."""
    only_where: tuple[str, ...] = ()
    """Keys without which it is not taken: where it is one of several readings of the same section."""


def chosen(found: Sequence[Found], where: Mapping[str, str]) -> list[Found]:
    """Return the sections whose `about` is as in `where`: key → value, or a pattern such as INT*; case is no matter.

    Raises UsageError where a key is known of none of them, or nothing is left.
    """
    every = {key for each in found for key in each.about} | {"id"}
    kept = [each for each in found if where.keys() >= set(each.only_where)]
    for key, pattern in where.items():
        if key not in every:
            known = listed(sorted(every), 12)
            raise UsageError(f"--where: nothing is called '{key}'{nearest(key, every)} (there is {known})")
        kept = [
            each
            for each in kept
            if fnmatchcase((each.slide_id if key == "id" else each.about.get(key, "")).lower(), pattern.lower())
        ]
        if not kept:
            values = sorted({each.slide_id if key == "id" else each.about.get(key, "") for each in found})
            raise UsageError(f"--where {key}={pattern} leaves no section; there is {listed(values, 12)}")
    readings = dict[str, list[Mapping[str, str]]]()
    for each in kept:
        readings.setdefault(each.slide_id, []).append(each.about)
    for slide_id, abouts in readings.items():
        if len(abouts) > 1:
            parts = sorted(key for key in {*abouts[0]} if len({about.get(key) for about in abouts}) > 1)
            raise UsageError(f"--where leaves several readings of {slide_id}: say one {' and '.join(parts)}")
    return kept


def import_sections(
    found: Iterable[Found], expression_dir: Path, source: str, say: Callable[[str], None]
) -> tuple[list[SlideRow], dict[str, str]]:
    """Write an `.h5ad` for each section under `expression_dir`; return the manifest's rows, and what failed and why."""
    rows, failed = list[SlideRow](), dict[str, str]()
    for each in found:
        target = expression_dir / f"{each.slide_id}.h5ad"
        try:
            with fault_of(ExpressionError, f"section {each.slide_id} cannot be read"):
                section = each.read()
                _tidy(section)
                write_section(target, section, source)
            if isinstance(section.image, Made):
                image = expression_dir.parent / "images" / section.image.name
                image.parent.mkdir(parents=True, exist_ok=True)
                section.image.write(image)
            else:
                image = section.image
        except OF_ONE_SLIDE as error:
            failed[each.slide_id] = str(error)
            say(f"{each.slide_id} is left out: {error}")
            continue
        words = "; ".join([f"{len(section.barcodes):,} spots × {len(section.genes):,} genes", *section.notes])
        say(f"{each.slide_id}: {words}")
        patient = section.patient or each.slide_id
        place, expression = image.resolve(), target.resolve()
        rows.append(SlideRow(each.slide_id, place, expression, patient, section.mpp, extra=section.extra))
    return rows, failed


def _tidy(section: Section) -> None:
    """Put right what layouts of all kinds have wrong, and say it. Raises ExpressionError where nothing is left."""
    if not section.barcodes:
        raise ExpressionError("no spot is left of it")
    twice = pd.Index(section.barcodes)[pd.Index(section.barcodes).duplicated()]
    if len(twice):
        raise ExpressionError(f"{len(twice)} spots stand in more than one row: {listed(dict.fromkeys(twice), 3)}")
    names = pd.Index(section.genes)
    if names.has_duplicates:
        codes, kept = pd.factorize(names)
        fold = sp.csr_matrix((np.ones(len(codes)), (np.arange(len(codes)), codes)), shape=(len(codes), len(kept)))
        doubled = names[names.duplicated()].unique()
        section.notes.append(f"counts of {len(doubled):,} genes that stand twice are added up ({listed(doubled, 3)})")
        section.counts = sp.csr_matrix(section.counts @ fold)
        if section.gene_ids is not None:
            first = pd.Series(section.gene_ids, dtype=object).groupby(codes).first()
            section.gene_ids = [str(name) for name in first]
        section.genes = [str(name) for name in kept]


def write_section(path: Path, section: Section, source: str, uns: Mapping[str, Any] | None = None) -> None:
    """Write a section as `.h5ad`, with what `uns` adds."""
    obs = pd.DataFrame(index=pd.Index(section.barcodes, name="barcode", dtype=object))
    for name, values in (("array_row", section.array_row), ("array_col", section.array_col)):
        if values is not None:
            obs[name] = values
    var = pd.DataFrame(index=pd.Index(section.genes, name="gene", dtype=object))
    if section.gene_ids is not None:
        var["gene_id"] = section.gene_ids
    data = anndata.AnnData(section.counts.astype(np.float32), obs=obs, var=var)
    data.obsm["spatial"] = section.xy.astype(np.float64)
    data.uns.update({"source": source, "patient": section.patient, **(uns or {})})
    if section.mpp is not None:
        data.uns.update({"mpp": section.mpp, "mpp_source": section.mpp_source})
    write_h5ad(data, path)


def joined(counts_of: Sequence[str], places_of: Sequence[str], counts: Path, places: Path) -> NDArray[np.int64]:
    """Return pairs k × 2 of rows with the same spot in two tables, in the order of the counts.

    Raises ExpressionError where a spot stands twice, or none is in both.
    """
    for names, file in ((counts_of, counts), (places_of, places)):
        seen = pd.Index(names)
        if seen.has_duplicates:
            raise ExpressionError(f"{file}: the spot {seen[seen.duplicated()][0]} stands in more than one row")
    at = {name: row for row, name in enumerate(places_of)}
    pairs = [(row, at[name]) for row, name in enumerate(counts_of) if name in at]
    if not pairs:
        named = f"{listed(counts_of, 3)} in the one, {listed(places_of, 3)} in the other"
        raise ExpressionError(f"{counts} and {places} have no spot in common: {named}")
    return np.array(pairs, np.int64)


def left_out(n_counts: int, n_places: int, n_both: int) -> list[str]:
    """Return a note on spots that are in one of two tables alone."""
    dropped = n_counts + n_places - 2 * n_both
    return [f"{dropped} in only one of the two files left out"] if dropped else []


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Return the files below `folder` that match, sorted, without hidden ones: macOS leaves `._A1.tsv.gz` beside
    `A1.tsv.gz` on disks of other systems.
    """
    found = (path for path in folder.glob(pattern) if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_delimited(path: Path, separator: str = "\t", *, header: bool = True) -> pl.DataFrame:
    """Read a table, gzipped or not, its columns named by its first line (`header`).

    Raises ExpressionError naming it where it is none.
    """
    try:
        return pl.read_csv(path.read_bytes(), separator=separator, has_header=header, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{path} is not a readable table: {reason_of(error)}") from error


def counts_of(table: pl.DataFrame, path: Path) -> sp.csr_matrix:
    """Return a table of numbers as counts. Raises ExpressionError naming columns that hold something else."""
    strange = [name for name, kind in table.schema.items() if not kind.is_numeric()]
    if strange:
        raise ExpressionError(f"{path}: the columns {listed(strange, 3)} hold no numbers")
    some = range(0, table.width, _COLUMNS_AT_ONCE)
    parts = [table[:, at : at + _COLUMNS_AT_ONCE].to_numpy().astype(np.float32) for at in some]
    return sp.csr_matrix(sp.hstack([sp.csr_matrix(part) for part in parts]))


def needed(table: pl.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Raise ExpressionError where a table lacks columns."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ExpressionError(f"{path} lacks the columns {', '.join(missing)}")


def one_image(candidates: Sequence[Path], what: str) -> Path:
    """Return the only image among files. Raises ExpressionError where there is none, or several."""
    images = [path for path in candidates if path.suffix.lower() in IMAGES]
    if len(images) != 1:
        raise ExpressionError(f"{'no image' if not images else f'{len(images)} images'} {what}; one is expected")
    return images[0]


def whole_numbers(values: Any) -> NDArray[np.int64]:
    """Return rounded values."""
    return np.rint(np.asarray(values, np.float64)).astype(np.int64)


def put_together(xy: NDArray[np.int64], patches: NDArray[np.uint8], path: Path) -> None:
    """Write an image of patches n × 224 × 224 × 3 around their centres, a row of tiles at a time, lossless."""
    import tifffile

    width, height = (int(side) for side in xy.max(0) + PATCH)
    half = PATCH // 2

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for top in range(0, height, _TILE):
            band = np.full((_TILE, -(-width // _TILE) * _TILE, 3), 255, np.uint8)
            for i in np.flatnonzero((xy[:, 1] + half > top) & (xy[:, 1] - half < top + _TILE)):
                left, above = xy[i] - half
                first, last = max(above, top), min(above + PATCH, top + _TILE)
                band[first - top : last - top, left : left + PATCH] = patches[i, first - above : last - above]
            yield from np.split(band, band.shape[1] // _TILE, axis=1)

    with written_whole(path) as part, tifffile.TiffWriter(part, bigtiff=True) as tif:
        tif.write(
            (np.ascontiguousarray(tile) for tile in tiles()),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(_TILE, _TILE),
            photometric="rgb",
            compression="deflate",
        )
