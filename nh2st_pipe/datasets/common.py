"""What every importer shares: a section as it was published, written as `.h5ad`, and what is done where one fails.

An importer finds the sections of its layout and says how each is read. Reading one may fail: it is named, and the
others go on.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import (
    OF_ONE_SLIDE,
    ExpressionError,
    NH2STError,
    UsageError,
    fault_of,
    listed,
    nearest,
    reason_of,
)
from nh2st_pipe.core.h5ad import write_h5ad
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.slides.kinds import is_image, refused_kind
from nh2st_pipe.tiles.manifest import SlideRow

__all__ = [
    "CONTROLS",
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
    "numbers",
    "one_image",
    "only_genes",
    "put_together",
    "read_frame",
    "read_json",
    "unreadable",
    "whole_numbers",
    "write_section",
]

PATCH = 224
"""Side of the patches that datasets without slides have, px."""

_LONGEST = 80  # letters of a slide_id
_COLUMNS_AT_ONCE = 1000
_TILE = 512


@dataclass(frozen=True)
class Made:
    """An image that is not among the published files as it is needed: it is made of what is."""

    name: str
    """Of the file."""
    write: Callable[[Path], None]


Image = Path | Made
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Section:
    """One section as it was published. n spots, g genes."""

    image: Image | Callable[[], Image]
    """Or what finds it, where it may be given by hand."""
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
    name: str = ""
    """What it is called where it was found; `slide_id` is that, until it is imported."""


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


def slide_ids(found: Sequence[Found]) -> dict[str, str]:
    """Return for each section's name the slide_id that a manifest takes: letters, digits and ._-, no two the same."""
    ids = dict[str, str]()
    for name in dict.fromkeys(each.slide_id for each in found):
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        wanted = _NAME.sub("_", plain).strip("_.-")[:_LONGEST] or "section"
        taken, number = {each.lower() for each in ids.values()}, 2
        new = wanted
        while new.lower() in taken:
            new, number = f"{wanted}_{number}", number + 1
        ids[name] = new
    return ids


def unreadable(slide_id: str, error: Exception, about: Mapping[str, str] | None = None) -> Found:
    """Return a section that cannot even be looked at: it is left out where it is read, and no other with it."""

    def read() -> Section:
        raise error if isinstance(error, NH2STError) else ExpressionError(reason_of(error)) from error

    return Found(slide_id, read, about or {})


def import_sections(
    found: Sequence[Found],
    expression_dir: Path,
    source: str,
    say: Callable[[str], None],
    image_of: Callable[[str], Path | None] = lambda name: None,
) -> tuple[list[SlideRow], dict[str, str]]:
    """Write an `.h5ad` for each section under `expression_dir`; return the manifest's rows, and what failed and why.

    `image_of` returns the image that is given for a section by hand.
    """
    rows, failed, ids = list[SlideRow](), dict[str, str](), slide_ids(found)
    for each in (replace(one, slide_id=ids[one.slide_id], name=one.slide_id) for one in found):
        target = expression_dir / f"{each.slide_id}.h5ad"
        if each.name != each.slide_id:
            say(f"section '{each.name}' is called {each.slide_id} in the manifest")
        try:
            with fault_of(ExpressionError, f"section {each.slide_id} cannot be read"):
                given = image_of(each.name)
                section = each.read()
                found_image = given or (section.image() if callable(section.image) else section.image)
                _tidy(section)
                write_section(target, section, source)
            if isinstance(found_image, Made):
                image = expression_dir.parent / "images" / found_image.name
                image.parent.mkdir(parents=True, exist_ok=True)
                found_image.write(image)
            else:
                image = found_image
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


CONTROLS = ("NegControl", "BLANK", "Unassigned", "UnassignedCodeword", "antisense", "Intergenic", "Deprecated")
"""How probes are called that are no gene's, where a file does not say it otherwise."""
_GENES = "Gene Expression"


def only_genes(
    counts: sp.csr_matrix, genes: Sequence[str], ids: Sequence[str], types: Sequence[str] | None
) -> tuple[sp.csr_matrix, list[str], list[str], list[str]]:
    """Return counts (n × g), names and ids of genes alone, and what to say of the features that are none.

    `types` are 10x's feature types; without them, probes are known by their names. Antibodies and guides often have a
    gene's name, and counts of another order.
    """
    if types is not None:
        kept = np.array([each.strip() in (_GENES, "") for each in types], bool)
        other = Counter(each.strip() for each, keep in zip(types, kept, strict=True) if not keep)
    else:
        kept = np.array([not name.startswith(CONTROLS) for name in genes], bool)
        other = Counter({"control probes": int((~kept).sum())})
    if not kept.any():
        raise ExpressionError(f"none of its {len(genes):,} features is a gene ({listed(other)})")
    if kept.all():
        return counts, list(genes), list(ids), []
    words = ", ".join(f"{number:,} {name}" for name, number in sorted(other.items()))
    named, own = ([each for each, keep in zip(every, kept, strict=True) if keep] for every in (genes, ids))
    return sp.csr_matrix(counts[:, kept]), named, own, [f"features that are no genes left out: {words}"]


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
    one, other = pd.Index(counts_of, dtype=object), pd.Index(places_of, dtype=object)
    for names, file in ((one, counts), (other, places)):
        if names.has_duplicates:
            raise ExpressionError(f"{file}: the spot {names[names.duplicated()][0]} stands in more than one row")
    at = other.get_indexer(one)
    rows = np.flatnonzero(at >= 0)
    if not len(rows):
        named = f"{_first(counts_of)} in the one, {_first(places_of)} in the other"
        raise ExpressionError(f"{counts} and {places} have no spot in common: {named}")
    return np.column_stack((rows, at[rows])).astype(np.int64)


