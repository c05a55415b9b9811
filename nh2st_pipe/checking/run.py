"""All slides of a manifest looked at, without an encoder: what embed would pass over, and what is unlikely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nh2st_pipe.checking.examine import Examined, examine
from nh2st_pipe.checking.page import write_page
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.h5ad import read_h5ad, write_h5ad
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.pool import in_order
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.recipes.encoder import EncoderRecipe, load_encoder_recipe
from nh2st_pipe.slides.resolution import TileSize, check_tile_options
from nh2st_pipe.tiles.manifest import SlideRow, manifest_lines, read_manifest, write_manifest
from nh2st_pipe.tiles.options import GridOptions

__all__ = ["Checked", "check"]

DEFAULT_TILE_UM = 112.0
_AT_ONCE = 8  # slides; a plain image is in memory as a whole


@dataclass
class Checked:
    """What a look at a manifest's slides has found."""

    slides: list[Examined] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    """slide_id → its corrected line of the manifest, below `header`; for slides that have a correction."""
    header: str = ""
    page: Path | None = None
    corrected: Path | None = None
    """The manifest that was written with all corrections in it."""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against embedding any of them."""
        return all(slide.good for slide in self.slides)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "good": self.good,
            "slides": [slide.record() for slide in self.slides],
            "corrected_lines": self.lines,
            "page": None if self.page is None else str(self.page),
            "corrected": None if self.corrected is None else str(self.corrected),
        }


def check(
    slides: str | Path,
    *,
    out: str | Path | None = None,
    encoder: str | Path | None = None,
    model: str | Path | None = None,
    tile_um: float | None = None,
    tile_px: float | None = None,
    overlap: float | None = None,
    min_tissue: float | None = None,
    fix: str | Path | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Look at every slide of the manifest `slides` as `embed` would, and write one page about them to `out`.

    Tiles have a side of `tile_um` µm (by default as the recipe `encoder` has them, else 112) or `tile_px` level-0 px;
    `overlap` (0) and `min_tissue` (0.5) are shares of a tile, for slides without spots. `model` (a run, its model/, or
    hf-hub:owner/name) has an encoder and tiles of its own, and a slide that it cannot predict is a fault. `fix` is a
    folder for a manifest with what is proposed put right: mpp, and .h5ad files with corrected places of spots; neither
    the slides nor their own expression files are changed.

    Raises ManifestError where the manifest cannot be read, UsageError where an option cannot be.
    """
    check_tile_options(tile_um, tile_px)
    grid = GridOptions().changed(overlap, min_tissue)
    rows, progress = read_manifest(slides), progress or Progress()
    if fix is not None and Path(fix).exists() and any(Path(fix).iterdir()):
        raise UsageError(f"{fix} holds something already; give a new folder for the corrected manifest")
    if model is not None and (encoder is not None or tile_um or tile_px):
        raise UsageError("--model says which encoder and tiles are needed; give neither --encoder nor a tile's size")
    recipe = None if encoder is None else load_encoder_recipe(encoder)
    default_um = DEFAULT_TILE_UM if recipe is None else recipe.input_px * recipe.mpp
    tile = TileSize(um=tile_um or (None if tile_px else default_um), level0_px=tile_px)
    refusal: Callable[[str, float | None], str | None] = lambda slide_id, mpp: None  # noqa: E731 -- as typed
    if model is not None:
        recipe, tile, refusal = _needs(model)
    found = Checked()
    progress.start("checking", len(rows), "slides")
    input_px = None if recipe is None else recipe.input_px
    looked = in_order(lambda row: examine(row, tile, grid, input_px, refusal), rows, min(cores(), _AT_ONCE))
    for number, each in enumerate(looked, start=1):
        progress.advance(number, len(rows), each.slide_id)
        found.slides.append(each)
    folder = Path(slides).parent if fix is None else Path(fix)
    right = [_corrected(row, each, folder) for row, each in zip(rows, found.slides, strict=True)]
    found.header, *lines = manifest_lines(right, folder)
    found.lines = {
        each.slide_id: line for each, line in zip(found.slides, lines, strict=True) if each.correction is not None
    }
    if fix is not None:
        found.corrected = _put_right(rows, right, found.slides, Path(fix))
    if out is not None:
        found.page = write_page(found.slides, found.header, found.lines, Path(slides), Path(out))
    return found


def _needs(
    model: str | Path,
) -> tuple[EncoderRecipe, TileSize, Callable[[str, float | None], str | None]]:
    """Return the encoder and the tiles that a model needs, and what says why it cannot predict a slide."""
    from nh2st_pipe.embedding.plan import recipe_of
    from nh2st_pipe.runs.about import About
    from nh2st_pipe.runs.model import load_model

    about = About.of(load_model(model).about, model)
    of = about.store.tile
    return recipe_of(about.store), TileSize(um=of["size_um"], level0_px=of["size_level0_px"]), about.refusal


def _corrected(row: SlideRow, found: Examined, folder: Path) -> SlideRow:
    """Return a slide's row with its correction in it; an .h5ad with corrected spots has a name of its own."""
    made = found.correction
    if made is None:
        return row
    mpp = row.mpp if made.mpp is None else float(f"{made.mpp:.4g}")
    moved = made.lay is not None and row.expression is not None
    return replace(row, mpp=mpp, expression=folder / f"{row.slide_id}.corrected.h5ad" if moved else row.expression)


def _put_right(rows: Sequence[SlideRow], right: Sequence[SlideRow], found: Sequence[Examined], folder: Path) -> Path:
    """Write corrected .h5ad files and the manifest that names them."""

    for row, new, each in zip(rows, right, found, strict=True):
        made = each.correction
        if made is None or made.lay is None or row.expression is None or new.expression is None:
            continue
        assert each.width is not None
        assert each.height is not None
        with quiet_warnings():
            data = read_h5ad(row.expression)
            data.obsm["spatial"] = made.lay(np.asarray(data.obsm["spatial"], np.float64), (each.width, each.height))
        write_h5ad(data, new.expression)
    path = folder / "manifest.csv"
    write_manifest(list(right), path)
    return path
