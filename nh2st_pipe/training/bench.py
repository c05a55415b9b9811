"""The slides of a run on the device, and what is done with them fold by fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import nh2st_pipe
from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.folds import Fold, hold_out
from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import SlideData, Store

__all__ = ["Bench", "Split"]


@dataclass(frozen=True)
class Split:
    """One fold's panel and targets (n × G by slide)."""

    panel: list[str]
    target: dict[str, NDArray[np.float32]]


class Bench:
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

    def split(self, fold: Fold) -> Split:
        """Choose the panel and make the targets of one fold."""
        names = fold.train if self.recipe.protocol == "nested" else (*fold.train, *fold.test)
        panel = choose_panel([self.slides[name] for name in sorted(names)], self.recipe.targets)
        return self._targets(panel, (*fold.train, *fold.test))

    def _targets(self, panel: list[str], names: Sequence[str]) -> Split:
        return Split(panel, {name: targets(self.slides[name], panel, self.recipe.targets) for name in names})

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

    def fit(self, recipe: TrainRecipe, split: Split, fold: Fold) -> registry.Trained:
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

    def _choose_epochs(self, recipe: TrainRecipe, split: Split, names: Sequence[str], label: str) -> registry.Trained:
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
