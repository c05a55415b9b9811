"""An epoch of `nh2st` from the cache, against the step it replaces.

    python benchmarks/train_epoch.py store.zarr

The reference runs its ResNet18 forward and backward over a spot's own tile and its nine neighbours in every step. That
step (batch of 8 spots, 80 tiles of 224 px, random pixels, the encoder alone) is timed here on the same cores as
the epochs, and the ratio is seconds per spot of the one over the other.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.store.read import open_store


def reference_seconds_per_spot(batch: int = 8, steps: int = 3) -> float:
    model = timm.create_model("resnet18", num_classes=0).train()
    optimiser = torch.optim.Adam(model.parameters())
    tiles = torch.rand(batch * 10, 3, 224, 224)
    took = []
    for _ in range(steps):
        start = time.perf_counter()
        optimiser.zero_grad()
        model(tiles).square().mean().backward()
        optimiser.step()
        took.append(time.perf_counter() - start)
    return min(took) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    slides = [store.read(name) for name in store.slides()]
    recipe = load_train_recipe("nh2st")
    panel = choose_panel(slides, recipe.targets)
    samples = Samples.of(slides, [targets(s, panel, recipe.targets) for s in slides], neighbours=9)
    quick = TrainRecipe.model_validate({**recipe.model_dump(), "baselines": ()})
    history = registry.fit(quick, samples, panel, {}, epochs=arguments.epochs).history
    epoch = min(row["train_seconds"] for row in history)
    median = sorted(row["train_seconds"] for row in history)[len(history) // 2]
    reference = reference_seconds_per_spot()
    n, views = len(samples), samples.n_views
    print(f"{n} spots × {views} views, {len(panel)} genes, {torch.get_num_threads()} threads")
    print(
        f"one epoch of nh2st: {epoch:.2f} s at best, {median:.2f} s in the median ({1e3 * epoch / n:.2f} ms per spot)"
    )
    print(f"ResNet18 over a spot and its nine neighbours, forward and backward: {reference:.3f} s per spot")
    print(f"ratio: {reference / (epoch / n):.0f}")


if __name__ == "__main__":
    main()
