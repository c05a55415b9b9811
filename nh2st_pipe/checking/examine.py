"""One slide looked at: can it be read, where do its tiles lie, what speaks against it, and what would be right."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import OF_ONE_SLIDE
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import read_tile, smaller, thumbnail
from nh2st_pipe.slides.levels import area_step
from nh2st_pipe.slides.resolution import SPOTS_TOLERANCE, TileSize, choose_mpp, plausible_mpp
from nh2st_pipe.slides.whole import missing_data
from nh2st_pipe.tiles.geometry import CLEARLY_BETTER, WAYS, Way, darkness, on_tissue, spots_say
from nh2st_pipe.tiles.lattice import pitch_px
from nh2st_pipe.tiles.layout import Layout, doubts_on_tissue, lay_out, tissue_on
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["AS_THEY_ARE", "Correction", "Examined", "examine"]

AS_THEY_ARE = "as they are"
_THUMBNAIL_PX, _JPEG_QUALITY = 1024, 85
_USUAL_PX = 224
_TILES_READ = 24
_ENOUGH, _HALF = 0.9, 0.5  # of the spots on tissue: a way of laying them that is written down, or is the file's own


@dataclass(frozen=True)
class Correction:
    """What would make a slide right."""

    mpp: float | None = None
    """µm per px for its row of the manifest."""
    way: str | None = None
    """How its spots should be laid instead, in words."""
    lay: Way | None = field(default=None, repr=False)
    """The same as a function of (n × 2, x then y; the image's width and height)."""


@dataclass
class Examined:
    """What was found. Shares are of the spots, 0 to 1."""

    slide_id: str
    faults: list[str] = field(default_factory=list)
    """Why `embed` would pass the slide over."""
    doubts: list[str] = field(default_factory=list)
    """What is unlikely, and should be looked at before it is embedded."""
    notes: list[str] = field(default_factory=list)
    width: int | None = None
    height: int | None = None
    levels: list[float] = field(default_factory=list)
    """Level-0 px per px of each level."""
    mpp: float | None = None
    mpp_source: str = "unknown"
    estimates: list[str] = field(default_factory=list)
    """Those of its doubts that its resolution is an estimate, to be confirmed by an mpp in the manifest."""
    tile_px: float | None = None
    tile_um: float | None = None
    tiles: int | None = None
    pitch_px: float | None = None
    pitch_um: float | None = None
    tissue: float | None = None
    """Share of the image."""
    on_tissue: dict[str, float] = field(default_factory=dict)
    """Way in which the spots may have been meant → share on tissue."""
    counts: dict[str, Any] = field(default_factory=dict)
    """genes, median per spot, spots without any, and whether they are whole numbers."""
    correction: Correction | None = None
    seconds: float = 0.0
    shows_doubts: bool = False
    """Whether the picture shows where something was taken off the tissue that may be some."""
    picture: bytes | None = field(default=None, repr=False)
    """The slide's thumbnail, its tissue and its tiles drawn on it, as a JPEG: thousands of slides are held."""
    picture_px: tuple[int, int] = (0, 0)
    """Width and height of that."""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against embedding it."""
        return not self.faults and not self.doubts

    def record(self) -> dict[str, Any]:
        """Return it as JSON values, without the picture."""
        values = {key: value for key, value in vars(self).items() if key not in ("picture", "picture_px", "correction")}
        made = self.correction
        return {**values, "correction": None if made is None else {"mpp": made.mpp, "way": made.way}}


def examine(
    row: SlideRow,
    tile: TileSize,
    grid: GridOptions | None = None,
    input_px: int | None = None,
    refusal: Callable[[str, float | None], str | None] = lambda slide_id, mpp: None,
) -> Examined:
    """Look at the slide of one row of a manifest, tiles being of the size `tile`, for an encoder that takes `input_px`,
    where it is known. `refusal` says why a slide of that mpp is of no use, where it is none.

    Faults are in what is returned.
    """
    began = time.perf_counter()
    found = Examined(row.slide_id)
    cut = missing_data(row.slide)
    found.faults += [cut] if cut else []
    try:
        slide = open_slide(row.slide)
    except OF_ONE_SLIDE as error:
        found.faults += [] if cut else [str(error)]
    else:
        try:
            _look_at(found, row, slide, tile, grid, input_px)
            words = refusal(row.slide_id, found.mpp)
            found.faults += [words] if words is not None else []
        finally:
            slide.close()
    found.seconds = time.perf_counter() - began
    return found


def _look_at(
    found: Examined, row: SlideRow, slide: Slide, tile: TileSize, grid: GridOptions | None, input_px: int | None
) -> None:
    found.width, found.height = slide.size
    found.levels = [round(area_step(step), 3) for step in slide.steps]
    layout: Layout | None = None
    spots: Spots | None = None
    try:
        layout = lay_out(row, slide, tile, grid, input_px=input_px)
        spots = layout.spots
    except OF_ONE_SLIDE as error:
        found.faults.append(str(error))
        spots = _spots_alone(row)
        alone = choose_mpp(row.mpp, slide.mpp, None if spots is None else spots_say(spots))
        found.mpp, found.mpp_source = alone.mpp, alone.source
    if layout is not None:
        found.mpp, found.mpp_source = layout.resolution.mpp, layout.resolution.source
        found.tile_px, found.tiles = layout.size_level0_px, len(layout.spots)
        found.tile_um = None if found.mpp is None else layout.size_level0_px * found.mpp
        found.notes += layout.notes
        found.doubts += layout.doubts
        found.estimates += layout.resolution.doubts if layout.resolution.source == "spots" else ()
    if spots is not None and row.expression is not None:
        _describe(found, spots)
    try:
        made = None if layout is None else layout.picture
        picture = thumbnail(slide, _THUMBNAIL_PX)[0] if made is None else smaller(made, _THUMBNAIL_PX)
    except OF_ONE_SLIDE as error:
        found.faults.append(str(error))
        return
    found.doubts += [words for words in darkness(picture) if layout is None]
    mask = np.zeros(picture.shape[:2], np.bool_)
    try:
        if row.expression is not None and spots is not None:
            mask, doubts = doubts_on_tissue(spots, slide, picture, row.tissue)
            found.doubts += doubts if layout is not None else []
            _propose(found, spots, mask, slide.size, unfit=layout is None)
        elif layout is not None and layout.tissue is not None:
            mask = layout.tissue
        else:
            mask = tissue_on(slide, picture, row.tissue)
    except OF_ONE_SLIDE as error:
        found.faults += [str(error)] if str(error) not in found.faults else []
    found.tissue = float(mask.mean())
    if layout is not None:
        _read_some(found, layout, slide, input_px)
    from nh2st_pipe.checking.draw import overlay

    doubted = None if layout is None else layout.doubted
    found.shows_doubts = doubted is not None
    drawn = overlay(picture, mask, slide.size, None if spots is None else spots.xy, found.tile_px, doubted)
    data = io.BytesIO()
    Image.fromarray(drawn).save(data, "JPEG", quality=_JPEG_QUALITY)
    found.picture, found.picture_px = data.getvalue(), (drawn.shape[1], drawn.shape[0])


def _spots_alone(row: SlideRow) -> Spots | None:
    """Return the spots of a slide that cannot be laid out, where they can be read."""
    if row.expression is None:
        return None
    try:
        return read_spots(row.expression)
    except OF_ONE_SLIDE:
        return None


def _describe(found: Examined, spots: Spots) -> None:
    found.tiles = len(spots)
    found.pitch_px = pitch_px(spots.xy)
    found.pitch_um = None if found.mpp is None else found.pitch_px * found.mpp
    if spots.counts is not None:
        of_spot = np.asarray(spots.counts.sum(axis=1), dtype=np.float64).ravel()
        empty = int((of_spot == 0).sum())
        found.counts = {
            "genes": spots.counts.shape[1],
            "median per spot": float(np.median(of_spot)),
            "spots without any": empty,
            "whole numbers": spots.whole_counts,
        }
        if empty == len(spots):
            found.doubts.append("all counts are zero: there is nothing to learn from")


def _other_ways(spots: Spots) -> Mapping[str, Way]:
    """Return how the spots may have been meant: turned, mirrored, or in px of an image of another size."""

    def times(factor: float) -> Callable[[NDArray[np.float64], tuple[int, int]], NDArray[np.float64]]:
        return lambda xy, size: xy * factor

    scales = {f"÷ tissue_{name}_scalef ({scale:.4g})": times(1 / scale) for name, scale in spots.scales.items()}
    return {**scales, **WAYS, "× 10": times(10.0), "× 0.1": times(0.1)}


def _propose(found: Examined, spots: Spots, mask: NDArray[np.bool_], size: tuple[int, int], *, unfit: bool) -> None:
    """Hold the spots against the tissue in every way, and propose the best where it is clearly better."""
    ways = _other_ways(spots)
    found.on_tissue = {AS_THEY_ARE: on_tissue(spots.xy, mask, size)}
    found.on_tissue |= {way: on_tissue(lay(spots.xy, size), mask, size) for way, lay in ways.items()}
    best = max(ways, key=lambda way: found.on_tissue[way])
    own, other = found.on_tissue[AS_THEY_ARE], found.on_tissue[best]
    rival = max((share for way, share in found.on_tissue.items() if way != best), default=0.0)
    by_its_own_factor = unfit and best.startswith("÷")  # the file says it, and nothing else can be meant
    clear = other >= _ENOUGH and other > own + CLEARLY_BETTER and other > rival + CLEARLY_BETTER
    lay = ways[best] if clear or (by_its_own_factor and other >= _HALF) else None
    laid = spots if lay is None else replace(spots, xy=lay(spots.xy, size))
    said = spots_say(laid)
    mpp = None
    if said is not None and plausible_mpp(said.mpp):
        wrong = found.mpp is not None and abs(found.mpp / said.mpp - 1) > SPOTS_TOLERANCE
        # What the image's own file says is not overruled, and what other arrays look like is no evidence.
        mpp = said.mpp if said.sure and (found.mpp is None or (wrong and found.mpp_source == "manifest")) else None
    if lay is not None or mpp is not None:
        found.correction = Correction(mpp, best if lay is not None else None, lay)


def _read_some(found: Examined, layout: Layout, slide: Slide, input_px: int | None) -> None:
    """Read tiles from the first to the last, as embed would."""
    n = len(layout.spots)
    for i in np.unique(np.linspace(0, n - 1, min(n, _TILES_READ)).round().astype(int)):
        x, y = layout.spots.xy[i]
        try:
            read_tile(slide, (float(x), float(y)), layout.size_level0_px, input_px or _USUAL_PX, "bicubic")
        except OF_ONE_SLIDE as error:
            found.faults.append(str(error))
            return
