"""Reading whole slide images: one small interface, one module per library.

Coordinates are level-0 px, x then y, origin at the upper left corner, everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.slides.base import Slide, UndecodedError
from nh2st_pipe.slides.kinds import refused_kind

__all__ = ["Slide", "open_slide"]

# What tifffile has to say of a file that is cut short would stand in the terminal beside the message that names it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def open_slide(path: Path) -> Slide:
    """Open the slide at `path` with a library that can decode it, which is tried; decided by content, not by name.

    Raises SlideError naming the file where nothing can read it.
    """
    from nh2st_pipe.slides.czi import CziSlide
    from nh2st_pipe.slides.directories import check_directories
    from nh2st_pipe.slides.omezarr import OmeZarrSlide
    from nh2st_pipe.slides.openslide import OpenSlideSlide
    from nh2st_pipe.slides.raster import RasterSlide
    from nh2st_pipe.slides.tiff import TiffSlide, is_tiff

    other = refused_kind(path)
    if other is not None and path.exists():
        raise SlideError(f"{path}: {other}")
    with fault_of(SlideError, f"{path} cannot be read"):  # it may not be ours to read, or vanish meanwhile
        if OmeZarrSlide.reads(path):
            return OmeZarrSlide(path)
        if path.is_dir():
            raise SlideError(f"{path} is a folder, and not one of OME-Zarr")
        if not path.is_file():
            raise SlideError(f"there is no slide at {path}")
        if path.stat().st_size == 0:
            raise SlideError(f"{path} is an empty file")
        if CziSlide.reads(path):
            return CziSlide(path)
        check_directories(path)
        if not is_tiff(path):
            return OpenSlideSlide(path) if OpenSlideSlide.reads(path) else RasterSlide(path)
        if OpenSlideSlide.reads(path, scanners_only=True):
            return _first_that_decodes(path, (OpenSlideSlide, TiffSlide, RasterSlide))
        if TiffSlide.reads(path):
            return _first_that_decodes(path, (TiffSlide, OpenSlideSlide, RasterSlide))
        if OpenSlideSlide.reads(path):
            return _first_that_decodes(path, (OpenSlideSlide, TiffSlide, RasterSlide))
        return _first_that_decodes(path, (RasterSlide, TiffSlide))


def _first_that_decodes(path: Path, readers: Sequence[Callable[[Path], Slide]]) -> Slide:
    """Return the slide as the first of several libraries opens it that decodes a piece of it, too.

    Raises what the first has to say where none does.
    """
    from nh2st_pipe.slides.whole import missing_data

    said: UndecodedError | None = None
    for reader in readers:
        if said is not None and missing_data(path) is not None:
            break  # another library might show what there is of it
        slide: Slide | None = None
        try:
            slide = reader(path)
            slide.try_decoding()
        except UndecodedError as error:
            said = said or error
        except BaseException:
            if slide is not None:
                slide.close()
            raise
        else:
            return slide
        if slide is not None:
            slide.close()
    assert said is not None
    raise SlideError(missing_data(path) or str(said)) from said
