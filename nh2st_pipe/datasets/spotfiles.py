"""Sections of the first spatial transcriptomics arrays, as their authors and as TRIPLEX's repackaging publish them.

    her2st   Andersson et al. 2021 (almaan/her2st, Zenodo 3957257)    stnet   He et al. 2020    skin   Ji et al. 2020
    ST-imgs/<patient>/<section>/*.jpg   or   ST-imgs/*<section>.tif, .jpg    H&E, full resolution
    ST-cnts/<section>.tsv.gz            or   ST-cnts/<section>_sub.parquet   spots × genes, row names "XxY"
    ST-spotfiles/<section>_selection.tsv     x, y, and pixel_x, pixel_y; her2st's has new_x, new_y and selected too

STNet and cSCC are read as their authors published them too, all files in one folder or below it:

    stnet   *BC23209_C1.jpg   BC23209_C1_stdata.tsv.gz   spots_BC23209_C1.csv.gz (XxY, X, Y: px along width and height)
    skin    GSM…_P2_ST_rep1.jpg(.gz)   GSM…_P2_ST_rep1_stdata.tsv.gz   GSM…_spot_data-selection-P2_ST_rep1.tsv.gz

The spots kept are those in both files, joined by "XxY". x counts columns and pixel_x runs along the image's width. The
images carry no resolution; it is estimated from the pitch of the array where that is known.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from nh2st_pipe.core.errors import ExpressionError, reason_of
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.datasets.common import (
    Found,
    Made,
    Section,
    counts_of,
    files_of,
    joined,
    left_out,
    needed,
    numbers,
    one_image,
    read_frame,
    whole_numbers,
)
from nh2st_pipe.slides.kinds import IMAGES
from nh2st_pipe.tiles.lattice import SPOT_PITCH_UM, array_pitch_px

__all__ = ["find_her2st", "find_skin", "find_stnet"]

_STDATA = re.compile(r"(?:GSM\d+_)?(.+)_stdata\.tsv(?:\.gz)?")
_COUNTS = ("{}_sub.parquet", "{}.tsv.gz", "{}.tsv")


def find_her2st(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections named after their patient, A to H. Raises ExpressionError where `folder` is of another layout."""
    return _find(folder, say, r"[A-Z]", pitch_um=SPOT_PITCH_UM["square"])


