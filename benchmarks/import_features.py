"""Importing features: against copying the same bytes, its memory by tiles, and many small files.

    python benchmarks/import_features.py [--tiles 40000] [--dim 1536] [--large 4] [--slides 1000]

--large slides of so many tiles of 64 px, all of them on their tissue (JPEG tiles, three levels), with features in
float32 as TRIDENT lays them down: seconds of import-features, and of copying the features' files to the same disk and
syncing it, as a ratio; peak memory, and that with a quarter of the tiles. Then --slides pictures of 240 px with 64
tiles each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import tifffile
from PIL import Image

from nh2st_pipe.importing.run import import_features

_SIDE = 64


def features(path: Path, corners: np.ndarray, dim: int) -> None:
    """Write features of tiles with these corners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["coords"] = corners
        file["coords"].attrs["patch_size_level0"] = _SIDE
        values = file.create_dataset("features", (len(corners), dim), np.float32)
        for start in range(0, len(corners), 4096):
            part = values[start : start + 4096]
            values[start : start + 4096] = rng.normal(size=part.shape).astype(np.float32)


def lattice(tiles: int) -> tuple[np.ndarray, int]:
    """Return the corners of a square of tiles in the middle of a slide, and the slide's side."""
    n = int(np.sqrt(tiles))
    side = (n + 8) * _SIDE
    x, y = np.meshgrid(np.arange(n), np.arange(n))
    return np.column_stack((x.ravel(), y.ravel())) * _SIDE + 4 * _SIDE, side


def large(folder: Path, tiles: int, dim: int, slides: int) -> None:
    """Write slides and their features."""
    folder.mkdir()
    corners, side = lattice(tiles)
    low, high = 4 * _SIDE, side - 4 * _SIDE
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(folder / "s0.tif", bigtiff=True) as file:
        for level in range(3):
            down = 4**level
            edge = side // down
            px = np.full((edge, edge, 3), 245, np.uint8)
            inside = slice(low // down, high // down)
            shape = px[inside, inside].shape
            px[inside, inside] = rng.integers(0, 40, shape, np.uint8) + np.array([190, 115, 165], np.uint8)
            file.write(
                px,
                tile=(256, 256),
                compression="jpeg",
                photometric="rgb",
                subfiletype=1 if level else 0,
                resolution=(20_000 / down,) * 2,
                resolutionunit="CENTIMETER",
            )
    lines = ["slide_id,slide"]
    for number in range(slides):
        features(folder / f"features_mine/s{number}.h5", corners, dim)
        lines.append(f"s{number},s{number}.tif")
        if number:
            shutil.copy(folder / "s0.tif", folder / f"s{number}.tif")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def measure(folder: Path) -> None:
    """Import a folder, and print seconds and peak memory (MB)."""
    began = time.perf_counter()
    summary = import_features(folder / "features_mine", folder / "manifest.csv", folder / "store.zarr")
    assert not summary.failed, summary.failed
    os.sync()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of whoever started this process
    print(time.perf_counter() - began, int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def measured(folder: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--measured", str(folder)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(peak)


def small(folder: Path, slides: int) -> None:
    """Write many small slides with features."""
    folder.mkdir()
    x, y = np.meshgrid(np.arange(8), np.arange(8))
    corners, lines = np.column_stack((x.ravel(), y.ravel())) * 24 + 24, ["slide_id,slide,mpp"]
    rng = np.random.default_rng(0)
    for number in range(slides):
        px = np.full((240, 240, 3), 245, np.uint8)
        px[24:216, 24:216] = rng.integers(0, 40, (192, 192, 3), np.uint8) + np.array([190, 115, 165], np.uint8)
        Image.fromarray(px).save(folder / f"s{number}.png", compress_level=1)
        features(folder / f"features_mine/s{number}.h5", corners, 64)
        with h5py.File(folder / f"features_mine/s{number}.h5", "r+") as file:
            file["coords"].attrs["patch_size_level0"] = 24
        lines.append(f"s{number},s{number}.png,0.5")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--large", type=int, default=4)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured is not None:
        measure(given.measured)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large(folder / "few", given.tiles // 4, given.dim, given.large)
        large(folder / "many", given.tiles, given.dim, given.large)
        written = folder / "many/features_mine"
        os.sync()
        began = time.perf_counter()
        shutil.copytree(written, folder / "copied")
        os.sync()
        copying = time.perf_counter() - began
        _, less = measured(folder / "few")
        seconds, peak = measured(folder / "many")
        size = sum(file.stat().st_size for file in written.iterdir()) / 1e6
        print(
            f"{size:,.0f} MB of features: {seconds:.2f} s, copying them {copying:.2f} s, {copying / seconds:.2f} of it"
        )
        print(f"peak memory {peak:,.0f} MB; of a quarter of the tiles {less:,.0f} MB")
        small(folder / "small", given.slides)
        seconds, peak = measured(folder / "small")
        print(f"{given.slides:,} small slides: {seconds:.1f} s, {peak:,.0f} MB")


if __name__ == "__main__":
    main()
