"""What each part of the default head is worth: one run a line, everything else being the same.

    python benchmarks/ablation.py STORE [--folds slide] [--seed 1] [--set key=value …]

Prints a Markdown table; the first line is the recipe as it is. The runs are made in a folder that goes away.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from nh2st_pipe.training.run import train

CHANGES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "kernel part alone": ("head.network=null",),
    "network part alone": ("head.kernel=null",),
    "the spot alone": ("head.sigmas=[]", "head.network.attention=null"),
    "one width of surroundings": ("head.sigmas=[1]",),
    "no cross-attention": ("head.network.attention=null",),
    "hypergraph block": ("head.hypergraph=true",),
    "contrastive loss": ("head.network.contrast={}",),
    "stain directions left in": ("head.kernel.stain_directions=0",),
    "stain directions left out of the network too": ("head.network.stain_directions=16",),
    "slides not centred": ("head.centring=0",),
    "slides centred whole": ("head.centring=1",),
    "spots of few counts weigh as much": ("head.kernel.low_count=0", "head.network.low_count=0"),
    "kernel of full rank": ("head.kernel.rank=250",),
    "one member": ("head.network.members=1",),
    "64 components": ("head.network.components=64",),
    "one view": ("features.views=first",),
    "400 landmarks": ("head.kernel.exact_up_to=100", "head.kernel.landmarks=400"),
}


def main(
    store: Annotated[Path, typer.Argument(help="Store with expression.")],
    folds: str = "slide",
    seed: int = 1,
    jobs: int = 1,
    setting: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    print("| changed | `--set` | PCC | best 50 | top 50 | MSE |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i, (what, change) in enumerate(CHANGES.items()):
            settings = ("baselines=[]", *(setting or ()), *change)
            run = train(store, folds=folds, seed=seed, settings=settings, jobs=jobs, out=Path(folder) / str(i))
            own = run.metrics["summary"]
            shown = ", ".join(f"`{each}`" for each in change)
            figures = [f"{own[key]:.3f}" for key in ("pcc", "pcc_top50_train", "pcc_top50")]
            print(f"| {what} | {shown} | {' | '.join(figures)} | {own['mse']:.4f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
