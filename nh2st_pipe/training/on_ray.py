"""Heads on folds as tasks of a Ray cluster: what an actor does with one is what this process would do.

The store and the run's folder are where every node sees them. Each actor reads the study once, for all of its tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nh2st_pipe.core.cluster import Pool, Reached, reached, resources_in_words, seen_everywhere
from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.location import Location
from nh2st_pipe.data.budget import plan
from nh2st_pipe.data.study import Study
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.fold import FoldResult, FoldTask, run_fold

__all__ = ["Reading", "Trainer", "TrainingOnRay", "training_on_ray"]


@dataclass(frozen=True)
class Reading:
    """What a study is read from; the same of tasks that can share one."""

    store: str
    slides: tuple[str, ...]
    read: str
    """What of the recipe decides what is read."""
    recipe: TrainRecipe = field(compare=False)
    most: int | None
    """Bytes of memory for an actor; None: its share of what is free."""


class Trainer:
    """Trains and judges heads on folds in an actor."""

    def __init__(self, device: str, threads: int, sharing: int) -> None:
        torch.set_num_threads(threads)
        self._device, self._sharing = torch.device(device), sharing
        self._read: tuple[Reading, Study] | None = None

    def do(self, task: tuple[Reading, FoldTask]) -> FoldResult:
        """Do one; the study is read where it is another than the last."""
        reading, of_fold = task
        if self._read is None or self._read[0] != reading:
            self._read = None
            self._read = reading, self._study(reading)
        return run_fold(replace(of_fold, device=str(self._device)), self._read[1])

    def _study(self, of: Reading) -> Study:
        store = open_store(of.store)
        budget = plan(store, of.slides, of.recipe, self._device, of.most, 1, self._sharing)
        study = Study.load(
            store,
            of.slides,
            first_view_only=of.recipe.features.views == "first",
            device=self._device,
            max_memory=budget.embeddings,
            targets=budget.targets,
            spare=budget.spare,
        )
        return study.in_blocks() if of.recipe.folds == "block" else study


class TrainingOnRay:
    """A cluster that was reached, for the heads and folds of one training after another."""

    def __init__(self, cluster: Reached) -> None:
        self._cluster = cluster
        self._pool: Pool | None = None

    def threads(self, tasks: int) -> int:
        """Return how many processors each actor has for so many tasks, which decides how numbers are rounded."""
        resources = self._cluster.share(tasks)[1] if self._pool is None else self._pool.resources
        return resources["num_cpus"]

    def close(self) -> None:
        """Let the actors go."""
        if self._pool is not None:
            self._pool.__exit__()
            self._pool = None

    def _actors(self, tasks: int, say: Callable[[str], None]) -> Pool:
        """Return actors: those of the training before, as what they have read may serve again."""
        if self._pool is None:
            number, resources = self._cluster.share(tasks)
            sharing = max(1, -(-number // max(1, len(self._cluster.nodes))))
            make = partial(Trainer, self._cluster.kind, resources["num_cpus"], sharing)
            self._pool = Pool(self._cluster, make, tasks, "fewer --actors, or --max-memory, take less").__enter__()
            say(f"Ray: {number} actors with {resources_in_words(resources)} each")
        return self._pool

    def run(
        self,
        tasks: Sequence[FoldTask],
        recipe: TrainRecipe,
        store: Location,
        most: int | None,
        tell: Callable[[int, str], None],
        say: Callable[[str], None],
        keep: Callable[[int, FoldResult], None],
    ) -> Iterator[FoldResult]:
        """Do `tasks`, each of which `keep` gets with its place as soon as it is done; then yield them in their order.

        Raises TrainError with all that failed, when the others are done.
        """
        if not tasks:
            return
        where = seen_everywhere(store, "--embeddings")
        read = f"{recipe.targets.model_dump_json()} {recipe.features.model_dump_json()} {recipe.folds}"
        reading = Reading(where, tasks[0].slides, read, recipe, most)
        results = dict[int, FoldResult]()

        def ended(number: int, result: FoldResult) -> None:
            missing = [path for path in _written(tasks[number]) if not path.is_file()]
            if missing:
                raise TrainError(
                    f"{missing[0]} was written on another node and is not here: on Ray, --out takes a folder that all "
                    "nodes share"
                )
            results[number] = result
            keep(number, result)

        pool = self._actors(len(tasks), say)
        try:
            failed = pool.do([(reading, task) for task in tasks], ended, tell, say)
        except BaseException:
            self.close()  # what they do is of no use any more
            raise
        if failed:
            lines = [f"{tasks[i].recipe.name}, {tasks[i].fold.name}: {why}" for i, why in sorted(failed.items())]
            raise TrainError(
                f"{len(failed)} of {len(tasks)} fits failed; the others are kept, and the same command goes on with "
                "these:\n" + "\n".join(lines)
            )
        yield from (results[i] for i in range(len(tasks)))


def _written(task: FoldTask) -> list[Path]:
    """Return the files that a task writes."""
    of_name: Any = getattr(task.write, "path", None)
    return [] if of_name is None else [of_name(name) for name in task.fold.test]


@contextmanager
def training_on_ray(device: str, address: str | None, actors: int | None) -> Iterator[TrainingOnRay]:
    """Connect to a Ray cluster; see `core.cluster.reached`."""
    with reached(device, address, actors) as found:
        made = TrainingOnRay(found)
        try:
            yield made
        finally:
            made.close()
