"""The default head on a study of many spots: peak memory of training, time of training and of prediction.

    python benchmarks/large_study.py [--spots 200000] [--dim 1536] [--views 1] [--epochs 1]

Makes a store of slides of 20,000 spots with random embeddings, trains `nh2st-context` on all of them (`--folds none`,
the network for `--epochs`, which memory does not depend on) in a process of its own, then predicts a slide of 5,000
spots and 250 genes. The memory is compared with the cache: all embeddings in float16.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from random_store import make_store

GENES, PER_SLIDE, PREDICTED = 250, 20_000, 5_000


def gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: Path, epochs: int) -> None:
    from nh2st_pipe.prediction import predict
    from nh2st_pipe.store.read import open_store
    from nh2st_pipe.training.run import train

    began = time.perf_counter()
    settings = ["baselines=[]", f"head.network.epochs={epochs}"]
    run = train(folder / "store.zarr", settings=settings, folds="none", out=folder / "run")
    seconds, peak = time.perf_counter() - began, gigabytes()
    store = open_store(folder / "store.zarr")
    cache = sum(store.tiles(name) for name in store) * store.contract.views * store.contract.dim * 2 / 2**30
    print(f"trained on {run.metrics['n_spots']:,} spots in {seconds:.0f} s ({epochs} epochs of the network)")
    print(f"peak memory {peak:.2f} GB, {peak / cache:.1f} × the cache of {cache:.2f} GB, everything included")
    began = time.perf_counter()
    predict(run.path, embeddings=folder / "small.zarr", out=folder / "predictions")
    seconds = time.perf_counter() - began
    print(f"predicted {PREDICTED:,} spots × {GENES} genes in {seconds:.1f} s, reading and writing included")


def main(
    spots: int = 200_000,
    dim: int = 1536,
    views: int = 1,
    epochs: int = 1,
    measured: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if measured is not None:
        measure(measured, epochs)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, rest = divmod(spots, PER_SLIDE)
        make_store(folder / "store.zarr", [PER_SLIDE] * whole + [rest] * (rest > 0), dim, 1 if views == 1 else 8, GENES)
        make_store(folder / "small.zarr", [PREDICTED], dim, 1 if views == 1 else 8, GENES)
        call = [sys.executable, __file__, "--measured", name, "--epochs", str(epochs)]
        subprocess.run(call, check=True)


if __name__ == "__main__":
    typer.run(main)
