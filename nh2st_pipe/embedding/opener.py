"""Slides that a process has open: what each looks like, where its tiles lie, and their px.

What a reading process does, or a thread of the main one. Everything that goes in and comes out can be pickled.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.embedding.options import DecodeOn
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import DecodesMany, Interpolation, fetch_tiles, read_tile, smaller, thumbnail
from nh2st_pipe.slides.nvidia import the_decoder
from nh2st_pipe.slides.raster import RasterSlide
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.store.format import Resolved
from nh2st_pipe.tiles.layout import Layout, doubts_on_tissue, lay_out
from nh2st_pipe.tiles.manifest import SlideRow
from nh2st_pipe.tiles.masks import tissue_files
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots

__all__ = ["NEIGHBOURS", "Ask", "OpenSlides", "Opened", "Overview"]

NEIGHBOURS = 9

_THUMBNAIL_PX = 768


@dataclass(frozen=True)
class Ask:
    """A slide to be opened, and how its tiles are to be cut."""

    row: SlideRow
    image: Path
    """Where it is read from: as the manifest says, or a copy of that."""
    tile: TileSize
    grid: GridOptions
    out_px: int
    interpolation: Interpolation
    decode: DecodeOn = "cpu"

    @property
    def key(self) -> str:
        """What it is known by while it is open: its slide_id."""
        return self.row.slide_id


@dataclass(frozen=True)
class Opened:
    """What is known of a slide once it is open."""

    spots: Spots
    """In the order in which they are read."""
    resolved: Resolved
    notices: tuple[str, ...]
    in_memory: bool
    """Whether all of its px lie in the memory of the process that opened it."""


@dataclass(frozen=True)
class Overview:
    """What is known of a slide's whole: what its end takes."""

    picture: NDArray[np.uint8]
    scale: float
    """Px of the picture per level-0 px."""
    doubts: tuple[str, ...]
    tissue: Mapping[str, bytes]
    """The tissue as files, by name."""
    neighbours: tuple[NDArray[np.int32], NDArray[np.float64]]
    """Of each spot (n × k, itself first), and how far they are, level-0 px."""


def _opened(ask: Ask) -> Slide:
    slide = open_slide(ask.image)
    if ask.decode == "cpu":
        return slide
    if isinstance(slide, DecodesMany):
        slide.decode_with(the_decoder())
    else:
        slide.notices += ("it is of a kind that is decoded on the CPU alone",)
    return slide


class OpenSlides:
    """The slides that this process has open, by their key. Several threads may ask it, of one slide too."""

    def __init__(self) -> None:
        self._slides: dict[str, Slide] = {}
        self._layouts: dict[str, Layout] = {}
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}

    def open(self, ask: Ask) -> Opened:
        """Open a slide and find its tiles. Raises SlideError or ExpressionError where that cannot be done."""
        slide = self._slide(ask)
        layout = self._laid_out(ask, slide)
        resolved = Resolved(
            width=slide.size[0],
            height=slide.size[1],
            mpp=layout.resolution.mpp,
            mpp_source=layout.resolution.source,
            tile_level0_px=layout.size_level0_px,
            reader=slide.reader,
            origin=slide.origin,
        )
        notices = (*layout.notes, *layout.doubts)
        return Opened(layout.spots, resolved, notices, isinstance(slide, RasterSlide))

    def overview(self, ask: Ask) -> Overview:
        """Make the thumbnail, hold spots against the tissue on it, and put that into words and pictures for others."""
        slide = self._slide(ask)
        layout = self._laid_out(ask, slide)
        if layout.picture is None:
            picture, scale = thumbnail(slide, _THUMBNAIL_PX)
        else:
            picture = smaller(layout.picture, _THUMBNAIL_PX)
            scale = picture.shape[1] / slide.size[0]
        tissue, doubts = layout.tissue, list[str]()
        if tissue is None:
            tissue, doubts = doubts_on_tissue(layout.spots, slide, picture, ask.row.tissue)
        self._layouts.pop(ask.key, None)
        near = nearest_spots(layout.spots.xy, NEIGHBOURS)
        return Overview(picture, scale, tuple(doubts), tissue_files(tissue, slide), near)

    def read(
        self,
        ask: Ask,
        size_level0_px: float,
        xy: NDArray[np.float64],
        tiles: NDArray[np.uint8],
        at: NDArray[np.int64],
    ) -> None:
        """Read the tiles around n × 2 centres `xy` (level-0 px) into the places `at` of `tiles`, b × h × w × 3."""
        slide = self._slide(ask)
        if ask.decode == "gpu":
            fetch_tiles(slide, xy, size_level0_px, ask.out_px, ask.interpolation)
        for i, (x, y) in zip(at, xy, strict=True):
            tiles[i] = read_tile(slide, (float(x), float(y)), size_level0_px, ask.out_px, ask.interpolation)

    def close(self, key: str) -> None:
        """Close a slide from which nothing is read any more; nothing where it is not open."""
        with self._lock:
            slide = self._slides.pop(key, None)
            self._layouts.pop(key, None)
            self._opening.pop(key, None)
        if slide is not None:
            slide.close()

    def close_all(self) -> None:
        """Close what is open still, as where a run was ended while it was opened."""
        for key in list(self._slides):
            self.close(key)

    def _slide(self, ask: Ask) -> Slide:
        slide = self._slides.get(ask.key)
        if slide is not None:
            return slide
        with self._lock:
            opening = self._opening.setdefault(ask.key, threading.Lock())
        with opening:
            if ask.key not in self._slides:
                self._slides[ask.key] = _opened(ask)
            return self._slides[ask.key]

    def _laid_out(self, ask: Ask, slide: Slide) -> Layout:
        """Return where a slide's tiles lie; kept until its overview is made, which is of the same tissue."""
        layout = self._layouts.get(ask.key)
        if layout is None:
            layout = self._layouts[ask.key] = lay_out(ask.row, slide, ask.tile, ask.grid, input_px=ask.out_px)
        return layout
