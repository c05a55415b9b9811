"""Datasets as they are published → a manifest and one `.h5ad` per section. One module per layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nh2st_pipe.core.errors import UsageError, nearest
from nh2st_pipe.tiles.manifest import SlideRow, write_manifest

__all__ = ["LAYOUTS", "import_dataset"]

Importer = Callable[[Path, Path, Callable[[str], None]], list[SlideRow]]


def _her2st(folder: Path, expression_dir: Path, say: Callable[[str], None]) -> list[SlideRow]:
    from nh2st_pipe.datasets.her2st import import_her2st

    return import_her2st(folder, expression_dir, say)


LAYOUTS: dict[str, Importer] = {"her2st": _her2st}


def import_dataset(layout: str, folder: Path, out: Path, say: Callable[[str], None] = print) -> list[SlideRow]:
    """Turn the dataset in `folder` into a manifest at `out`, its `.h5ad` files in `expression/` beside it."""
    if layout not in LAYOUTS:
        raise UsageError(f"no importer is called '{layout}'{nearest(layout, LAYOUTS)} (there is {', '.join(LAYOUTS)})")
    if not folder.is_dir():
        raise UsageError(f"there is no folder at {folder}")
    rows = LAYOUTS[layout](folder, out.parent / "expression", say)
    write_manifest(rows, out)
    return rows
