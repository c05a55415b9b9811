"""What two Ray actors on two cores make of a load that waits for its readers, and what one costs against no Ray.

    python benchmarks/ray_actors.py PICTURE [--slides 4]

The same slides (tiled JPEG pyramids of PICTURE repeated, no spots, nine tenths of the work in decoding and in finding
tissue) are embedded with the weightless encoder: by a process on one core without Ray, by one actor on one core, by two
actors on two. Timed is from the first slide handed out to the last completion mark: what Ray and torch take to start
is the same for a day's work as for a minute's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from check_slides import write

from nh2st_pipe.core.progress import Progress
from nh2st_pipe.embedding.run import embed


class Began(Progress):
    """Takes the time at which the work begins."""

    def start(self, what: str, total: float, unit: str) -> None:
        """See Progress."""
        self.at = time.perf_counter()


def measure(manifest: Path, store: Path, actors: int) -> None:
    options: dict[str, Any] = {"engine": "ray", "actors": actors} if actors else {}
    began = Began()
    summary = embed(manifest, encoder="fake", store=store, tile_px=512, workers=1, progress=began, **options)
    assert not summary.failed, summary.failed
    print(time.perf_counter() - began.at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--measured", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured:
        store, actors = given.measured
        measure(given.picture, Path(store), int(actors))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(given.picture, folder / "slide.tif", (1, 16))
        manifest = folder / "manifest.csv"
        lines = ["slide_id,slide,mpp", *(f"s{i},slide.tif,0.5" for i in range(given.slides))]
        manifest.write_text("\n".join(lines) + "\n")
        took: dict[str, float] = {}
        for number, (who, actors, cores) in enumerate(
            [("no Ray", 0, 1), ("one actor", 1, 1), ("two actors", 2, 2), ("no Ray", 0, 1), ("one actor", 1, 1)]
        ):
            call = [sys.executable, __file__, str(manifest), "--measured", str(folder / f"{number}.zarr")]
            pinned = ["taskset", "--cpu-list", f"0-{cores - 1}"]  # before torch counts the cores
            said = subprocess.run([*pinned, *call, str(actors)], check=True, capture_output=True, text=True)
            seconds = float(said.stdout.split()[-1])
            print(f"{who} on {'one core' if cores == 1 else 'two cores'}: {seconds:.1f} s", flush=True)
            took[who] = min(seconds, took.get(who, seconds))
        print(f"two actors against one: {took['one actor'] / took['two actors']:.2f} ×")
        print(f"one actor against no Ray: {took['one actor'] / took['no Ray'] - 1:+.1%}")


if __name__ == "__main__":
    main()
