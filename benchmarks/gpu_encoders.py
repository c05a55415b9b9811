"""What a GPU gives an encoder, of what it could.

    python benchmarks/gpu_encoders.py [--encoders lunit-vits16 uni prov-gigapath] [--batches 64 128 256] [--compile]

The ceilings are measured in the same run: a large bf16 matrix product, a large copy on the device. Encoders have
random weights and tiles that are in memory; arithmetic is counted as two operations for each weight and token, so
that attention is left out. The way of `embed` (`encode`, batch after batch, uint8 tiles up and embeddings down) is held
against the backbone alone on images that lie on the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from embed_share import rate

from nh2st_pipe.embedding.plan import auto_precision
from nh2st_pipe.encoders.batches import batch_that_fits
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.encoders.load import build_backbone
from nh2st_pipe.recipes.encoder import load_encoder_recipe


def seconds(work: Callable[[], object], times: int = 10) -> float:
    """Return the median seconds of `work` on the device, by its events."""
    took: list[float] = []
    for _ in range(times + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1e3)
    return statistics.median(took[3:])


def ceilings() -> tuple[float, float]:
    """Return TFLOP/s of a bf16 matrix product and TB/s of a copy, read and write counted."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device="cuda")
    there = torch.empty_like(source)
    return 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, 2 * 4 * 2**30 / seconds(lambda: there.copy_(source)) / 1e12


def alone(encoder: Encoder, size: int) -> float:
    """Return tiles/s of the backbone on a batch of images on the device."""
    px = encoder.recipe.input_px
    images = torch.randn(size, 3, px, px, device="cuda", dtype=torch.float32 if encoder.autocast else encoder.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), encoder._arithmetic():
        return size / seconds(lambda: encoder._embed(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["lunit-vits16", "uni", "prov-gigapath"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    product, copy = ceilings()
    print(f"{torch.cuda.get_device_name()}: bf16 product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s", flush=True)
    for name in given.encoders:
        recipe = load_encoder_recipe(name)
        precision = auto_precision(recipe, "cuda")
        encoder = Encoder(recipe, build_backbone(recipe), torch.device("cuda"), precision, compiled=given.compile)
        weights = sum(p.numel() for p in encoder.backbone.parameters())
        patch = getattr(getattr(encoder.backbone, "patch_embed", None), "patch_size", (32, 32))[0]
        operations = 2 * weights * (recipe.input_px / patch) ** 2
        for size in given.batches:
            free, fed = alone(encoder, size), rate(encoder, 12 * size, size, views=1)
            print(
                f"{name}, {precision}, batch {size}: backbone {free:,.0f} tiles/s "
                f"({free * operations / 1e12 / product:.0%} of the product), fed {fed:,.0f} ({fed / free:.2f})",
                flush=True,
            )
        began = time.perf_counter()
        print(f"{name}: takes {batch_that_fits(encoder, 1)}, found in {time.perf_counter() - began:.1f} s", flush=True)
        del encoder
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
