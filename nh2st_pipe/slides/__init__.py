"""Reading whole slide images: one small interface, one module per library.

Coordinates are level-0 px, x then y, origin at the upper left corner, everywhere.
"""

from __future__ import annotations

import logging
from pathlib import Path

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.slides.base import Slide

__all__ = ["Slide", "open_slide"]

# What tifffile has to say of a file that is cut short would stand in the terminal beside the message that names it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def open_slide(path: Path) -> Slide:
    """Open the slide at `path` with the library that knows its format, decided by content, not by name.

    Raises SlideError naming the file where nothing can read it.
    """
    from nh2st_pipe.slides.directories import check_directories
    from nh2st_pipe.slides.omezarr import OmeZarrSlide
    from nh2st_pipe.slides.openslide import OpenSlideSlide
    from nh2st_pipe.slides.raster import RasterSlide
    from nh2st_pipe.slides.tiff import TiffSlide

    with fault_of(SlideError, f"{path} cannot be read"):  # it may not be ours to read, or vanish meanwhile
        if OmeZarrSlide.reads(path):
            return OmeZarrSlide(path)
        if path.is_dir():
            raise SlideError(f"{path} is a folder, and not one of OME-Zarr")
        if not path.is_file():
            raise SlideError(f"there is no slide at {path}")
        if path.stat().st_size == 0:
            raise SlideError(f"{path} is an empty file")
        check_directories(path)
        if OpenSlideSlide.reads(path, scanners_only=True):
            return OpenSlideSlide(path)
        if TiffSlide.reads(path):
            return TiffSlide(path)
        return OpenSlideSlide(path) if OpenSlideSlide.reads(path) else RasterSlide(path)
