"""Tiles per second of a raster of adjoining tiles on one core, and the ratio to OpenSlide tile by tile.

The slide is tiled JPEG, as scanners write it: a picture given, repeated to 8,192 px a side. Both ways are measured in
turns in this process. `python benchmarks/reader.py PICTURE`
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image

from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile

SIDE, ROWS, TURNS = 8192, 8, 5


def write(picture: Path, path: Path) -> None:
    with openslide.open_slide(str(picture)) as slide:
        part = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    times = [-(-SIDE // side) for side in part.shape[:2]]
    whole = np.tile(part, (*times, 1))[:SIDE, :SIDE]
    tifffile.imwrite(path, whole, tile=(256, 256), photometric="rgb", compression="jpeg", compressionargs={"level": 80})


def theirs(path: Path, side: int, out: int) -> float:
    began, columns = time.perf_counter(), SIDE // side
    with openslide.OpenSlide(str(path)) as slide:
        for row in range(ROWS):
            for column in range(columns):
                tile = slide.read_region((column * side, row * side), 0, (side, side)).convert("RGB")
                np.asarray(tile if side == out else tile.resize((out, out), Image.Resampling.BICUBIC))
    return ROWS * columns / (time.perf_counter() - began)


def ours(path: Path, side: int, out: int) -> float:
    began, columns = time.perf_counter(), SIDE // side
    slide = open_slide(path)
    for row in range(ROWS):
        for column in range(columns):
            read_tile(slide, ((column + 0.5) * side, (row + 0.5) * side), side, out, "bicubic")
    slide.close()
    return ROWS * columns / (time.perf_counter() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        write(Path(sys.argv[1]), path)
        print("px on the slide → px of the tile   OpenSlide tiles/s   ratio (least to most of five turns)")
        for side, out in ((224, 224), (256, 224), (448, 224), (512, 256)):
            pairs = [(theirs(path, side, out), ours(path, side, out)) for _ in range(TURNS)]
            ratios = sorted(b / a for a, b in pairs)
            rate = statistics.median(a for a, _ in pairs)
            middle = statistics.median(ratios)
            print(f"{side} → {out} {rate:28.0f} {middle:22.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
