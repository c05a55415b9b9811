"""What `embed` keeps of the speed of its encoder alone, and how much memory it takes.

    python benchmarks/embed_share.py manifest.csv --encoder efficientnet-lite0 [--weights FILE] [--device cuda]

The encoder alone is fed tiles that are in memory, at the batch size that suits it best, before and after `embed` does
its work, and the better of the two counts. The ratio is the tiles per second of the whole call of `embed`, from
reading the manifest to the last completion mark, over that; loading the encoder is left out of both. Peak memory is
the process's largest resident set.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from nh2st_pipe.core.devices import pick_device
from nh2st_pipe.core.progress import PlainProgress
from nh2st_pipe.embedding.plan import auto_precision
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.embedding.work import Work
from nh2st_pipe.encoders.encoder import Encoder, Underway
from nh2st_pipe.encoders.load import build_backbone, load_encoder
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.recipes.encoder import load_encoder_recipe


def rate(encoder: Encoder, tiles: int, size: int, views: int) -> float:
    """Return tiles per second of batches of `size` tiles in memory."""
    px = encoder.recipe.input_px
    batch = encoder.blank((size, px, px, 3))
    batch[:] = np.random.default_rng(0).integers(0, 255, batch.shape, np.uint8)
    encoder.encode(batch, views)
    underway = deque[Underway]()
    began = time.perf_counter()
    rounds = max(tiles // size, 2)
    for _ in range(rounds):
        underway.append(encoder.start(batch, views))
        if len(underway) > encoder.batches_ahead:
            underway.popleft().result()
    while underway:
        underway.popleft().result()
    return rounds * size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--random", action="store_true", help="random weights, where the encoder's own are not at hand")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--tile-px", type=float, default=224)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes to try; default 8 16 32, on a GPU 64 128 256")
    parser.add_argument("--tiles", type=int, default=256, help="tiles the encoder alone is timed on, each time")
    given = parser.parse_args()
    recipe = load_encoder_recipe(given.encoder)
    if given.random:
        with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
            given.weights = Path(file.name)
        recipe = recipe.model_copy(update={"layout": "timm", "strip_prefixes": (), "drop": (), "sha256": None})
        save_file(build_backbone(recipe).state_dict(), given.weights)
    found = find_weights(recipe, given.weights)
    device = pick_device(given.device)
    encoder = load_encoder(recipe, found.path, device=device, precision=auto_precision(recipe, device.type))
    sizes = given.sizes or ([64, 128, 256] if device.type == "cuda" else [8, 16, 32])
    before = {size: rate(encoder, given.tiles, size, given.views) for size in sizes}
    best = max(before, key=lambda size: before[size])
    setattr(Work, "load", lambda self, name, threads=None: encoder)  # noqa: B010  # loaded already, for both
    with tempfile.TemporaryDirectory() as folder, PlainProgress() as progress:
        summary = embed(
            given.manifest,
            encoder=recipe,
            weights=given.weights,
            views=given.views,
            tile_px=given.tile_px,
            device=given.device,
            workers=given.workers,
            batch_size=best,
            stain_shift="off",
            store=Path(folder) / "store.zarr",
            progress=progress,
        )
    alone = max(before[best], rate(encoder, given.tiles, best, given.views))
    whole = summary.encoded_tiles / summary.seconds["total"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{summary.encoded_tiles:,} tiles × {given.views} views on {encoder.device}, batches of {best}")
    print(f"encoder alone {alone:.1f} tiles/s, embed {whole:.1f} tiles/s: {whole / alone:.3f}")
    print(f"waiting for tiles {summary.seconds['reading']:.1f} s, for writing {summary.seconds['writing']:.1f} s")
    print(f"peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
