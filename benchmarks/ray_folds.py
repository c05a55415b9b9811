"""Folds on a Ray cluster of this machine: one worker against two, each of one processor.

    python benchmarks/ray_folds.py [--slides 8] [--spots 1500] [--dim 512] [--genes 500]

Trains ridge-context by leaving each slide out, on a store of random embeddings, in a process of its own for each; the
seconds are those of the folds, from the run's log, and of all of it. Beside them `--jobs 1` and `--jobs 2` without Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from random_store import make_store


def measure(folder: Path, workers: int, engine: str, genes: int) -> None:
    from nh2st_pipe.training.run import train

    options: dict[str, object] = {"jobs": workers}
    if engine == "ray":
        import ray

        ray.init("local", num_cpus=workers, log_to_driver=False, include_dashboard=False)
        options = {"engine": "ray"}
    else:
        import torch

        torch.set_num_threads(1)
    began = time.perf_counter()
    settings = ["baselines=[]", "choose={}"]
    run = train(folder / "store.zarr", recipe="ridge-context", genes=genes, folds="slide", settings=settings,
                out=folder / f"{engine}{workers}", **options)  # type: ignore[arg-type]  # fmt: skip
    whole = time.perf_counter() - began
    events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    at = {each["event"]: datetime.fromisoformat(each["time"]) for each in events}
    print((at["fold"] - at["start"]).total_seconds(), whole)


def main(
    slides: int = 8,
    spots: int = 1500,
    dim: int = 512,
    genes: int = 500,
    measured: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if measured:
        place, kind, number = measured.split("|")
        measure(Path(place), int(number), kind, genes)
        return
    with tempfile.TemporaryDirectory() as name:
        make_store(Path(name) / "store.zarr", [spots] * slides, dim, 1, genes)
        for engine in ("local", "ray"):
            took = {}
            for workers in (1, 2):
                call = [sys.executable, __file__, "--measured", f"{name}|{engine}|{workers}", "--genes", str(genes)]
                done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
                took[workers], whole = map(float, done.stdout.split()[-2:])
                print(f"{engine}, {workers}: folds {took[workers]:.1f} s, all of it {whole:.1f} s", flush=True)
            print(f"{engine}: two are {took[1] / took[2]:.2f} × one", flush=True)


if __name__ == "__main__":
    typer.run(main)
