"""Stage two: heads on kept embeddings, judged on slides they have not seen.

Protocols. `nested` (default): panel, feature scaling and the number of epochs come from the training slides;
epochs are chosen on one of them that is held out, then the head is trained on all of them for that long, and
the test fold is touched once. `paper`: the panel comes from all slides and the epoch kept is the best on the
test fold, as in published tables; its figures are optimistic and the run says so.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
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
from nh2st_pipe.data.folds import Fold, hold_out, make_folds
from nh2st_pipe.data.panels import choose_panel, read_gene_file
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of, summarise
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.read import SlideData, Store, open_store

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
    bench = _Bench(store, slides, resolved, pick_head_device(device), progress)
    folder.log("start", version=nh2st_pipe.__version__, slides=[slide.slide_id for slide in slides])

    heads = [resolved, *baselines]
    outcomes = {recipe.name: _Outcome() for recipe in heads}
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


@dataclass(frozen=True)
class _Split:
    """One fold's panel and targets (n × G by slide)."""

    panel: list[str]
    target: dict[str, NDArray[np.float32]]


class _Bench:
    """The slides of a run on the device, and what is done with them fold by fold."""

    def __init__(
        self,
        store: Store,
        slides: list[SlideData],
        recipe: TrainRecipe,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.slides = {slide.slide_id: slide for slide in slides}
        self.recipe = recipe
        self.device = device
        self.final_history: list[dict[str, Any]] = []
        self._progress = progress
        self._about = {
            "recipe": recipe.name,
            "targets": recipe.targets.model_dump(mode="json"),
            "features": recipe.features.model_dump(mode="json"),
            "store": store.contract.attributes(),
            "version": nh2st_pipe.__version__,
        }
        self._at = (0, 1, "")
        progress.start("training", 1, "folds")

    def at(self, done: int, folds: int, head: str) -> None:
        """Say which head is trained now, `done` of `folds` folds being done."""
        self._at = (done, folds, head)
        self._progress.advance(done, folds, head)

    def split(self, fold: Fold) -> _Split:
        """Choose the panel and make the targets of one fold."""
        names = fold.train if self.recipe.protocol == "nested" else (*fold.train, *fold.test)
        panel = choose_panel([self.slides[name] for name in sorted(names)], self.recipe.targets)
        return self._targets(panel, (*fold.train, *fold.test))

    def _targets(self, panel: list[str], names: Sequence[str]) -> _Split:
        return _Split(panel, {name: targets(self.slides[name], panel, self.recipe.targets) for name in names})

    def samples(self, names: Sequence[str], target: dict[str, NDArray[np.float32]] | None) -> Samples:
        """Return slides as tensors; training needs every gene of the panel in every one of them."""
        slides = [self.slides[name] for name in names]
        if target is not None:
            for slide in slides:
                missing = np.isnan(target[slide.slide_id]).all(axis=0)
                if missing.any():
                    raise TrainError(
                        f"slide {slide.slide_id} lacks {int(missing.sum())} genes of the panel that is trained on; "
                        "leave those genes out of the gene file, or the slide out of the manifest"
                    )
        return Samples.of(
            slides,
            None if target is None else [target[name] for name in names],
            neighbours=self.recipe.features.neighbours,
            device=self.device,
        )

    def fit(self, recipe: TrainRecipe, split: _Split, fold: Fold) -> registry.Trained:
        """Train `recipe` for one fold, by its protocol."""
        train_samples = self.samples(fold.train, split.target)
        if registry.is_solved(recipe):
            return registry.fit(recipe, train_samples, split.panel, self._about)
        if recipe.protocol == "paper":
            test = self.samples(fold.test, {name: np.nan_to_num(split.target[name]) for name in fold.test})
            return registry.fit(
                recipe, train_samples, split.panel, self._about, watched=test, on_epoch=self._tell(fold.name)
            )
        chosen = self._choose_epochs(recipe, split, fold.train, fold.name)
        trained = registry.fit(
            recipe,
            train_samples,
            split.panel,
            self._about,
            epochs=chosen.best_epoch,
            on_epoch=self._tell(fold.name),
        )
        history = [{"phase": "choose", **row} for row in chosen.history]
        history += [{"phase": "train", **row} for row in trained.history]
        return registry.Trained(trained.model, chosen.best_epoch, history)  # type: ignore[arg-type]

    def _choose_epochs(self, recipe: TrainRecipe, split: _Split, names: Sequence[str], label: str) -> registry.Trained:
        """Find the number of epochs on training slides alone: train on some, watch the one held out."""
        held = hold_out([self.slides[name] for name in names], recipe.seed)
        if held:
            rest = [name for name in names if name not in held]
            inner, watched = self.samples(rest, split.target), self.samples(held, split.target)
        else:  # a single slide: its right-hand fifth is held out
            inner, watched = _halves(self.samples(names, split.target), self.slides[names[0]].xy[:, 0])
        tell = self._tell(f"{label}, choosing epochs")
        return registry.fit(recipe, inner, split.panel, self._about, watched=watched, on_epoch=tell)

    def _tell(self, label: str) -> Callable[[int], None]:
        done, folds, head = self._at
        return lambda epoch: self._progress.advance(done, folds, f"{head}, {label}, epoch {epoch}")

    def predict(self, model: HeadModel, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Predict slide by slide."""
        return {name: model.predict(self.samples([name], None)) for name in names}

    def final(self, epochs: list[int]) -> tuple[HeadModel, int]:
        """Train the run's own head on all slides, for the median of the folds' epochs (or chosen anew)."""
        names = sorted(self.slides)
        split = self._targets(choose_panel([self.slides[n] for n in names], self.recipe.targets), names)
        chosen: int | None = None
        history: list[dict[str, Any]] = []
        if not registry.is_solved(self.recipe):
            if epochs:
                chosen = round(float(np.median(epochs)))
            else:
                choice = self._choose_epochs(self.recipe, split, names, "all slides")
                chosen, history = choice.best_epoch, [{"phase": "choose", **row} for row in choice.history]
        trained = registry.fit(
            self.recipe,
            self.samples(names, split.target),
            split.panel,
            self._about,
            epochs=chosen,
            on_epoch=self._tell("all slides"),
        )
        history += [{"phase": "train", **row} for row in trained.history]
        self.final_history = [{"fold": "all slides", **row} for row in history]
        return trained.model, chosen or 0


def _halves(samples: Samples, x: NDArray[np.float64]) -> tuple[Samples, Samples]:
    """Split one slide's spots at the 80th percentile of x; the spot stands in for neighbours across the border."""
    assert samples.target is not None
    right = torch.from_numpy(x > np.quantile(x, 0.8)).to(samples.views.device)
    parts = []
    for side in (~right, right):
        rows = torch.nonzero(side)[:, 0]
        place = torch.full((len(samples),), -1, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        around = place[samples.neighbours[rows]]
        around = torch.where(around < 0, torch.arange(len(rows), device=rows.device)[:, None], around)
        parts.append(Samples(samples.views[rows], around, samples.target[rows]))
    return parts[0], parts[1]


class _Outcome:
    """What one head reached, fold by fold."""

    def __init__(self) -> None:
        self.folds: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.history: list[dict[str, Any]] = []
        self._genes: dict[str, list[dict[str, float]]] = {}
        self._slides: list[dict[str, Any]] = []

    def add(
        self,
        fold: Fold,
        split: _Split,
        predicted: dict[str, NDArray[np.float32]],
        seconds: float,
        trained: registry.Trained,
    ) -> None:
        """Judge the predictions of one test fold, its spots pooled."""
        p = np.concatenate([predicted[name] for name in fold.test])
        t = np.concatenate([split.target[name] for name in fold.test])
        figures = {
            "fold": fold.name,
            "test_slides": list(fold.test),
            **summarise(p, t),
            "train_seconds": seconds,
        }
        if trained.best_epoch:
            figures["epochs"] = trained.best_epoch
            self.epochs.append(trained.best_epoch)
        self.folds.append(figures)
        self.history += [{"fold": fold.name, **row} for row in trained.history]
        by_gene = gene_metrics(p, t)
        for i, gene in enumerate(split.panel):
            row = {key: float(values[i]) for key, values in by_gene.items()}
            row["target_mean"] = float(np.mean(t[:, i])) if len(t) else float("nan")
            self._genes.setdefault(gene, []).append(row)
        for name in fold.test:
            row_of_slide = summarise(predicted[name], split.target[name])
            self._slides.append({"fold": fold.name, "slide_id": name, **row_of_slide})

    def per_gene(self, head: str) -> list[dict[str, Any]]:
        """Return one row per gene: the number of folds it was in, and means over those where it is defined."""
        rows = []
        for gene, folds in self._genes.items():
            row: dict[str, Any] = {"head": head, "gene": gene, "n_folds": len(folds)}
            for key in folds[0]:
                values = [fold[key] for fold in folds if np.isfinite(fold[key])]
                row[key] = float(np.mean(values)) if values else None
            rows.append(row)
        return sorted(rows, key=lambda row: (row["pcc"] is None, -(row["pcc"] or 0.0)))

    def per_slide(self, head: str) -> list[dict[str, Any]]:
        """Return one row per test slide."""
        return [{"head": head, **row} for row in self._slides]

    def record(self) -> dict[str, Any]:
        """Return `summary` (None without folds) and `folds`."""
        return {"summary": mean_of(self.folds) if self.folds else None, "folds": self.folds}


def _write_predictions(
    folder: RunFolder, bench: _Bench, split: _Split, predicted: dict[str, NDArray[np.float32]], fold: Fold
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
    outcomes: dict[str, _Outcome],
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
