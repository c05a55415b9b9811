"""Datasets as they are published → a manifest and one `.h5ad` per section. One module per layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import ExpressionError, UsageError, fault_of, nearest
from nh2st_pipe.recipes import plugins
from nh2st_pipe.tiles.manifest import SlideRow, write_manifest

if TYPE_CHECKING:
    from nh2st_pipe.datasets.common import Found

__all__ = ["LAYOUTS", "Find", "Imported", "import_dataset", "layout_names"]

LAYOUTS: dict[str, tuple[str, str, str]] = {
    "her2st": ("spotfiles", "find_her2st", "her2st (Andersson et al. 2021)"),
    "stnet": ("spotfiles", "find_stnet", "STNet (He et al. 2020)"),
    "skin": ("spotfiles", "find_skin", "cSCC (Ji et al. 2020)"),
    "stimage": ("stimage", "find_stimage", "STimage-1K4M (Chen et al. 2024)"),
    "hest": ("hest", "find_hest", "HEST-1k (Jaume et al. 2024)"),
    "hest-bench": ("hest_bench", "find_hest_bench", "HEST-Benchmark (Jaume et al. 2024)"),
    "spatialdata": ("spatialdata", "find_spatialdata", "SpatialData"),
    "spared": ("spared", "find_spared", "SpaRED (Mejia et al. 2024)"),
    "visium": ("visium", "find_visium", "Space Ranger"),
    "xenium": ("xenium", "find_xenium", "Xenium"),
}
"""Name → module, function that finds the sections, and what the `.h5ad` files say they are from."""


@dataclass
class Imported:
    """What was made of a dataset."""

    rows: list[SlideRow]
    failed: dict[str, str] = field(default_factory=dict)
    """Sections left out, each with its cause."""
    doubts: dict[str, list[str]] = field(default_factory=dict)
    """What is unlikely about places or resolution of a section; see `nh2st-pipe check`."""
    picture: Path | None = None
    """All sections with their spots drawn on them."""


Find = Callable[[Path, Callable[[str], None]], list["Found"]]
"""Finds the sections in a folder; what a person should know it says to its second argument."""


def layout_names() -> list[str]:
    """Return the names of the layouts that are known: ours, and those that packages register."""
    return [*LAYOUTS, *plugins.registered(plugins.LAYOUTS, LAYOUTS)]


def _finder(layout: str) -> tuple[Find, str]:
    """Return what finds the sections of a layout, and what their files say they are from.

    Raises UsageError where there is none of that name, or it cannot be loaded.
    """
    if layout in LAYOUTS:
        module, name, source = LAYOUTS[layout]
        found: Find = getattr(importlib.import_module(f"nh2st_pipe.datasets.{module}"), name)
        return found, source
    plugged = plugins.plugged(plugins.LAYOUTS, layout, LAYOUTS)
    if plugged is None:
        known = layout_names()
        raise UsageError(f"no importer is called '{layout}'{nearest(layout, known)} (there is {', '.join(known)})")
    if not callable(plugged.what):
        raise UsageError(f"{layout} ({plugged.source}) is no function; CONTRIBUTING.md says what a layout is")
    return plugged.what, f"{layout} ({plugged.source})"


def import_dataset(
    layout: str,
    folder: Path,
    out: Path,
    say: Callable[[str], None] = print,
    *,
    where: Mapping[str, str] | None = None,
    images: str | None = None,
    look: bool = True,
) -> Imported:
    """Turn the dataset in `folder` into a manifest at `out`, its `.h5ad` files in `expression/` beside it.

    `layout` is one of `layout_names`, or a function of somebody's own, "file.py:find" or "package.module:find". `where`
    chooses sections by what is known of them (see `common.chosen`); `images` says where their images are (see
    `images`). With `look` every section's spots are held
    against its image, and drawn on it in `spots.png` beside the manifest. Raises UsageError for a layout that is not
    known, ExpressionError where no section can be read.
    """
    from nh2st_pipe.datasets.common import chosen, import_sections
    from nh2st_pipe.datasets.images import images_from

    find, source = _finder(layout)
    if not folder.is_dir():
        raise UsageError(f"there is no folder at {folder}")
    with fault_of(ExpressionError, f"{folder} cannot be read as {layout}"):
        every = find(folder, say)
    found = chosen(every, where or {})
    image_of = images_from(images) if images is not None else lambda name: None
    rows, failed = import_sections(found, out.parent / "expression", source, say, image_of)
    if not rows:
        first, cause = next(iter(failed.items()))
        raise ExpressionError(f"none of {len(failed)} sections in {folder} can be used; {first}: {cause}")
    write_manifest(rows, out)
    imported = Imported(rows, failed)
    if look:
        from nh2st_pipe.datasets.look import look_at

        imported.picture = out.parent / "spots.png"
        imported.doubts = look_at(out, imported.picture)
    return imported
