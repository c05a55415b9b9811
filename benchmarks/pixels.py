"""What each reader makes of one picture in every layout and with every property: the same, or a refusal by name.

    python benchmarks/pixels.py

Rows are layouts, columns readers: how many properties of a px (bits, colours, opacity) come out the same to within 3
grey levels, and how many are refused. What comes out as another picture is listed, and the status is then 1.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.czi import CziSlide
from nh2st_pipe.slides.omezarr import OmeZarrSlide
from nh2st_pipe.slides.openslide import OpenSlideSlide
from nh2st_pipe.slides.raster import RasterSlide
from nh2st_pipe.slides.tiff import TiffSlide
from tests.slides.pictures import CELLS, LAYOUTS, picture

_APART = 3
READERS: dict[str, Callable[[Path], Slide]] = {
    "OpenSlide": OpenSlideSlide,
    "tifffile": TiffSlide,
    "Pillow": RasterSlide,
    "zarr": OmeZarrSlide,
    "libCZI": CziSlide,
    "as opened": open_slide,
}


def outcome(reader: Callable[[Path], Slide], layout: str, name: str) -> str:
    """Return what comes of it: same, refused, or wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path, shown = picture(Path(folder), layout, name)
        if path.is_dir() and reader not in (OmeZarrSlide, open_slide):
            return "refused"
        try:
            slide = reader(path)
            slide.try_decoding()
            region = slide.read_region(0, 0, shown.shape[1], shown.shape[0], 0)
        except SlideError:
            return "refused"
        slide.close()
        same = slide.size == shown.shape[1::-1] and np.abs(region.astype(int) - shown).max() <= _APART
        return "same" if same else "wrong"


def main() -> int:
    """Print the table."""
    print(f"{'':<26}" + "".join(f"{name:>12}" for name in READERS))
    wrong = list[str]()
    for layout in LAYOUTS:
        names = [name for of, name in CELLS if of == layout]
        row = f"{layout:<26}"
        for title, reader in READERS.items():
            found = {name: outcome(reader, layout, name) for name in names}
            counted = Counter(found.values())
            row += f"{counted['same']} / {counted['refused']}".rjust(12)
            wrong += [f"{layout}, {name}: {title}" for name, what in found.items() if what == "wrong"]
        print(row)
    print("\nthe same / refused by name; another picture: " + ("; ".join(wrong) or "none"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
