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

import numpy as np
import scipy.sparse as sp
import typer

from nh2st_pipe.store.format import Contract, ImageSource, ManifestRow, WeightsOf
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots

GENES, PER_SLIDE, PREDICTED = 250, 20_000, 5_000


def make_store(path: Path, sizes: list[int], dim: int, views: int) -> None:
    rng = np.random.default_rng(0)
    contract = Contract(
        encoder={"name": "random", "dim": dim},
        identity={"name": "random", "dim": dim},
        weights=WeightsOf(sha256="none", source="random"),
        precision="float32",
        tile={"size_um": 112.0, "size_level0_px": None},
        views=1 if views == 1 else 8,
    )
    store = StoreWriter(path, contract)
    for i, size in enumerate(sizes):
        side = int(np.ceil(np.sqrt(size)))
        rows, cols = (axis.ravel()[:size] for axis in np.mgrid[:side, :side])
        counts = sp.csr_matrix(rng.poisson(0.5, (size, GENES)).astype(np.float64))
        names, xy = [f"b{j}" for j in range(size)], np.column_stack((cols, rows)) * 200.0
        spots = Spots(names, xy, rows, cols, counts, [f"g{j}" for j in range(GENES)])
        row = ManifestRow(slide_id=f"s{i}", slide=f"s{i}.tif", patient=f"p{i}")
        writer = store.slide(row, ImageSource(image=f"1-{i}"), spots, f"1-{i}", {"image": {"fingerprint": f"1-{i}"}})
        for start in range(0, size, 256):
            n = min(256, size - start)
            writer.append(rng.standard_normal((n, contract.views, dim), np.float32).astype(np.float16))
        writer.finish(*nearest_spots(xy, 9), {})


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
        make_store(folder / "store.zarr", [PER_SLIDE] * whole + [rest] * (rest > 0), dim, views)
        make_store(folder / "small.zarr", [PREDICTED], dim, views)
        call = [sys.executable, __file__, "--measured", name, "--epochs", str(epochs)]
        subprocess.run(call, check=True)


if __name__ == "__main__":
    typer.run(main)
