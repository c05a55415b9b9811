"""How much of `embed` is the encoder's own time, and how much memory it takes.

    python benchmarks/embed_share.py manifest.csv --encoder efficientnet-lite0 [--weights FILE]

The encoder's share is the wall time spent inside `Encoder.encode` over that of the whole call, from reading the
manifest to the last completion mark. Peak memory is the process's largest resident set.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

from nh2st_pipe.core.progress import PlainProgress
from nh2st_pipe.embedding.run import embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--tile-px", type=float, default=224)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, PlainProgress() as progress:
        summary = embed(
            arguments.manifest,
            encoder=arguments.encoder,
            weights=arguments.weights,
            views=arguments.views,
            tile_px=arguments.tile_px,
            store=Path(folder) / "store.zarr",
            progress=progress,
        )
    seconds = summary.seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{summary.encoded_tiles:,} tiles × {arguments.views} views in {seconds['total']:.1f} s")
    print(f"inside the encoder: {seconds['encoder'] / seconds['total']:.1%} of the wall time")
    print(f"waiting for tiles {seconds['reading']:.1f} s, writing {seconds['writing']:.1f} s")
    print(f"peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
