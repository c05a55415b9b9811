"""Stage two: heads on kept embeddings, judged on slides they have not seen.

Protocols. `nested` (default): panel, feature scaling and the number of epochs come from the training slides;
epochs are chosen on one of them that is held out, then the head is trained on all of them for that long, and
the test fold is touched once. `paper`: the panel comes from all slides and the epoch kept is the best on the
test fold, as in published tables; its figures are optimistic and the run says so.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import nh2st_pipe
from nh2st_pipe.core.devices import pick_head_device
from nh2st_pipe.core.errors import TrainError, UsageError, listed
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.folds import Fold, make_folds
from nh2st_pipe.data.panels import read_gene_file
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.read import SlideData, Store, open_store
from nh2st_pipe.training.bench import Bench, Split
from nh2st_pipe.training.outcome import Outcome

__all__ = ["Run", "train"]

PROTOCOLS = {
    "nested": "gene panel, feature scaling and epochs chosen on training slides alone; each test fold touched once",
    "paper": "gene panel from all slides and best epoch chosen ON THE TEST FOLD, as in published tables: optimistic",
}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    metrics: dict[str, Any] = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """Return one row per head, the run's own first: head, pcc, pcc_top50, mse, mae, train_seconds."""
        heads = {self.metrics["head"]: self.metrics, **self.metrics["baselines"]}
        return [{"head": name, **(values["summary"] or {})} for name, values in heads.items()]


