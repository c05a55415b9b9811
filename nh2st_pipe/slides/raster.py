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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import check_image
from nh2st_pipe.core.quiet import PROCESS_WIDE, quiet_warnings
from nh2st_pipe.slides.base import UndecodedError, libraries
from nh2st_pipe.slides.levels import Step
from nh2st_pipe.slides.pixels import Samples, check_dtype, icc_notices, to_rgb, with_bits
from nh2st_pipe.slides.tiff import beyond_others

__all__ = ["RasterSlide", "any_size"]

_STRIP_PX = 256
_BYTES = 7  # a px: Pillow's 4 and our 3, for a moment
_ORIENTATION = 274  # the tag
_BITS_PER_SAMPLE = 258
_PNG_DEPTH = 24  # the byte that says it
_HEAD = 1 << 16
_CODESTREAM, _DEPTH = b"\xff\x4f\xff\x51", 42  # of JPEG 2000: how it begins, and the byte of its first component's bits
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
        self.steps: tuple[Step, ...] = ((1.0, 1.0),)
        self.mpp: float | None = None  # the resolution tags of photographs say nothing about the tissue
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None
        cause = f"{path} cannot be read (is the file complete?)"
        with self._open() as image, quiet_warnings(), fault_of(SlideError, cause):
            self._format = image.format
            self._page, pages = _largest_page(image)
            self._bits = _sample_bits(image)
            if image.mode == "F":
                check_dtype(path, np.float32)
            why = beyond_others(path) if image.format == "TIFF" else None
            if why is not None:
                raise UndecodedError(f"{why}, which Pillow does not give as it is")
            self.size: tuple[int, int] = pages[self._page]
            check_image(path, self.size, _BYTES)
            self._samples, self.notices = Samples(), tuple(_notices(image, self._page, pages))
        if self._bits > 8:
            values = self._stored()
            said = None if self._format == "PNG" else self._bits
            self._samples, words = with_bits(path, _of_channels(values), values.dtype, said, [values])
            self.notices += tuple(words)

    def _open(self) -> Image.Image:
        with any_size(), quiet_warnings(), fault_of(UndecodedError, f"{self.path} cannot be opened"):
            try:
                return Image.open(self.path)
            except UnidentifiedImageError as error:
                raise UndecodedError(f"{self.path} is not an image that OpenSlide or Pillow can read") from error

    def _decoded(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._pixels is None:
                check_image(self.path, self.size, _BYTES)  # by now others may have taken what there was
                cause = f"{self.path} cannot be decoded (is the file complete?)"
                if self._bits > 8:
                    self._pixels = to_rgb(self._stored(), self._samples)
                    return self._pixels
                with fault_of(SlideError, cause), closing(self._open()) as image:
                    image.seek(self._page)
                    self._pixels = _as_array(image)
                _trim_heap()
            return self._pixels

    def _stored(self) -> NDArray[Any]:
        """Return an image of 16 bits a sample as it is stored, h × w × s, where Pillow would give its upper eight."""
        import imagecodecs

        decode = {"PNG": imagecodecs.png_decode, "JPEG2000": imagecodecs.jpeg2k_decode}.get(self._format or "")
        if decode is None:
            raise UndecodedError(
                f"{self.path} holds px of {self._bits} bits in {self._format}; save it with 8 bits a px"
            )
        check_image(self.path, self.size, _BYTES + 2 * 4)
        with fault_of(SlideError, f"{self.path} cannot be decoded (is the file complete?)"):
            values = np.asarray(decode(self.path.read_bytes()))
            return values[..., None] if values.ndim == 2 else values

    def try_decoding(self) -> None:
        """See `Slide.try_decoding`: all of it, which it keeps."""
        try:
            self._decoded()
        except SlideError as error:
            raise UndecodedError(str(error)) from error

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
    alike = pages.count(pages[page])
    if alike > 1:
        found.append(f"page {page + 1} of {len(pages)} is read, the first of {alike} of the same size")
    return found + icc_notices(image.info.get("icc_profile"))


def _sample_bits(image: Image.Image) -> int:
    """Return the bits of a sample as the file has them; Pillow makes eight of them where there are several colours."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, 1)  # type: ignore[attr-defined]
        return int(max(bits) if isinstance(bits, tuple) else bits)
    if image.format == "PNG":
        with Path(image.filename).open("rb") as file:  # type: ignore[attr-defined]
            return file.read(_PNG_DEPTH + 1)[_PNG_DEPTH]
    if image.format == "JPEG2000":
        with Path(image.filename).open("rb") as file:  # type: ignore[attr-defined]
            head = file.read(_HEAD)
        at = head.find(_CODESTREAM) + _DEPTH
        return (head[at] & 127) + 1 if _DEPTH <= at < len(head) else 8
    return 16 if image.mode.startswith("I") else 8


def _of_channels(values: NDArray[Any]) -> Samples:
    """Return what the samples of a PNG or a JPEG 2000 are by their number."""
    return {1: Samples("grey"), 2: Samples("grey", "straight"), 3: Samples()}.get(
        values.shape[2], Samples(alpha="straight")
    )


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
