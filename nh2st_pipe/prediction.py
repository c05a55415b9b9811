"""A trained head on new slides: one `.h5ad` of predicted expression per slide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.devices import pick_head_device
from nh2st_pipe.core.errors import NH2STError, RunError, StoreError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.recipes.encoder import EncoderRecipe
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.read import SlideData, Store, open_store

__all__ = ["PredictSummary", "predict"]


@dataclass
class PredictSummary:
    """What one call of `predict` wrote."""

    out: Path
    files: dict[str, Path] = field(default_factory=dict)
    """slide_id → .h5ad."""
    failed: dict[str, str] = field(default_factory=dict)
    """Slides passed over, each with its cause."""

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "out": str(self.out),
            "files": {slide_id: str(path) for slide_id, path in self.files.items()},
            "failed": self.failed,
        }


def predict(
    model: str | Path,
    *,
    embeddings: str | Path | None = None,
    slides: str | Path | None = None,
    out: str | Path = "predictions",
    weights: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> PredictSummary:
    """Predict expression with the head `model` (a run, its model/, or a hub repository).

    Exactly one of `embeddings` (a store) and `slides` (a manifest) is given. Slides are embedded first, with the
    model's own encoder and tile size, into <out>/store.zarr; `weights` is then the encoder's file where the hub's is
    not wanted. Each <out>/<slide_id>.h5ad holds X n × G, the mean over the store's views, and layers["target"]
    where the store has expression.

    Raises RunError where the model cannot be read, StoreError where the store is another encoder's.
    """
    if (embeddings is None) == (slides is None):
        raise UsageError("give either --embeddings (a store) or --slides (a manifest)")
    head = load_model(model)
    trained_on = _contract(head, model)
    progress = progress or Progress()
    summary = PredictSummary(Path(out))
    summary.out.mkdir(parents=True, exist_ok=True)
    if slides is not None:
        embeddings = _embed(slides, trained_on, summary, weights, device, progress)
    assert embeddings is not None
    store = open_store(embeddings)
    differences = trained_on.differences(store.contract, views=False)
    if differences:
        raise StoreError(f"{model} was trained on embeddings of {'; '.join(differences)}, as in {store.location}")
    names = _slides_of(store, slides, summary)
    if not names and not summary.failed:
        raise StoreError(f"{store.location} holds no complete slide; run nh2st-pipe embed first")

    torch_device = pick_head_device(device)
    head.to(torch_device)
    features = head.about["features"]
    recipe = TargetRecipe.model_validate(head.about["targets"])
    progress.start("predicting", len(names), "slides")
    for number, name in enumerate(names):
        progress.advance(number, len(names), name)
        try:
            slide = store.read(name, first_view_only=features["views"] == "first")
            samples = Samples.of(
                [slide],
                neighbours=features["neighbours"],
                device=torch_device,
                smoothed=recipe.smooth != "none",
            )
            path = summary.out / f"{name}.h5ad"
            about = {"recipe": head.about["recipe"], "out_of_fold": False}
            write_prediction(path, slide, head.genes, head.predict(samples), _truth(slide, head.genes, recipe), about)
            summary.files[name] = path
        except StoreError as error:  # a damaged slide; the others go on
            summary.failed[name] = str(error)
            progress.say(f"{name} passed over: {error}")
    return summary


def _contract(head: HeadModel, model: str | Path) -> Contract:
    try:
        return Contract.model_validate(head.about["store"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the model {model} does not say which encoder it was trained on (config.json, about)"
        ) from error


def _embed(
    slides: str | Path,
    trained_on: Contract,
    summary: PredictSummary,
    weights: str | Path | None,
    device: str,
    progress: Progress,
) -> Path:
    """Embed a manifest as the model needs it, and return the store."""
    from nh2st_pipe.embedding.run import embed

    path = summary.out / "store.zarr"
    done = embed(
        slides,
        encoder=EncoderRecipe.model_validate(trained_on.encoder),
        weights=weights,
        store=path,
        views=trained_on.views,
        tile_um=trained_on.tile["size_um"],
        tile_px=trained_on.tile["size_level0_px"],
        precision=trained_on.precision,
        device=device,
        progress=progress,
    )
    summary.failed.update(done.failed)
    return path


def _slides_of(store: Store, slides: str | Path | None, summary: PredictSummary) -> list[str]:
    """Return the slides to predict: the manifest's, or all of the store."""
    if slides is None:
        return store.slides()
    from nh2st_pipe.tiles.manifest import read_manifest

    return [row.slide_id for row in read_manifest(slides) if row.slide_id not in summary.failed]


def _truth(slide: SlideData, genes: list[str], recipe: TargetRecipe) -> NDArray[np.float32] | None:
    """Return the targets where the slide has counts and they can be made from them."""
    if slide.counts is None:
        return None
    try:
        return targets(slide, genes, recipe).values
    except NH2STError:  # no grid to smooth over: a prediction needs no truth
        return None
