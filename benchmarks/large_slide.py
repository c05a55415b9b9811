"""Whether memory stays flat and time linear where one slide has many tiles.

    python benchmarks/large_slide.py PICTURE

The same slide (40,000 × 25,000 px, PICTURE repeated) is embedded with the weightless encoder in tiles of 128 and of
64 px, each in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from check_slides import write

from nh2st_pipe.embedding.run import embed


def measure(manifest: Path, side: float) -> None:
    began = time.perf_counter()
    summary = embed(manifest, encoder="fake", store=manifest.with_name(f"{side:g}.zarr"), tile_px=side, batch_size=64)
    assert not summary.failed, summary.failed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(summary.encoded_tiles, time.perf_counter() - began, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--measured", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured:
        measure(given.picture, given.measured)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(given.picture, folder / "slide.tif", (1, 4, 16))
        manifest = folder / "manifest.csv"
        manifest.write_text("slide_id,slide,mpp\nlarge,slide.tif,0.5\n")
        each = []
        for side in (128, 64):
            call = [sys.executable, __file__, str(manifest), "--measured", str(side)]
            said = subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-3:]
            tiles, seconds, peak = int(said[0]), float(said[1]), float(said[2])
            said_of = f"{tiles:,} tiles: {seconds:.1f} s, {1e3 * seconds / tiles:.2f} ms a tile"
            print(f"{said_of}, peak memory {peak:.2f} GB", flush=True)
            each.append((seconds / tiles, peak))
        (slow, low), (fast, high) = each
        print(f"four times the tiles: {fast / slow:.2f} × the time of each, {high / low:.2f} × the memory")


if __name__ == "__main__":
    main()
