"""Peak memory of training, against the cache it trains on.

    python benchmarks/train_memory.py [--spots 10000] [--recipe ridge-context]

Makes a store of four slides of random embeddings (8 views, 512 values) and trains a recipe on it by slide, in a process
of its own. Prints by how much the peak of its resident memory lies above that of a process which has everything
imported and the slides read with one view of eight, as a multiple of the cache (all embeddings in float16).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from random_store import make_store

DIM, GENES, SLIDES = 512, 100, 4
VIEWS: Literal[8] = 8


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_and_measure(path: str, recipe: str) -> None:
    from nh2st_pipe.store.read import open_store
    from nh2st_pipe.training.run import train

    store = open_store(path)
    slides = [store.read(name, first_view_only=True) for name in store.slides()]
    cache = sum(len(slide) for slide in slides) * VIEWS * DIM * 2 / 2**20
    before = megabytes()  # at its peak: with the slides, and one view of their embeddings
    del slides
    settings = ["baselines=[]"]
    train(path, recipe=recipe, settings=settings, folds="slide", out=Path(path).with_name("run"))
    above = megabytes() - before + cache / VIEWS  # that one view is part of the cache
    print(f"{recipe}: cache {cache:.0f} MB; peak {above:.0f} MB above the slides: {above / cache:.2f} × the cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spots", type=int, default=10_000, help="a slide")
    parser.add_argument("--recipe", default="ridge-context")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        train_and_measure(arguments.measure, arguments.recipe)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        make_store(path, [arguments.spots] * SLIDES, DIM, VIEWS, GENES)
        again = [sys.executable, __file__, "--measure", str(path), "--recipe", arguments.recipe]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
