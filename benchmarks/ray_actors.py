"""What two Ray actors on one machine make of a load that waits for its readers, and what one costs against no Ray.

    python benchmarks/ray_actors.py PICTURE [--slides 12]

The same slides (tiled JPEG pyramids of PICTURE repeated, no spots) are embedded with the weightless encoder, each
process with one thread that reads: by this process alone, by one actor, by two. Timed is from the first slide handed
out to the last completion mark: what Ray and torch take to start is the same for a day's work as for a minute's.
"""

from __future__ import annotations

import argparse
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


def seconds(manifest: Path, store: Path, **options: Any) -> float:
    began = Began()
    summary = embed(
        manifest, encoder="fake", store=store, tile_px=2048, workers=1, batch_size=8, progress=began, **options
    )
    assert not summary.failed, summary.failed
    return time.perf_counter() - began.at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--slides", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(given.picture, folder / "slide.tif", (1, 4, 16))
        lines = ["slide_id,slide,mpp", *(f"s{i},slide.tif,0.5" for i in range(given.slides))]
        manifest = folder / "manifest.csv"
        manifest.write_text("\n".join(lines) + "\n")
        embed(manifest, encoder="fake", store=folder / "warm.zarr", tile_px=2048, only=["s0"])
        took = {
            "one process": seconds(manifest, folder / "local.zarr"),
            "one actor": seconds(manifest, folder / "one.zarr", engine="ray", actors=1),
            "two actors": seconds(manifest, folder / "two.zarr", engine="ray", actors=2),
            "one process again": seconds(manifest, folder / "again.zarr"),
        }
        for who, value in took.items():
            print(f"{who}: {value:.1f} s")
        local = min(took["one process"], took["one process again"])
        print(f"two actors against one: {took['one actor'] / took['two actors']:.2f} ×")
        print(f"one actor against no Ray: {took['one actor'] / local - 1:+.1%}")


if __name__ == "__main__":
    main()
