"""Predicting a large slide from the cache with the default head: seconds, and peak memory, by views and genes.

    python benchmarks/predict.py [--tiles 10000] [--dim 1536] [--slides 1] [--carry] [--float16]
    python benchmarks/predict.py --genes 18000 --views 1 --float16 [--recipe ridge-context]   # all genes

Trains `nh2st-context` on four slides of 300 spots (two epochs) for each number of genes, then predicts slides of random
embeddings in a process of its own: trust card and files included. Seconds are held against reading the slides. With
`--carry`: what weighing predictions costs on a slide like the training slides, and on one unlike them, for which spots
are retrieved from 20,000, against the same head without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from random_store import make_store


def measure(model: str, store: str, out: str, float16: str = "") -> None:
    """Predict and print seconds and memory as JSON."""
    from nh2st_pipe import predict
    from nh2st_pipe.core.machine import peak
    from nh2st_pipe.store.read import open_store

    began = time.perf_counter()
    opened = open_store(store)
    for name in opened.slides():
        opened.read(name)
    read = time.perf_counter() - began
    before = peak() / 2**30
    began = time.perf_counter()
    done = predict(model, embeddings=store, out=out, float16=bool(float16))
    took = time.perf_counter() - began
    most = peak() / 2**30
    assert not done.failed
    print(json.dumps({"read": read, "took": took, "before": before, "peak": most}))


def weighed(tiles: int, dim: int) -> None:
    """Measure and print what weighing costs: on like slides, and on unlike ones with 20,000 spots to retrieve from."""
    from nh2st_pipe import load_model, train
    from nh2st_pipe.data.study import Study
    from nh2st_pipe.heads.alike import Alike
    from nh2st_pipe.heads.carry import Carry
    from nh2st_pipe.recipes.train import CarryRecipe, load_train_recipe
    from nh2st_pipe.runs.model import load_reference, save_model
    from nh2st_pipe.store.read import open_store

    settings = ["head.network.epochs=2", "baselines=[]", "targets.smooth=none", "carry=null"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for store, sizes, genes in (("new", [tiles], 2), ("train", [300] * 4, 250), ("kept", [5000] * 4, 250)):
            make_store(folder / f"{store}.zarr", sizes, dim, 1, genes)
        run = train(folder / "train.zarr", genes=250, folds="none", out=folder / "run", settings=settings)
        head, recipe = load_model(run.path), load_train_recipe("nh2st-context", settings)
        kept = open_store(folder / "kept.zarr")
        study = Study.load(kept, kept.slides())
        spots = study.samples(kept.slides(), recipe, study.targets(kept.slides(), head.genes, recipe))
        found = CarryRecipe()
        assert found.retrieval is not None
        alike = Alike.of(found.retrieval, spots, 0)
        basis = np.linalg.qr(np.random.default_rng(0).standard_normal((250, found.rank)))[0].astype(np.float32)
        ones = np.ones(found.rank, np.float32)
        models = {"nothing weighed": run.path}
        for kind, gate in (("like", (-2.0, -1.0)), ("unlike", (2.0, 3.0))):
            gated = found.model_copy(update={"gate_from": gate[0], "gate_to": gate[1]})
            head.weigh_by(Carry(gated, basis, ones, ones, alike=alike))
            models[kind] = folder / kind
            save_model(head, models[kind], "", load_reference(run.path))
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for _ in range(3):  # in turn, so that a busy machine is as busy for each
            for kind, model in models.items():
                call = [sys.executable, __file__, str(model), str(folder / "new.zarr"), str(folder / "p")]
                said = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
                seconds[kind].append(said["took"])
    least = {kind: min(of) for kind, of in seconds.items()}
    for kind, took in least.items():
        print(f"{tiles:,} tiles, {kind}: {took:.1f} s, {took / least['nothing weighed']:.2f} times", flush=True)


def main(
    tiles: Annotated[int, typer.Option()] = 10_000,
    dim: Annotated[int, typer.Option()] = 1536,
    slides: Annotated[int, typer.Option()] = 1,
    genes: Annotated[str, typer.Option(help="Numbers, with commas between them.")] = "250,2000",
    views: Annotated[str, typer.Option(help="1 or 8 or 1,8")] = "1,8",
    float16: Annotated[bool, typer.Option("--float16", help="Values in half precision.")] = False,
    recipe: Annotated[str, typer.Option()] = "nh2st-context",
    carry: Annotated[bool, typer.Option("--carry", help="What weighing predictions costs.")] = False,
) -> None:
    """Measure and print."""
    from nh2st_pipe import train

    if carry:
        weighed(tiles, dim)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n_views in map(int, views.split(",")):
            both: Literal[1, 8] = 8 if n_views == 8 else 1
            make_store(folder / f"new-{both}.zarr", [tiles] * slides, dim, both, 2)
            for n_genes in map(int, genes.split(",")):
                made = folder / f"{both}-{n_genes}"
                make_store(made / "store.zarr", [300] * 4, dim, both, n_genes)
                settings = ["head.network.epochs=2"] if recipe == "nh2st-context" else ["choose={}"]
                settings += ["baselines=[]", "targets.smooth=none"]
                train(made / "store.zarr", recipe=recipe, genes=n_genes, folds=2, out=made / "run", settings=settings)
                call = [sys.executable, __file__, str(made / "run"), str(folder / f"new-{both}.zarr"), str(made / "p")]
                call += ["float16"] * float16
                said = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{slides} × {tiles:,} tiles, {both} views, {n_genes:,} genes: {said['took']:.1f} s, "
                    f"{said['took'] / said['read']:.1f} times reading; peak {said['peak']:.2f} GB, "
                    f"{said['peak'] - said['before']:.2f} above reading",
                    flush=True,
                )


if __name__ == "__main__":
    if len(sys.argv) in (4, 5) and not sys.argv[1].startswith("--"):
        measure(*sys.argv[1:])
    else:
        typer.run(main)
