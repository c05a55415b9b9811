"""STimage-1K4M (Chen et al. 2024), and the parts of it that the paper calls PCW and Mouse.

    image/<section>.png             H&E
    gene_exp/<section>_count.csv    spots × genes, row names "<section>_XxY" or "<section>_<barcode>"
    coord/<section>_coord.csv       the same names; xaxis, yaxis (px of the image, along its width and height), r

PCW and Mouse have places that are no whole numbers, and so have names like "…_10.02x12.98". The images carry no
resolution, and the pitch of their arrays is not said: tiles are given in px (--tile-px).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.datasets.common import (
    Found,
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

__all__ = ["find_stimage"]

_STAGE = re.compile(r"(?:^|_)(\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)?PCW)(?:_|$)")
_PLACE = re.compile(r"(?:^|_)(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)$")


def find_stimage(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find the sections that have counts or places. Raises ExpressionError where there are none."""
    names = {file.name.removesuffix("_count.csv") for file in files_of(folder, "gene_exp/*_count.csv")}
    names |= {file.name.removesuffix("_coord.csv") for file in files_of(folder, "coord/*_coord.csv")}
    if not names:
        raise ExpressionError(
            f"there is no gene_exp/<section>_count.csv in {folder}; expected are image/, gene_exp/ and coord/"
        )
    return [Found(name, partial(_read, folder, name), _about(name)) for name in sorted(names)]


def _about(name: str) -> dict[str, str]:
    """Return what a name says: Human_Heart_… is an organ of a species, 6.5PCW the weeks after conception."""
    words = name.split("_")
    known = {"species": words[0], "organ": words[1]} if len(words) > 2 else {}
    stage = _STAGE.search(name)
    return {**known, "stage": stage.group(1)} if stage else known


def _read(folder: Path, name: str) -> Section:
    count_file, coord_file = folder / f"gene_exp/{name}_count.csv", folder / f"coord/{name}_coord.csv"
    for file in (count_file, coord_file):
        if not file.is_file():
            raise ExpressionError(f"{file} is missing")
    counts, places = read_frame(count_file), read_frame(coord_file)
    needed(places, ("xaxis", "yaxis"), coord_file)
    barcodes, named = ([str(each) for each in table[table.columns[0]]] for table in (counts, places))
    pairs = joined(barcodes, named, count_file, coord_file)
    matrix = counts.drop(counts.columns[0])[pairs[:, 0]]
    kept = [barcodes[i] for i in pairs[:, 0]]
    array = [_PLACE.search(barcode) for barcode in kept]
    images = [path for path in files_of(folder, "image/*") if path.stem == name]
    section = Section(
        image=one_image(images, f"for section {name} in {folder / 'image'}"),
        counts=counts_of(matrix, count_file),
        barcodes=kept,
        genes=matrix.columns,
        xy=numbers(places[pairs[:, 1]], ("xaxis", "yaxis"), coord_file),
        patient=name,
        notes=left_out(len(barcodes), places.height, len(pairs)),
        extra=_about(name),
    )
    if all(array):
        at = np.array([[float(each.group(1)), float(each.group(2))] for each in array if each])
        column, row = whole_numbers(at[:, 0]), whole_numbers(at[:, 1])
        if len({*zip(row.tolist(), column.tolist(), strict=True)}) == len(kept):
            section.array_col, section.array_row = column, row
    return section
