"""Seconds that `check` takes for ten slides of a billion px, against OpenSlide making a thumbnail of each.

The slides are tiled pyramids in JPEG of a picture repeated; `--flat` gives them no levels. `python
benchmarks/check_slides.py PICTURE [--flat]`
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.checking.run import check

WIDTH, HEIGHT, TILE, SLIDES = 40_000, 25_000, 512, 10


def tiles(part: NDArray[np.uint8], down: int) -> Iterator[NDArray[np.uint8]]:
    small = np.asarray(Image.fromarray(part).reduce(down))
    for top in range(0, HEIGHT // down, TILE):
        for left in range(0, WIDTH // down, TILE):
            rows, columns = (
                np.arange(at, at + TILE) % side for at, side in ((top, len(small)), (left, small.shape[1]))
            )
            yield np.ascontiguousarray(small[np.ix_(rows, columns)])


def write(picture: Path, path: Path, levels: tuple[int, ...]) -> None:
    with openslide.open_slide(str(picture)) as slide:
        part = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    with tifffile.TiffWriter(path) as tif:
        for down in levels:
            tif.write(
                tiles(part, down),
                shape=(HEIGHT // down, WIDTH // down, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 80},
                subfiletype=1 if down > 1 else 0,
                resolution=(20_000 / down, 20_000 / down),
                resolutionunit="CENTIMETER",
            )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "s0.tif"
        write(Path(sys.argv[1]), first, (1,) if "--flat" in sys.argv else (1, 4, 16, 64))
        names = ["s0.tif", *(f"s{i}.tif" for i in range(1, SLIDES))]
        for name in names[1:]:
            os.link(first, first.with_name(name))
        manifest = first.with_name("manifest.csv")
        manifest.write_text("slide_id,slide\n" + "".join(f"{name[:-4]},{name}\n" for name in names))
        began = time.perf_counter()
        for name in names:
            with openslide.OpenSlide(str(first.with_name(name))) as slide:
                slide.get_thumbnail((2048, 2048))
        theirs, began = time.perf_counter() - began, time.perf_counter()
        found = check(manifest, out=first.with_name("check.html"))
        ours = time.perf_counter() - began
        tiles_laid = found.slides[0].tiles
        print(f"{SLIDES} slides of {WIDTH * HEIGHT:,} px, {tiles_laid:,} tiles each: check {ours:.1f} s")
        print(f"OpenSlide's thumbnails of them {theirs:.1f} s: {ours / theirs:.1f} times that")


if __name__ == "__main__":
    main()
