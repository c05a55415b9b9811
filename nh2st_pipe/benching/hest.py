"""HEST-Benchmark with an encoder: its tasks, splits and genes, judged as it does and as this package does.

HEST's protocol (Jaume et al., NeurIPS 2024, arXiv 2406.16192, and its code): ln(1 + raw counts) of the task's genes, as
measured; PCC of a gene over all test spots of a split together; mean over genes, splits, tasks. With the head
`hest-ridge` it is the benchmark's own figure. Ours: the recipe's targets (scaled counts, log, smoothed over grid
neighbours, predictions smoothed alike) of the same genes; PCC of a gene on each test slide; mean over slides of a
patient, then patients. Splits are the benchmark's in both, and everything else is chosen on training slides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nh2st_pipe
from nh2st_pipe.core.devices import pick_head_device
from nh2st_pipe.core.errors import NH2STError, StoreError, UsageError, listed, nearest
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.panels import read_gene_file
from nh2st_pipe.data.study import Study
from nh2st_pipe.datasets import import_dataset
from nh2st_pipe.datasets.hest_bench import Task, tasks_of
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of_known
from nh2st_pipe.evaluation.statistics import summary
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.engine import training_engine
from nh2st_pipe.training.fold import FoldResult, FoldTask, run_fold
from nh2st_pipe.training.run import resolve

if TYPE_CHECKING:
    from nh2st_pipe.training.on_ray import TrainingOnRay

__all__ = ["PUBLISHED", "Benchmarked", "benchmark_hest", "hest_pcc"]

TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")
"""Those of the public table."""
PUBLISHED: dict[str, tuple[str, float]] = {
    "resnet50": ("ResNet50", 0.326),
    "ctranspath": ("CTransPath", 0.345),
    "phikon": ("Phikon", 0.366),
    "conch": ("CONCH", 0.371),
    "prov-gigapath": ("GigaPath", 0.385),
    "uni": ("UNI", 0.386),
    "h0-mini": ("H0-mini", 0.396),
    "virchow": ("Virchow", 0.398),
    "virchow2": ("Virchow2", 0.398),
    "uni2-h": ("UNI2-h", 0.408),
    "h-optimus-0": ("H-optimus-0", 0.415),
}
"""Encoder → its row of the public table and the mean over `TASKS` (HEST's repository; UNI2-h: its pull request 140)."""

HEADS = ("hest-ridge", "nh2st-context")
_AS_HEST = ("targets.scale_to=null", "targets.log=log1p", "targets.smooth=none")
_PATCH_PX = 224.0


@dataclass
class Benchmarked:
    """What came of it."""

    out: Path
    encoder: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of each task and head: `task`, `head`, `splits`, `hest` and `ours` (PCC under each protocol; None is undefined),
    `undefined` (genes without a PCC under HEST's, over splits)."""
    failed: dict[str, str] = field(default_factory=dict)
    """Tasks left out, each with its cause."""
    notes: list[str] = field(default_factory=list)

    def means(self) -> list[dict[str, Any]]:
        """Return one row a head: the mean over tasks, in which all tasks count the same."""
        found = []
        for head in dict.fromkeys(row["head"] for row in self.rows):
            of = [row for row in self.rows if row["head"] == head]
            means = {key: mean_of_known(np.array([_number(row[key]) for row in of])) for key in ("hest", "ours")}
            found.append({"task": f"mean of {len(of)}", "head": head, **means})
        return found

    def published(self) -> str:
        """Say which published figure hest-ridge should equal under HEST's protocol."""
        if self.encoder not in PUBLISHED:
            return f"no published row of HEST-Benchmark is known for {self.encoder}"
        label, value = PUBLISHED[self.encoder]
        words = f"published: {label} {value:.3f}, hest-ridge under HEST's protocol, mean over {len(TASKS)} tasks"
        lacking = [task for task in TASKS if task not in {row["task"] for row in self.rows}]
        return f"{words}; not here: {listed(lacking)}" if lacking else f"{words}: the mean above should equal it"

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "out": str(self.out), "means": self.means(), "published": self.published()}


def benchmark_hest(
    folder: str | Path,
    *,
    encoder: str | Path,
    weights: str | Path | None = None,
    tasks: Sequence[str] = (),
    heads: Sequence[str] = HEADS,
    views: int = 1,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    actors: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Benchmarked:
    """Run the `tasks` (all that are there) of HEST-Benchmark in `folder`, as it was downloaded.

    `heads` are training recipes; `settings` are changes to them. With `views` of 8 heads see each patch in eight views;
    hest-ridge reads the first alone, as the benchmark does. Everything is kept in `out` (benchmark/hest-<encoder>), and
    a call that was cut short goes on. A task that cannot be run is named, and the others go on. With the `engine` "ray"
    slides are embedded and heads trained on their splits as tasks of the Ray cluster at `address` (RAY_ADDRESS, or one
    made here), with as many `actors`; `out` is where all nodes see it.

    Raises UsageError for a task that is not there, ExpressionError where `folder` holds none.
    """
    progress = progress or Progress()
    known = {task.name: task for task in tasks_of(Path(folder))}
    for name in tasks:
        if name not in known:
            raise UsageError(f"{folder} has no task {name}{nearest(name, known)} (there is {', '.join(known)})")
    name = Path(encoder).stem
    done = Benchmarked(Path(out) if out is not None else Path("benchmark") / f"hest-{name}", name)
    recipes = {(head, judged): _recipe(head, judged, settings, seed) for head in heads for judged in ("hest", "ours")}
    with training_engine(engine, device, address, actors, None) as cluster:
        for task in (known[name] for name in (tasks or known)):
            place = done.out / task.name
            try:
                manifest = _imported(task, place, progress)
                embedded = embed(
                    manifest,
                    encoder=encoder,
                    weights=weights,
                    store=place / "store.zarr",
                    views=views,
                    tile_px=_PATCH_PX,
                    device=device,
                    workers=workers,
                    engine=engine,
                    address=address,
                    actors=actors,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
                if embedded.failed:
                    sample, cause = next(iter(embedded.failed.items()))
                    raise StoreError(f"{sample}: {cause}")
                done.rows += _judged(done, task, place, recipes, device, cluster, progress)
            except NH2STError as error:
                done.failed[task.name] = str(error)
                progress.say(f"task {task.name} is left out: {error}")
            finally:
                if cluster is not None:
                    cluster.close()  # the next task's slides are embedded by actors of their own
    return done


def hest_pcc(results: Sequence[FoldResult]) -> tuple[float | None, int]:
    """Return HEST's figure and how many genes are undefined, over splits: PCC of a gene over all test spots of a split
    together; mean over genes, then splits.
    """
    means, undefined = [], 0
    for result in results:
        said, truth = (
            np.concatenate([of[name] for name in result.fold.test])
            for of in ({name: each.values for name, each in result.predicted.items()}, result.target)
        )
        pcc = gene_metrics(said, truth)["pcc"]
        undefined += int((~np.isfinite(pcc)).sum())
        means.append(_number(mean_of_known(pcc)))
    return mean_of_known(np.array(means)), undefined


def _recipe(head: str, judged: str, settings: Sequence[str], seed: int | None) -> TrainRecipe:
    changes = ["baselines=[]", *(_AS_HEST if judged == "hest" else ()), *settings]
    return resolve(head, changes, None, None, seed)


def _imported(task: Task, place: Path, progress: Progress) -> Path:
    """Write the task's manifest, if it is not there; a sample that cannot be read is no figure of the benchmark."""
    manifest = place / "manifest.csv"
    if manifest.is_file():
        return manifest
    made = import_dataset("hest-bench", task.folder, manifest, progress.say, look=False)
    if made.failed:
        manifest.unlink()
        sample, cause = next(iter(made.failed.items()))
        raise StoreError(f"{len(made.failed)} of its samples cannot be used; {sample}: {cause}")
    return manifest


def _judged(
    done: Benchmarked,
    task: Task,
    place: Path,
    recipes: dict[tuple[str, str], TrainRecipe],
    device: str,
    cluster: TrainingOnRay | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return a row a head."""
    store = open_store(place / "store.zarr")
    genes = read_gene_file(task.genes)
    study = Study.load(store, task.samples, device=pick_head_device(device))
    lacking = sorted({gene for slide in study.slides.values() for gene in set(genes).difference(slide.genes)})
    if lacking:
        done.notes.append(f"task {task.name}: genes that not all of its samples have: {listed(lacking)}")
    no_grid = [name for name, slide in study.slides.items() if slide.grid is None]
    if no_grid:
        done.notes.append(f"task {task.name}: no array positions of {listed(no_grid)}: not smoothed under our protocol")
    smooth = {"smooth": "none"} if no_grid else {}
    asked = []
    for (head, judged), recipe in recipes.items():
        targets = recipe.targets.model_copy(update={"genes": tuple(genes), **smooth})
        asked.append(_Asked(task, place, head, judged, recipe.model_copy(update={"targets": targets}), study))
    left = [each for each in asked if each.kept() is None]
    progress.start(f"task {task.name}", len(left), "heads")
    if cluster is not None and left:
        _on_cluster(cluster, left, study, progress)
    else:
        for number, each in enumerate(left):
            progress.advance(number, len(left), each.words)
            each.keep([run_fold(of_split, study) for of_split in each.tasks()])
    rows = dict[str, dict[str, Any]]()
    for each in asked:
        row = rows.setdefault(each.head, {"task": task.name, "head": each.head, "splits": len(task.splits)})
        row |= each.kept() or {}
    return list(rows.values())


@dataclass(frozen=True)
class _Asked:
    """A head on a task's splits under one protocol, and what is kept of it."""

    task: Task
    place: Path
    head: str
    judged: str
    recipe: TrainRecipe
    study: Study

    @property
    def words(self) -> str:
        return f"{self.head}, {'HEST' if self.judged == 'hest' else 'our'} protocol"

    def tasks(self) -> list[FoldTask]:
        """Return one for each split."""
        folds = [Fold(f"split {split.name}", split.train, split.test) for split in self.task.splits]
        device, slides = str(self.study.device), tuple(self.study.slides)
        return [FoldTask(self.study.path, self.recipe, fold, device, slides, keep_off=False) for fold in folds]

    @property
    def _file(self) -> Path:
        return self.place / "results" / f"{self.head}-{self.judged}.json"

    def _question(self) -> dict[str, Any]:
        question = {
            "recipe": self.recipe.model_dump(mode="json"),
            "version": nh2st_pipe.__version__,
            "splits": [asdict(split) for split in self.task.splits],
            "weights_sha256": self.study.contract.weights.sha256,
            "views": self.study.contract.views,
        }
        asked: dict[str, Any] = json.loads(json.dumps(question))
        return asked

    def kept(self) -> dict[str, Any] | None:
        """Return the figures that are kept; None where there are none, or of another question."""
        if not self._file.is_file():
            return None
        kept = json.loads(self._file.read_text("utf-8"))
        found: dict[str, Any] = kept["figures"]
        return found if kept["question"] == self._question() else None

    def keep(self, results: Sequence[FoldResult]) -> None:
        """Keep the figures of all splits."""
        if self.judged == "hest":
            pcc, undefined = hest_pcc(results)
            figures: dict[str, Any] = {"hest": pcc, "undefined": undefined}
        else:
            whole = summary([each.figures for result in results for each in result.judged])
            figures = {"ours": whole["pcc"] if whole else None}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._file) as part:
            said = {"question": self._question(), "figures": figures}
            part.write_text(json.dumps(said, indent=1) + "\n", "utf-8")


def _on_cluster(cluster: TrainingOnRay, asked: Sequence[_Asked], study: Study, progress: Progress) -> None:
    """Do all splits of all heads as tasks of a cluster; each head's figures are kept as soon as its splits are done."""
    tasks = [(each, of_split) for each in asked for of_split in each.tasks()]
    results: dict[int, FoldResult] = {}

    def keep(number: int, result: FoldResult) -> None:
        results[number] = result
        own = [i for i, (each, _) in enumerate(tasks) if each is tasks[number][0]]
        if all(i in results for i in own):
            tasks[number][0].keep([results[i] for i in own])

    def tell(done: int, words: str) -> None:
        progress.advance(done * len(asked) / len(tasks), len(asked), words)

    # One study serves them all, with all views: a head that looks at the first alone takes it from them.
    every = asked[0].recipe.features.model_copy(update={"views": "all"})
    reads = asked[0].recipe.model_copy(update={"features": every})
    list(cluster.run([task for _, task in tasks], reads, Location(study.path), None, tell, progress.say, keep))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