def _first(names: Sequence[str]) -> str:
    return listed(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def left_out(n_counts: int, n_places: int, n_both: int, counts: str = "counts", places: str = "places") -> list[str]:
    """Return a note on spots that are in one of two tables alone, from both sides."""
    words = [(n_counts - n_both, counts, places), (n_places - n_both, places, counts)]
    return [f"{number:,} with {has} and without {lacks} left out" for number, has, lacks in words if number]


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Return the files below `folder` that match, sorted, without hidden ones: macOS leaves `._A1.tsv.gz` beside
    `A1.tsv.gz` on disks of other systems.
    """
    found = (path for path in folder.glob(pattern) if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


_MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "#N/A", "#NA", "<NA>", "-nan", "NAN")
"""How spreadsheets, R and pandas write that a value is missing."""


def read_frame(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a table, whatever it is saved as: Parquet, or text with commas, tabs or semicolons, gzipped or not.

    Its first line names its columns; where that is none of `columns` and holds numbers, there is no header, and they
    are those. Spaces and quotation marks around names, a byte-order mark and UTF-16 are no part of them, and what
    programs write for a missing value is missing in every column. Raises ExpressionError naming the file.
    """
    try:
        data = path.read_bytes()
        if data[:4] == b"PAR1":
            return _named(pl.read_parquet(io.BytesIO(data)))
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        first = text.lstrip("\r\n").split("\n", 1)[0]
        separator = max(",\t;", key=first.count)
        cells = [cell.strip(" \"'\r") for cell in first.split(separator)]
        bare = columns is not None and not set(cells) & set(columns) and any(map(_is_number, cells))
        table = pl.read_csv(
            text.lstrip("\r\n").encode(),
            separator=separator,
            has_header=not bare,
            infer_schema_length=None,
            null_values=list(_MISSING),
            truncate_ragged_lines=False,
        )
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ExpressionError(f"{path} is not a readable table: {reason_of(error)}") from error
    if bare and columns is not None:
        return table.rename(dict(zip(table.columns, columns, strict=False)))
    return _named(table)


def _named(table: pl.DataFrame) -> pl.DataFrame:
    """Return a table whose columns' names have no spaces around them."""
    named = {name: name.strip() for name in table.columns}
    return table.rename(named) if len(set(named.values())) == len(named) else table


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def numbers(table: pl.DataFrame, columns: Sequence[str], path: Path) -> NDArray[np.float64]:
    """Return columns as numbers, n × k. Raises ExpressionError naming the rows in which one is missing or is none."""
    found = table.select(pl.col(name).cast(pl.Float64, strict=False) for name in columns)
    lacking = np.flatnonzero(~np.isfinite(found.to_numpy().astype(np.float64)).all(axis=1))
    if len(lacking):
        rows = listed((row + 1 for row in lacking), 3)
        raise ExpressionError(f"{path}: {' or '.join(columns)} is no number in {len(lacking)} rows ({rows})")
    return found.to_numpy().astype(np.float64)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON mapping in a file, none where there is no file. Raises ExpressionError where it is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExpressionError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise ExpressionError(f"{path} holds no names with values, as JSON has them in braces")
    return values


def counts_of(table: pl.DataFrame, path: Path) -> sp.csr_matrix:
    """Return a table of numbers as counts. Raises ExpressionError naming columns that hold something else."""
    strange = [name for name, kind in table.schema.items() if not kind.is_numeric()]
    if strange:
        raise ExpressionError(f"{path}: the columns {listed(strange, 3)} hold no numbers")
    empty = [name for name, missing in table.null_count().row(0, named=True).items() if missing] if table.width else []
    if empty:
        raise ExpressionError(f"{path}: values are missing in {len(empty):,} columns ({listed(empty, 3)})")
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
    images = [path for path in candidates if is_image(path)]
    if len(images) == 1:
        return images[0]
    if images:
        raise ExpressionError(
            f"{len(images)} images {what} ({listed((path.name for path in images), 3)}); one is expected, and --images "
            "says which"
        )
    others = [words for words in map(refused_kind, candidates) if words is not None]
    raise ExpressionError(f"no image {what}; one is expected{''.join(f'. {words}' for words in others[:1])}")


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