def find_stnet(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections named after their patient, as in BC23209_C1."""
    patient, pitch_um = r"B[CT]\d+", SPOT_PITCH_UM["square"]
    if not (folder / "ST-cnts").is_dir():
        return _find_original(folder, say, patient, pitch_um, r"spots_{}\.csv(\.gz)?")
    return _find(folder, say, patient, pitch_um)


def find_skin(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find sections named after their patient, as in P2_ST_rep1. The pitch of their array is not published."""
    if not (folder / "ST-cnts").is_dir():
        return _find_original(folder, say, r"P\d+", None, r"(GSM\d+_)?spot_data-selection-{}\.tsv(\.gz)?")
    return _find(folder, say, r"P\d+", pitch_um=None)


@dataclass(frozen=True)
class _Files:
    """The files of one section, as they are named where some are missing."""

    name: str
    counts: Path
    places: Path
    image: Callable[[], Path | Made]


def _find(folder: Path, say: Callable[[str], None], patient: str, pitch_um: float | None) -> list[Found]:
    names: dict[str, Path] = {}
    endings = ("*_sub.parquet", "*.tsv.gz", "*.tsv")
    for file in [each for ending in endings for each in files_of(folder, f"ST-cnts/{ending}")]:
        name = re.sub(r"(_sub\.parquet|\.tsv(\.gz)?)$", "", file.name)
        first = names.setdefault(name, file)
        if first is not file:
            say(f"{file.name} is passed over: {first.name} is the same section")
    for file in files_of(folder, "ST-spotfiles/*_selection.tsv"):
        name = file.name.removesuffix("_selection.tsv")
        names.setdefault(name, folder / "ST-cnts" / _COUNTS[0].format(name))
    if not names:
        raise ExpressionError(
            f"there is no ST-cnts/<section>.tsv.gz or <section>_sub.parquet in {folder}; expected are ST-imgs/, "
            "ST-cnts/ and ST-spotfiles/"
        )
    found = []
    for name, file in sorted(names.items()):
        who = re.search(patient, name)
        of = who.group() if who else name
        places = folder / "ST-spotfiles" / f"{name}_selection.tsv"
        files = _Files(name, file, places, partial(_image, folder, name))
        found.append(Found(name, partial(_read, files, of, pitch_um), {"patient": of}))
    return found


def _find_original(
    folder: Path, say: Callable[[str], None], patient: str, pitch_um: float | None, places: str
) -> list[Found]:
    """Find the sections of a folder as their authors left it; `places` is how files of positions are called."""
    every = files_of(folder, "**/*")
    found = dict[str, Found]()
    for file in every:
        named = _STDATA.fullmatch(file.name)
        if not named:
            continue
        name = named.group(1)
        if name in found:
            say(f"{file} is passed over: there is another of this section")
            continue
        pattern = re.compile(places.format(re.escape(name)))
        positions = next((path for path in every if pattern.fullmatch(path.name)), None)
        who = re.search(patient, name)
        of = who.group() if who else name
        lacking = file.with_name(re.sub(r"\(.*?\)\?|\\", "", places).format(name))
        files = _Files(name, file, positions or lacking, partial(_image_among, every, name, folder))
        found[name] = Found(name, partial(_read, files, of, pitch_um), {"patient": of})
    if not found:
        raise ExpressionError(
            f"there is neither ST-cnts/ (as repackaged for TRIPLEX) nor any <section>_stdata.tsv.gz (as its authors "
            f"published it) in {folder}"
        )
    return [found[name] for name in sorted(found)]


def _image_among(files: list[Path], name: str, folder: Path) -> Path | Made:
    ends = [path for path in files if re.search(rf"(^|_){re.escape(name)}$", path.name.split(".")[0])]
    packed = [path for path in ends if path.suffix == ".gz" and path.with_suffix("").suffix.lower() in IMAGES]
    if packed and not any(path.suffix.lower() in IMAGES for path in ends):
        return Made(packed[0].stem, partial(_unpack, packed[0]))
    return one_image(ends, f"for section {name} in {folder}")


def _unpack(packed: Path, path: Path) -> None:
    try:
        with written_whole(path) as part, gzip.open(packed) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (OSError, EOFError) as error:
        raise ExpressionError(f"{packed} cannot be unpacked: {reason_of(error)}") from error


def _read(files: _Files, patient: str, pitch_um: float | None) -> Section:
    image, count_file, spot_file = files.image(), files.counts, files.places
    for file, without in ((count_file, "there are no counts"), (spot_file, f"{count_file.name} has no positions")):
        if not file.is_file():
            raise ExpressionError(f"{file} is missing; {without} without it")
    places, counts = _places(spot_file), _counts(count_file)
    column, row = whole_numbers(numbers(places, ("x", "y"), spot_file)).T
    barcodes = [str(each) for each in counts[counts.columns[0]]]
    pairs = joined(barcodes, [f"{x}x{y}" for x, y in zip(column, row, strict=True)], count_file, spot_file)
    matrix = counts.drop(counts.columns[0])[pairs[:, 0]]
    at = places[pairs[:, 1]]
    xy = numbers(at, ("pixel_x", "pixel_y"), spot_file)
    section = Section(
        image=image,
        counts=counts_of(matrix, count_file),
        barcodes=[barcodes[i] for i in pairs[:, 0]],
        genes=matrix.columns,
        xy=xy,
        array_row=row[pairs[:, 1]],
        array_col=column[pairs[:, 1]],
        patient=patient,
        notes=left_out(len(barcodes), places.height, len(pairs)),
    )
    if pitch_um is not None:
        exact = ("new_x", "new_y") if {"new_x", "new_y"} <= set(places.columns) else ("x", "y")
        pitch = array_pitch_px(xy, numbers(at, exact, spot_file))
        if pitch is None:
            what = f"pixel_x, pixel_y and {', '.join(exact)}"
            raise ExpressionError(f"{spot_file}: {what} are not those of one square array")
        section.mpp, section.mpp_source = pitch_um / pitch, f"{pitch_um:.0f} µm array pitch"
        section.notes.append(f"{section.mpp:.4f} µm per px estimated from the {pitch_um:.0f} µm pitch")
    return section


def _places(path: Path) -> pl.DataFrame:
    """Read a table of positions: x, y on the array and pixel_x, pixel_y, whatever they are called."""
    if ".csv" not in path.suffixes:
        table = read_frame(path)
        needed(table, ("x", "y", "pixel_x", "pixel_y"), path)
        return table
    table = read_frame(path)
    needed(table, ("X", "Y"), path)
    parted = table[table.columns[0]].cast(pl.String).str.extract_groups(r"^(?<x>-?[0-9.]+)x(?<y>-?[0-9.]+)$")
    on_array = parted.struct.unnest().cast(pl.Float64)
    if on_array.null_count().row(0) != (0, 0):
        raise ExpressionError(f"{path}: its first column does not name spots as XxY")
    return on_array.with_columns(pixel_x=table["X"], pixel_y=table["Y"])


def _counts(path: Path) -> pl.DataFrame:
    """Read a table of counts, the spots' names in its first column."""
    table = read_frame(path)
    if path.suffix != ".parquet":
        return table
    names = [name for name, kind in table.schema.items() if not kind.is_numeric()]
    if len(names) != 1:
        raise ExpressionError(f"{path}: one column of names of spots is expected, and there are {len(names)}")
    return table.select(names[0], pl.exclude(names[0]))


def _image(folder: Path, name: str) -> Path:
    inside = files_of(folder, f"ST-imgs/*/{name}/*")
    beside = [path for path in files_of(folder, "ST-imgs/*") if path.stem == name or path.stem.endswith(f"_{name}")]
    return one_image(inside or beside, f"for section {name} in {folder / 'ST-imgs'}")
