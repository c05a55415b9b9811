"""What a file may ask for: memory, before it is taken, and sizes that its own bytes can hold.

A few wrong bytes in a header declare a picture of 20 million by a million px. Whoever decodes a file of somebody else
asks here first, at opening.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import NH2STError, SlideError
from nh2st_pipe.core.machine import memory

__all__ = ["check_image", "give_back", "require"]

_MOST_PX = 1 << 38  # of a picture
_MOST_SIDE_PX = 1 << 22  # of a picture; the largest scanners make some 400,000
_MOST_PX_PER_BYTE = 20_000  # of a compressed file: deflate packs 1,032 to 1, of px of a bit each
_SURE_PX = 64 << 20  # so few are had anyway


def require(needed: float, what: str, kind: type[NH2STError] = SlideError, instead: str = "") -> None:
    """Raise `kind` where `what` takes more bytes than this process can have; `instead` is what to do about it."""
    free = memory()
    if needed > free:
        hint = f"; {instead}" if instead else ""
        raise kind(f"{what} takes {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free{hint}")


def give_back() -> None:
    """Have the C library give the system back what is free, where it can: what stays between what goes keeps it.

    Of a study of a thousand slides it is megabytes for each of them.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def check_image(path: Path, size: tuple[int, int], bytes_per_px: float = 0.0, *, alone: bool = True) -> None:
    """Raise SlideError where the file at `path` declares a picture (width, height) that it cannot hold, where it holds
    it `alone`, or that takes more memory than there is at `bytes_per_px`.
    """
    width, height = size
    at = f"{path} declares a picture of {width:,} × {height:,} px"
    if min(size) < 1 or max(size) > _MOST_SIDE_PX or width * height > _MOST_PX:
        raise SlideError(f"{at}, which no picture of a slide has; is the file damaged?")
    held = path.stat().st_size
    if alone and width * height > max(_SURE_PX, _MOST_PX_PER_BYTE * held):
        raise SlideError(f"{at}, which its {held:,} bytes cannot hold; is the file damaged?")
    instead = "convert it to a tiled pyramidal TIFF (vips tiffsave IN OUT --tile --pyramid --compression jpeg)"
    require(bytes_per_px * width * height, at, instead=instead)
