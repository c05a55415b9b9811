"""manifest.csv: one slide a row.

Columns: `slide_id` (letters, digits, `._-`; unique) and `slide` (image), and optionally `expression` (.h5ad),
`patient` (default: the slide_id), `mpp` (µm per px; overrides the file's) and `tissue` (mask image or
GeoJSON). Paths are relative to the manifest. Other columns are kept and follow the slide. Rows are counted as
a spreadsheet shows them: the header is row 1.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import ManifestError, fault_of, nearest, reason_of
from nh2st_pipe.core.tables import Table, read_table
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.slides.omezarr import OmeZarrSlide
from nh2st_pipe.slides.resolution import implausible_mpp, plausible_mpp

__all__ = ["SlideRow", "manifest_lines", "read_manifest", "slide_files", "write_manifest"]

_KNOWN = ("slide_id", "slide", "expression", "patient", "mpp", "tissue")
_REQUIRED = ("slide_id", "slide")
_LONGEST_ID = 100
_RESERVED = ("zarr.json", ".zgroup", ".zattrs", ".zarray")
_SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SlideRow:
    """One row of a manifest, its paths absolute."""

    slide_id: str
    slide: Path
    expression: Path | None = None
    patient: str = ""
    mpp: float | None = None
    tissue: Path | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what a store keeps of the row: no folder of this machine, only names."""
        return {
            "slide_id": self.slide_id,
            "slide": self.slide.name,
            "expression": self.expression.name if self.expression else None,
            "patient": self.patient,
            "mpp": self.mpp,
            "tissue": self.tissue.name if self.tissue else None,
            "extra": dict(self.extra),
        }


def read_manifest(path: str | Path) -> list[SlideRow]:
    """Read and check `path` whole.

    Raises ManifestError with every fault of every row, so that a file is mended in one go.
    """
    path = Path(path)
    with fault_of(ManifestError, f"{path} cannot be used"):
        return _rows_of(path)


def slide_files(path: str | Path) -> dict[str, Path]:
    """Return where the slides of a manifest are, by name. Raises ManifestError as `read_manifest` does."""
    return {row.slide_id: row.slide for row in read_manifest(path)}


def _rows_of(path: Path) -> list[SlideRow]:
    table = _read(path)
    faults: list[str] = []
    rows: list[SlideRow] = []
    first_seen: dict[str, int] = {}
    for number, cells in table.rows:
        row, row_faults = _row(cells, path.parent)
        if row.slide_id and row.slide_id in first_seen:
            row_faults.append(f"slide_id: '{row.slide_id}' is already in row {first_seen[row.slide_id]}")
        first_seen.setdefault(row.slide_id, number)
        faults += [f"row {number}, column {fault}" for fault in row_faults]
        rows.append(row)
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ManifestError(f"{path} has {count}; nothing was started:\n  " + "\n  ".join(faults))
    return rows


def _read(path: Path) -> Table:
    if not path.exists():
        raise ManifestError(f"there is no manifest at {path}")
    if path.is_dir():
        raise ManifestError(f"{path} is a folder; a manifest is a CSV file with the columns slide_id and slide")
    table = read_table(path, ManifestError)
    if not table.columns:
        raise ManifestError(f"{path} is empty; its first line should be: slide_id,slide,expression")
    missing = [name for name in _REQUIRED if name not in table.columns]
    if missing:
        hints = [nearest(name, [c for c in table.columns if c not in _KNOWN]) for name in missing]
        faults = [f"'{name}'{hint}" for name, hint in zip(missing, hints, strict=True)]
        raise ManifestError(f"{path} lacks the column {' and '.join(faults)} (it has {', '.join(table.columns)})")
    if not table.rows:
        raise ManifestError(f"{path} has a header and no rows; add one row per slide")
    return table


def _row(cells: dict[str, str], folder: Path) -> tuple[SlideRow, list[str]]:
    faults: list[str] = []

    def existing(column: str, folders: bool = False) -> Path | None:
        if not cells.get(column):
            return None
        try:
            path = Path(cells[column]).expanduser()
            path = path if path.is_absolute() else folder / path
            if not (path.is_file() or (folders and OmeZarrSlide.reads(path))):
                of = "is a folder" + (", and not one of OME-Zarr" if folders else "")
                faults.append(f"{column}: {path} {of}" if path.is_dir() else f"{column}: there is no file at {path}")
            return path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, 300 letters, the home of nobody
            faults.append(f"{column}: no file can be called {cells[column][:60]!r} ({reason_of(error)})")
            return None

    slide_id = cells["slide_id"]
    if not slide_id:
        faults.append("slide_id: is empty")
    elif not _SLIDE_ID.fullmatch(slide_id):
        faults.append(f"slide_id: '{slide_id}' may hold letters, digits and ._- and must begin with a letter or digit")
    elif len(slide_id) > _LONGEST_ID or slide_id.lower() in _RESERVED:
        why = f"has {len(slide_id)} letters, more than {_LONGEST_ID}" if len(slide_id) > _LONGEST_ID else "is taken"
        faults.append(f"slide_id: '{slide_id[:40]}' names a folder of the store, and {why}; give it another")
    if not cells["slide"]:
        faults.append("slide: is empty")
    mpp: float | None = None
    if cells.get("mpp"):
        try:
            mpp = float(cells["mpp"])
        except ValueError:
            mpp = math.nan
        if not (math.isfinite(mpp) and mpp > 0):
            faults.append(f"mpp: '{cells['mpp']}' is not a positive number of µm per px")
            mpp = None
        elif not plausible_mpp(mpp):
            faults.append(f"mpp: {mpp:g} is not µm per px of a slide ({implausible_mpp(mpp)})")
            mpp = None
    row = SlideRow(
        slide_id=slide_id,
        slide=existing("slide", folders=True) or folder,
        expression=existing("expression"),
        patient=cells.get("patient") or slide_id,
        mpp=mpp,
        tissue=existing("tissue"),
        extra={key: value for key, value in cells.items() if key not in _KNOWN},
    )
    return row, faults


def write_manifest(rows: Sequence[SlideRow], path: str | Path) -> None:
    """Write `rows` as a manifest at `path`, with paths relative to it where they lie below its folder."""
    path = Path(path).resolve()
    with written_whole(path) as part:
        part.write_text("\n".join(manifest_lines(rows, path.parent)) + "\n", encoding="utf-8")


def manifest_lines(rows: Sequence[SlideRow], folder: Path) -> list[str]:
    """Return the lines of a manifest in `folder`: its header, then a line for each of `rows`.

    Columns that are empty in all rows are left out.
    """
    folder = folder.resolve()

    def shown(target: Path | None) -> str:
        if target is None:
            return ""
        target = target.resolve()
        return str(target.relative_to(folder) if target.is_relative_to(folder) else target)

    records = [
        {
            "slide_id": row.slide_id,
            "slide": shown(row.slide),
            "expression": shown(row.expression),
            "patient": row.patient,
            "mpp": "" if row.mpp is None else f"{row.mpp:.6g}",
            "tissue": shown(row.tissue),
            **row.extra,
        }
        for row in rows
    ]
    names = list(dict.fromkeys(name for record in records for name in record)) or list(_REQUIRED)
    empty = {name for name in ("expression", "mpp", "tissue") if all(record[name] == "" for record in records)}
    kept = [name for name in names if name not in empty]

    def line(cells: Sequence[str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(cells)
        return text.getvalue()

    # Row by row: a cell may hold the end of a line, and is one line of the table for all that.
    return [line(kept), *(line([str(record.get(name, "")) for name in kept]) for record in records)]