def train(
    embeddings: str | Path,
    *,
    recipe: str | Path | TrainRecipe = "nh2st",
    genes: int | str | Path | None = None,
    folds: str | None = None,
    out: str | Path | None = None,
    settings: Iterable[str] = (),
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Run:
    """Train and judge a recipe on the store `embeddings`, its baselines beside it, and write a run folder.

    `genes` is the size of the panel or a file of genes, `folds` patient, slide, a number or none; `settings`
    are "key=value" changes to the recipe. What is left None is the recipe's. `out` defaults to runs/<recipe>.

    Raises UsageError, StoreError, TrainError and RunError; the run folder appears only when it is whole.
    """
    resolved = _resolve(recipe, settings, genes, folds, seed)
    baselines = [_as_baseline(name, resolved) for name in resolved.baselines]
    store = open_store(embeddings)
    progress = progress or Progress()
    slides = _load(store, resolved, progress.say)
    splits = make_folds(slides, resolved.folds, resolved.seed)
    folder = RunFolder(Path(out) if out is not None else Path("runs") / resolved.name)
    bench = Bench(store, slides, resolved, pick_head_device(device), progress)
    folder.log("start", version=nh2st_pipe.__version__, slides=[slide.slide_id for slide in slides])

    heads = [resolved, *baselines]
    outcomes = {recipe.name: Outcome() for recipe in heads}
    for number, fold in enumerate(splits, start=1):
        split = bench.split(fold)
        for each in heads:
            bench.at(number - 1, len(splits), each.name)
            began = time.perf_counter()
            trained = bench.fit(each, split, fold)
            seconds = time.perf_counter() - began
            predicted = bench.predict(trained.model, fold.test)
            outcomes[each.name].add(fold, split, predicted, seconds, trained)
            if each is resolved:
                _write_predictions(folder, bench, split, predicted, fold)
            folder.log("fold", head=each.name, fold=fold.name, train_seconds=round(seconds, 3))

    own = outcomes[resolved.name]
    bench.at(len(splits), max(len(splits), 1), resolved.name)
    model, epochs = bench.final(own.epochs)
    model.cpu().save_pretrained(folder.part / "model")
    (folder.part / "model" / "README.md").unlink(missing_ok=True)  # the hub's empty model card
    metrics = _metrics(resolved, store, slides, splits, outcomes, model, epochs, bench.device)
    folder.write_yaml("recipe.yaml", resolved.model_dump(mode="json"))
    folder.write_json("metrics.json", metrics)
    folder.write_table("per_gene.csv", [row for name, o in outcomes.items() for row in o.per_gene(name)])
    folder.write_table("per_slide.csv", [row for name, o in outcomes.items() for row in o.per_slide(name)])
    folder.write_table("history.csv", own.history + bench.final_history)
    folder.log("end")
    folder.commit()
    return Run(folder.path, metrics)


def _resolve(
    recipe: str | Path | TrainRecipe,
    settings: Iterable[str],
    genes: int | str | Path | None,
    folds: str | None,
    seed: int | None,
) -> TrainRecipe:
    """Return the recipe with everything that was asked for in it."""
    resolved = recipe if isinstance(recipe, TrainRecipe) else load_train_recipe(recipe, settings)
    values = resolved.model_dump()
    if genes is not None:
        if str(genes) == "0":
            raise UsageError("--genes takes a number from 1 on, or a file with one gene a line")
        panel = int(str(genes)) if str(genes).isdecimal() else read_gene_file(Path(str(genes)))
        values["targets"]["genes"] = panel
    if folds is not None:
        values["folds"] = folds
    if seed is not None:
        values["seed"] = seed
    return validate(TrainRecipe, values, f"recipe {resolved.name}")


def _as_baseline(name: str, main: TrainRecipe) -> TrainRecipe:
    """Return the recipe called `name` with the targets, features, folds and seed of `main`: the same question."""
    shared = {key: getattr(main, key) for key in ("targets", "features", "protocol", "folds", "seed")}
    return load_train_recipe(name).model_copy(update=shared)


def _load(store: Store, recipe: TrainRecipe, say: Callable[[str], None]) -> list[SlideData]:
    """Read every complete slide with expression; say what is left out."""
    unfinished = store.incomplete()
    if unfinished:
        say(f"not in this training: {listed(unfinished)}, unfinished (nh2st-pipe embed goes on with it)")
    names = store.slides()
    if not names:
        raise TrainError(f"{store.path} holds no complete slide; run nh2st-pipe embed first")
    without = [name for name in names if not store.has_expression(name)]
    if len(without) == len(names):
        raise TrainError(
            f"{store.path} holds no expression, so there is nothing to learn from; add the column 'expression' "
            "(.h5ad files with counts) to the manifest and embed into a new store"
        )
    if without:
        say(f"not in this training: {listed(without)}, without expression")
    first_only = recipe.features.views == "first"
    slides = [store.read(name, first_view_only=first_only) for name in names if name not in without]
    kept = slides[0].neighbours.shape[1]
    if recipe.features.neighbours > kept:
        raise TrainError(f"features.neighbours is {recipe.features.neighbours}, and {store.path} keeps {kept} per spot")
    return slides


def _write_predictions(
    folder: RunFolder, bench: Bench, split: Split, predicted: dict[str, NDArray[np.float32]], fold: Fold
) -> None:
    for name in fold.test:
        path = folder.part / "predictions" / f"{name}.h5ad"
        about = {"recipe": bench.recipe.name, "fold": fold.name, "out_of_fold": True}
        write_prediction(path, bench.slides[name], split.panel, predicted[name], split.target[name], about)


def _metrics(
    recipe: TrainRecipe,
    store: Store,
    slides: list[SlideData],
    folds: list[Fold],
    outcomes: dict[str, Outcome],
    model: HeadModel,
    epochs: int,
    device: torch.device,
) -> dict[str, Any]:
    contract = store.contract
    return {
        "head": recipe.name,
        "protocol": recipe.protocol,
        "protocol_in_words": PROTOCOLS[recipe.protocol],
        "folds_by": recipe.folds,
        "n_slides": len(slides),
        "n_patients": len({slide.patient for slide in slides}),
        "n_spots": sum(map(len, slides)),
        "views": slides[0].views.shape[1],
        **outcomes[recipe.name].record(),
        "baselines": {name: o.record() for name, o in outcomes.items() if name != recipe.name},
        "model": {"genes": len(model.genes), "epochs": epochs, "slides": sorted(s.slide_id for s in slides)},
        "store": {
            "path": str(store.path),
            "encoder": contract.identity["name"],
            "weights_sha256": contract.weights_sha256,
            "weights_source": contract.weights_source,
            "precision": contract.precision,
            "tile": contract.tile,
            "views": contract.views,
            "dim": contract.dim,
        },
        "software": {
            "nh2st_pipe": nh2st_pipe.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": str(device),
        },
    }
