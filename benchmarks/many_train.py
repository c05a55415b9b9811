"""Training on very many slides within a budget: peak memory against it, and time against the number of slides.

    python benchmarks/many_train.py [--slides 100,1000] [--spots 1000] [--dim 512] [--genes 2000] [--max-memory 4GB]
        [--recipes ridge-context,nh2st-context] [--store FOLDER]

Makes stores of random embeddings and counts (a tenth of them above 0), every slide of a patient of its own, and trains
on each in a process of its own: `--folds none`, so one fit of everything that is kept, one alpha, one epoch of one
member, and what carries over. With --store they are kept there, and used again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from random_store import make_store

from nh2st_pipe.core.machine import peak

RATE = 0.105  # a tenth of the counts are above 0
SETTINGS = {
    "ridge-context": ["baselines=[]", "choose={}"],
    "nh2st-context": ["baselines=[]", "head.network.epochs=1", "head.network.members=1"],
}


def measure(store: Path, out: Path, recipe: str, genes: int, most: str) -> None:
    from nh2st_pipe.training.run import train

    began = time.perf_counter()
    train(store, recipe=recipe, settings=SETTINGS[recipe], genes=genes, folds="none", out=out, max_memory=most)
    print(f"{time.perf_counter() - began:.1f} {peak() / 1e9:.2f}")


def main(
    slides: str = "100,1000",
    spots: int = 1000,
    dim: int = 512,
    genes: int = 2000,
    max_memory: str = "4GB",
    recipes: str = "ridge-context,nh2st-context",
    store: Path | None = None,
    measured: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if measured:
        at, recipe = measured.split("|")
        with tempfile.TemporaryDirectory(dir=Path(at).parent) as out:
            measure(Path(at), Path(out) / "run", recipe, genes, max_memory)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, took = store or Path(name), dict[tuple[str, int], float]()
        for number in map(int, slides.split(",")):
            place = folder / f"{number}x{spots}x{dim}x{genes}.zarr"
            if not place.exists():
                make_store(place, [spots] * number, dim, 1, genes, RATE)
            for recipe in recipes.split(","):
                call = [sys.executable, __file__, "--measured", f"{place}|{recipe}", "--genes", str(genes)]
                done = subprocess.run(
                    [*call, "--max-memory", max_memory], stdout=subprocess.PIPE, check=True, text=True
                )
                seconds, peak = map(float, done.stdout.split()[-2:])
                took[recipe, number] = seconds
                print(f"{recipe}, {number:,} slides: {seconds:.0f} s, peak {peak:.2f} GB of {max_memory}", flush=True)
        for recipe in recipes.split(","):
            few, *_, many = map(int, slides.split(","))
            print(f"{recipe}: {many:,} slides take {took[recipe, many] / took[recipe, few]:.1f} × {few:,}")


if __name__ == "__main__":
    typer.run(main)
