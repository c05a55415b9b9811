"""How long the heads take on a GPU, and what of it is the GPU's work.

    python benchmarks/gpu_heads.py [--spots 100000] [--dim 1536] [--genes 250] [--heads nh2st nh2st-context ...]

Random embeddings and targets of slides of 2,000 spots. For heads that are trained by epochs: seconds an epoch, spots/s,
and the share of the wall time in which kernels ran, by torch's profiler; the rest is launching them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from nh2st_pipe.data.samples import Part, ResidentCache, Samples
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.tiles.neighbours import nearest_spots

PER_SLIDE = 2_000


def samples_of(spots: int, dim: int, genes: int, device: torch.device) -> Samples:
    side = int(np.ceil(np.sqrt(PER_SLIDE)))
    grid = np.column_stack([axis.ravel()[:PER_SLIDE] for axis in np.mgrid[:side, :side]])
    xy = grid[:, ::-1] * 200.0
    table, _ = nearest_spots(xy, 9)
    slides = spots // PER_SLIDE
    starts = range(0, slides * PER_SLIDE, PER_SLIDE)
    near = np.concatenate([table.astype(np.int64) + start for start in starts])
    torch.manual_seed(0)
    target = torch.rand(slides * PER_SLIDE, genes, device=device)
    return Samples(
        ResidentCache(torch.randn(len(near), 1, dim, device=device).half()),
        torch.arange(len(near), device=device),
        torch.from_numpy(near).to(device),
        target,
        target,
        target.sum(1).double(),
        tuple(Part(f"s{start}", start, start + PER_SLIDE, xy, grid) for start in starts),
    )


def share_of_kernels(recipe: TrainRecipe, train: Samples, genes: list[str]) -> tuple[float, str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        registry.fit(recipe, train, genes, {}, epochs=1)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    most = ", ".join(f"{row.key[:48]} {row.self_device_time_total / 1e6 / took:.0%}" for row in rows[:4])
    return busy / took, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spots", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument(
        "--heads", nargs="+", default=["mlp", "ridge", "ridge-context", "knn", "nh2st-context", "nh2st"]
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    train = samples_of(given.spots, given.dim, given.genes, device)
    genes = [f"g{i}" for i in range(given.genes)]
    print(f"{len(train):,} spots × {given.dim}, {given.genes} genes, on {device}", flush=True)
    for name in given.heads:
        values = {**load_train_recipe(name).model_dump(), "baselines": ()}
        if "network" in values["head"]:
            values["head"]["network"]["epochs"] = given.epochs
        recipe = TrainRecipe.model_validate(values)
        began = time.perf_counter()
        done = registry.fit(recipe, train, genes, {}, epochs=given.epochs)
        done.model.predict(train)
        took = time.perf_counter() - began
        epochs = [row["train_seconds"] for row in done.history if "train_seconds" in row]
        said = f"{name}: {took:.1f} s, predicting included"
        if epochs:
            said += f"; an epoch {min(epochs):.2f} s, {len(train) / min(epochs):,.0f} spots/s"
        print(said, flush=True)
        if device.type == "cuda" and epochs:
            small = samples_of(4 * PER_SLIDE, given.dim, given.genes, device)
            share, most = share_of_kernels(recipe, small, genes)
            print(f"  kernels {share:.0%} of the time at {len(small):,} spots; {most}", flush=True)


if __name__ == "__main__":
    main()
