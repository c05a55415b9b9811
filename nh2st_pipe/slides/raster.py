"""Plain JPEG, PNG and TIFF: decoded once, whole, when the first tile is asked for.

Such files have no pyramid, and JPEG and PNG cannot be entered in the middle. Decoding costs 3 bytes per px of
memory (a 10,000 × 10,000 px image: 300 MB), kept until the slide is closed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import check_image
from nh2st_pipe.core.quiet import PROCESS_WIDE, quiet_warnings
from nh2st_pipe.slides.base import libraries

__all__ = ["RasterSlide", "any_size"]

_STRIP_PX = 256
_BYTES = 7  # a px: Pillow's 4 and our 3, for a moment
_ORIENTATION = 274  # the tag
_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_SIDES_SWAP = tuple(_BACK[tag] for tag in (5, 6, 7, 8))


@contextmanager
def any_size() -> Iterator[None]:
    """Open an image without Pillow's guard against those of over 179 Mpx; ours knows the memory."""
    with PROCESS_WIDE:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


class RasterSlide:
    """A plain image, read by Pillow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = (0, 0)
        self.reader = libraries("pillow")
        self.downsamples: tuple[float, ...] = (1.0,)
        self.mpp: float | None = None  # the resolution tags of photographs say nothing about the tissue
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None
        cause = f"{path} cannot be read (is the file complete?)"
        with self._open() as image, quiet_warnings(), fault_of(SlideError, cause):
            self._page, pages = _largest_page(image)
            if image.mode == "F":
                raise SlideError(f"{path} holds floating-point px, whose white is not known; save it with 8 bits a px")
            self.size: tuple[int, int] = pages[self._page]
            check_image(path, self.size, _BYTES)
            self.notices = tuple(_notices(image, self._page, pages))

    def _open(self) -> Image.Image:
        with any_size(), quiet_warnings(), fault_of(SlideError, f"{self.path} cannot be opened"):
            try:
                return Image.open(self.path)
            except UnidentifiedImageError as error:
                raise SlideError(f"{self.path} is not an image that OpenSlide or Pillow can read") from error

    def _decoded(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._pixels is None:
                check_image(self.path, self.size, _BYTES)  # by now others may have taken what there was
                cause = f"{self.path} cannot be decoded (is the file complete?)"
                with fault_of(SlideError, cause), closing(self._open()) as image:
                    image.seek(self._page)
                    self._pixels = _as_array(image)
                _trim_heap()
            return self._pixels

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """See `Slide.read_region`; there is one level."""
        pixels = self._decoded()
        left, right = (min(max(v, 0), self.size[0]) for v in (x, x + width))
        top, bottom = (min(max(v, 0), self.size[1]) for v in (y, y + height))
        if (right - left, bottom - top) == (width, height):
            return pixels[top:bottom, left:right]
        region = np.full((height, width, 3), 255, np.uint8)
        region[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
        return region

    def close(self) -> None:
        """See `Slide.close`."""
        if self._pixels is not None:
            self._pixels = None
            _trim_heap()


def _largest_page(image: Image.Image) -> tuple[int, list[tuple[int, int]]]:
    """Return which page is the largest, the first of equals, and the pages' sizes: labels and thumbnails are small."""
    sizes = []
    for page in range(getattr(image, "n_frames", 1) if image.format == "TIFF" else 1):
        image.seek(page)
        sizes.append(image.size if _turned_back(image) not in _SIDES_SWAP else image.size[::-1])
    largest = max(range(len(sizes)), key=lambda page: sizes[page][0] * sizes[page][1])
    image.seek(largest)
    return largest, sizes


def _turned_back(image: Image.Image) -> Image.Transpose | None:
    """Return what undoes what Pillow makes of an orientation tag: it turns TIFFs as it decodes them, and no others."""
    return _BACK.get(image.getexif().get(_ORIENTATION, 1)) if image.format == "TIFF" else None


def _notices(image: Image.Image, page: int, pages: list[tuple[int, int]]) -> list[str]:
    """Return what a person would not expect of how the image is read."""
    found = []
    if page:
        found.append(
            f"page {page + 1} of {len(pages)} is read, the largest; the first has {pages[0][0]} × {pages[0][1]} px"
        )
    turned = image.getexif().get(_ORIENTATION, 1)
    if turned not in (0, 1):
        found.append(f"its orientation tag ({turned}) is passed over: spots are counted on the px as they are stored")
    if image.mode.startswith("I"):
        found.append("16 bits a px are read as their upper 8")
    return found


def _as_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return h × w × 3 as stored; strip by strip, since Pillow hands over a whole image through two copies of it."""
    back = _turned_back(image)
    if back is not None:
        image.load()
        image = image.transpose(back)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP_PX):
        strip = image.crop((0, top, width, min(top + _STRIP_PX, height)))
        if image.mode.startswith("I"):
            grey = np.clip(np.asarray(strip).astype(np.int64) >> 8, 0, 255)
            pixels[top : top + _STRIP_PX] = grey[..., None]
        else:
            pixels[top : top + _STRIP_PX] = np.asarray(strip if strip.mode == "RGB" else _flattened(strip))
    return pixels


def _flattened(image: Image.Image) -> Image.Image:
    """Return `image` as RGB, transparent parts white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _trim_heap() -> None:
    """Hand freed memory back to the system.

    Pillow keeps an image in blocks of 16 MB, which glibc retains after they are freed: without this, a process that
    goes through many slides holds the largest decoded image of each of its threads for ever.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
