"""A study that does not fit into the memory it may take: how much it takes, and how much of training is arithmetic.

    python benchmarks/streamed_study.py [--spots 2000000] [--dim 1536] [--max-memory 1] [--steps 400]

Makes a store of slides of 20,000 spots with random embeddings (1 view, 50 genes), loads it with --max-memory GB, and in
a process of its own does what `nh2st` does before its first epoch (scaling, hypergraphs: every embedding is read) and
then `--steps` steps of an epoch over all spots, in batches as published. An epoch is made of steps like these. Reported
are the process's peak memory, all it has mapped included, and the share of a step's time that is not reading.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from random_store import make_store

GENES, PER_SLIDE = 50, 20_000


def measure(folder: Path, max_memory: float, steps: int) -> None:
    from nh2st_pipe.data.streamed import StreamedCache
    from nh2st_pipe.data.study import Study
    from nh2st_pipe.heads.nh2st import NH2ST
    from nh2st_pipe.recipes.train import load_train_recipe
    from nh2st_pipe.store.read import open_store

    reading = 0.0
    plain = StreamedCache.gather

    def timed(self: StreamedCache, *arguments: object) -> torch.Tensor:
        nonlocal reading
        began = time.perf_counter()
        out = plain(self, *arguments)  # type: ignore[arg-type]
        reading += time.perf_counter() - began
        return out

    setattr(StreamedCache, "gather", timed)  # noqa: B010
    store, recipe = open_store(folder / "store.zarr"), load_train_recipe("nh2st")
    began = time.perf_counter()
    study = Study.load(store, store.slides(), max_memory=int(max_memory * 1e9), say=print)
    print(f"laid out in {time.perf_counter() - began:.0f} s", flush=True)
    panel = next(iter(study.slides.values())).genes
    samples = study.samples(list(study.slides), recipe, study.targets(list(study.slides), panel, recipe))
    model = NH2ST.build(recipe, samples.dim, panel, {})
    began, reading = time.perf_counter(), 0.0
    model.prepare(samples)
    operators = model.operators(samples)
    took = time.perf_counter() - began
    said = f"scaling and hypergraphs of {len(samples):,} spots in {took:.0f} s"
    print(f"{said}, {1 - reading / took:.0%} arithmetic", flush=True)
    assert recipe.fit is not None
    batch = recipe.fit.batch_size
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    order = torch.randperm(len(samples))[: (steps + 20) * batch].split(batch)
    for number, rows in enumerate(order):
        if number == 20:
            began, reading = time.perf_counter(), 0.0
        loss = model.losses(samples, operators, rows, torch.zeros_like(rows))["total"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    took = time.perf_counter() - began
    each, peak = took / steps / batch, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{1e3 * each:.2f} ms a spot in {steps} steps, {1 - reading / took:.0%} arithmetic", flush=True)
    print(f"an epoch of all spots would take {each * len(samples) / 60:.0f} min")
    print(f"peak memory {peak:.2f} GB for {len(samples) * samples.dim * 2 / 1e9:.2f} GB of embeddings")


def main(
    spots: int = 2_000_000,
    dim: int = 1536,
    max_memory: float = 1.0,
    steps: int = 400,
    measured: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if measured is not None:
        measure(measured, max_memory, steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, rest = divmod(spots, PER_SLIDE)
        make_store(folder / "store.zarr", [PER_SLIDE] * whole + [rest] * (rest > 0), dim, 1, GENES)
        call = [sys.executable, __file__, "--measured", name, "--steps", str(steps), "--max-memory", str(max_memory)]
        subprocess.run(call, check=True)


if __name__ == "__main__":
    typer.run(main)
