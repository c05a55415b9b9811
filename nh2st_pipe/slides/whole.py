"""Whether a slide's file is all there, without decoding it: what a TIFF's directory points at must lie in the file."""

from __future__ import annotations

from pathlib import Path

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides.directories import open_tiff

__all__ = ["missing_data"]


def missing_data(path: Path) -> str | None:
    """Return in words what a TIFF (SVS, NDPI, OME-TIFF …) lacks: data beyond its end. None for others.

    A copy that was cut short opens, and fails at the tile that is missing, hours later.
    """
    try:
        with open_tiff(path) as file:
            size = file.filehandle.size
            for number, page in enumerate(file.pages, start=1):
                ends = [at + length for at, length in zip(page.dataoffsets, page.databytecounts, strict=False)]
                lost = sum(end > size for end in ends)
                if lost:
                    return (
                        f"{path} is cut short: {lost:,} of {len(ends):,} pieces of its image {number} lie beyond the "
                        f"file's end, at {size:,} bytes; copy it again"
                    )
    except SlideError as error:
        return str(error)
    except Exception:  # no TIFF, or one that only its own reader understands: that says what is wrong
        return None
    return None
