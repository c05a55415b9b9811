"""Text that people made: the one place where such a file is opened, whatever program saved it.

UTF-8 with or without a byte-order mark, or UTF-16 with one, as spreadsheets save it. Names of files are taken as they
are: no character in them is a pattern.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nh2st_pipe.core.errors import NH2STError, listed

__all__ = ["Table", "read_table", "read_text"]

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Table:
    """A table with a header. Cells have no spaces around them."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    """Each with its number as a spreadsheet counts, the header being 1; empty rows are left out."""


def read_text(path: Path, error: type[NH2STError]) -> str:
    """Return a file's text. Raises `error` naming the file where it cannot be read, or is no text."""
    try:
        data = path.read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text (at byte {cause.start:,}); save it as UTF-8") from cause


def read_table(path: Path, error: type[NH2STError], separator: str = ",") -> Table:
    """Return a file's table. Raises `error` with every row that has another number of cells than the header."""
    text = read_text(path, error)
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as cause:
        raise error(f"{path} is not a readable table: {cause}; is a quotation mark not closed?") from cause
    numbered = [(i, [cell.strip() for cell in cells]) for i, cells in enumerate(records, start=1)]
    filled = [(i, cells) for i, cells in numbered if any(cells)]
    if not filled:
        return Table([], [])
    (_, columns), *rows = filled
    while columns and not columns[-1]:  # as spreadsheets leave behind
        columns = columns[:-1]
    _check_header(path, columns, separator, error)
    faults, good = [], []
    for number, cells in rows:
        while len(cells) > len(columns) and not cells[-1]:
            cells = cells[:-1]
        if len(cells) != len(columns):
            faults.append(f"row {number} has {len(cells)} cells, and the header has {len(columns)}")
        else:
            good.append((number, dict(zip(columns, cells, strict=True))))
    if faults:
        raise error(f"{path}: {listed(faults)}; a cell that holds a comma belongs in quotation marks")
    return Table(columns, good)


def _check_header(path: Path, columns: Sequence[str], separator: str, error: type[NH2STError]) -> None:
    if len(columns) == 1:
        for other, name in _SEPARATORS.items():
            if other != separator and other in columns[0]:
                raise error(f"{path} is separated by {name}, and {_SEPARATORS[separator]} are expected; save it so")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise error(f"{path} has the column {listed(repr(name) for name in twice)} twice or more")
