"""Datasets as they are published → a manifest and one `.h5ad` per section. One module per layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import ExpressionError, UsageError, fault_of, nearest
from nh2st_pipe.tiles.manifest import SlideRow, write_manifest

if TYPE_CHECKING:
    from nh2st_pipe.datasets.common import Found

__all__ = ["LAYOUTS", "Imported", "import_dataset"]

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

    `where` chooses sections by what is known of them (see `common.chosen`); `images` says where their images are (see
    `images`). With `look` every section's spots are held
    against its image, and drawn on it in `spots.png` beside the manifest. Raises UsageError for a layout that is not
    known, ExpressionError where no section can be read.
    """
    from nh2st_pipe.datasets.common import chosen, import_sections
    from nh2st_pipe.datasets.images import images_from

    if layout not in LAYOUTS:
        raise UsageError(f"no importer is called '{layout}'{nearest(layout, LAYOUTS)} (there is {', '.join(LAYOUTS)})")
    if not folder.is_dir():
        raise UsageError(f"there is no folder at {folder}")
    module, name, source = LAYOUTS[layout]
    find: Callable[[Path, Callable[[str], None]], list[Found]] = getattr(
        importlib.import_module(f"nh2st_pipe.datasets.{module}"), name
    )
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
