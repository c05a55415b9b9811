"""Stage two: heads on kept embeddings, judged on slides they have not seen.

Protocols. `nested` (default): panel, feature scaling and the number of epochs come from the training slides;
epochs are chosen on one of them that is held out, then the head is trained on all of them for that long, and
the test fold is touched once. `paper`: the panel comes from all slides and the epoch kept is the best on the
test fold, as in published tables; its figures are optimistic and the run says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import nh2st_pipe
from nh2st_pipe.core.devices import pick_head_device
from nh2st_pipe.core.errors import TrainError, UsageError, listed
from nh2st_pipe.core.machine import bytes_of, cores, peak
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop, signals_as_flag
from nh2st_pipe.data.budget import plan
from nh2st_pipe.data.folds import Fold, Listed, checked_folds, make_folds, on_both_sides
from nh2st_pipe.data.gene_vectors import vectors_sha256
from nh2st_pipe.data.panels import read_gene_file
from nh2st_pipe.data.study import Study
from nh2st_pipe.evaluation.trust import trust
from nh2st_pipe.evaluation.unseen import gene_rows
from nh2st_pipe.recipes.train import QueryHead, TrainRecipe, head_recipe, load_train_recipe, with_settings
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.card import model_card
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.model import save_model
from nh2st_pipe.runs.shown import Page, run_html
from nh2st_pipe.store.format import SlideRecord
from nh2st_pipe.store.read import Store, open_store
from nh2st_pipe.training.engine import training_engine
from nh2st_pipe.training.fits import Fits
from nh2st_pipe.training.fold import FoldResult, FoldTask, fit_all, joined
from nh2st_pipe.training.outcome import Outcome
from nh2st_pipe.training.record import (
    SlideWriter,
    about,
    gene_table,
    metrics_of,
    setting_of,
    write_in_sample,
    write_predictions,
)
from nh2st_pipe.training.side_by_side import run_all

if TYPE_CHECKING:
    import polars

    from nh2st_pipe.training.on_ray import TrainingOnRay

__all__ = ["Run", "resolve", "train"]

_WORTHWHILE = 2_000_000  # values of embeddings from which starting processes costs less than it saves


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    metrics: dict[str, Any] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per head, the run's own first: head, and its figures over all folds (`statistics.summary`)."""
        heads = {self.metrics["head"]: self.metrics, **self.metrics["baselines"]}
        return [{"head": name, **(values["summary"] or {})} for name, values in heads.items()]

    def table(self) -> polars.DataFrame:
        """Return the same as a polars data frame."""
        import polars as pl

        return pl.DataFrame(self.rows(), infer_schema_length=None)

    @property
    def genes(self) -> polars.DataFrame:
        """The run's own head by gene, the best first: PCC on what was held out with its interval, and between halves.

        Empty without folds.
        """
        import polars as pl

        if not self.metrics["summary"]:
            return pl.DataFrame()
        table = pl.read_csv(self.path / "per_gene.csv", infer_schema_length=None, glob=False)
        return table.filter(pl.col("head") == self.metrics["head"])

    def report(self, out: str | Path | None = None, **options: Any) -> Page:
        """Write the run's report.html (`reporting.page.report`, with its options), which a notebook shows in place."""
        from nh2st_pipe.reporting.page import report

        return Page(report(self.path, out, **options))

    def _repr_html_(self) -> str:
        """Show the table in a notebook, with what has to be known of it."""
        return run_html(self.metrics, self.rows(), self.path)


_RIVAL = "ridge-context"  # what a head has to be worth the trouble beside


def train(
    embeddings: str | Path,
    *,
    recipe: str | Path | TrainRecipe = "nh2st-context",
    genes: int | str | Path | Sequence[str] | None = None,
    folds: str | int | None = None,
    out: str | Path | None = None,
    settings: Iterable[str] = (),
    seed: int | None = None,
    device: str = "auto",
    jobs: int | None = 1,
    max_memory: str | float | None = None,
    trust_from: float | None = None,
    gene_vectors: str | Path | None = None,
    leave_genes_out: int | None = None,
    engine: str | TrainingOnRay = "local",
    address: str | None = None,
    actors: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train and judge a recipe on the store `embeddings`, its baselines beside it, and write a run folder.

    `genes` is the size of the panel, "all", a file of genes or their names; `folds` as in `TrainRecipe.folds`, where
    None by patient becomes by slide, or by block, for a single patient or slide; `settings` are "key=value" changes to
    the recipe; `trust_from` is the PCC from which on a gene counts as usefully predicted. `gene_vectors` is a file of
    vectors by which nh2st-query predicts genes that it never saw (`data.gene_vectors`), and with `leave_genes_out` as
    many folds of genes are left out beside slides, which tells how well. What is left None is the recipe's. `out` is
    runs/<recipe>.
    `jobs` heads and folds are trained side by side, in processes that share one copy of the embeddings; None takes the
    processors where that pays.
    `max_memory` is what all of it may take of the memory ("8GB", or a number of GB), `jobs` together: where it would be
    more, counts and targets are read slide by slide and embeddings from a local disk, with the same results; None is
    six tenths of what is free.
    With the `engine` "ray" heads and folds are tasks of the Ray cluster at `address` (RAY_ADDRESS, or one made here),
    with as many `actors` (one for each GPU, or CPU), of each of which `max_memory` is; store and `out` are where all
    nodes see them. What is lost with a process is done anew.
    Figures are the same bit for bit for the same `jobs`, or processors of an actor, on the same machine.

    Raises UsageError, StoreError, TrainError and RunError; the run folder appears only when it is whole.
    """
    resolved = resolve(recipe, settings, genes, folds, seed, trust_from, gene_vectors, leave_genes_out)
    with training_engine(engine, device, address, actors, jobs) as cluster:
        return _train(embeddings, resolved, folds, out, device, jobs, max_memory, cluster, progress or Progress())


def _train(
    embeddings: str | Path,
    resolved: TrainRecipe,
    folds: str | int | None,
    out: str | Path | None,
    device: str,
    jobs: int | None,
    max_memory: str | float | None,
    cluster: TrainingOnRay | None,
    progress: Progress,
) -> Run:
    store = open_store(embeddings)
    notes: list[str] = []

    def note(words: str) -> None:
        notes.append(words)
        progress.say(words)

    records = store.records()
    rows = (record.row for record in records.values() if record.expression is not None)
    slides = [Listed(row.slide_id, row.patient, row.extra) for row in rows]
    if slides:  # what cannot be folded is told before anything is read
        by, why = checked_folds(slides, None if folds is None else resolved.folds, resolved.folds, resolved.seed)
        if why:
            note(why)
        resolved = resolved.model_copy(update={"folds": by})

    most, before = None if max_memory is None else bytes_of(max_memory, "--max-memory"), peak()
    study, jobs = _load(store, resolved, pick_head_device(device), 1 if cluster is not None else jobs, most, note)
    judged = study.in_blocks() if resolved.folds == "block" else study
    splits = make_folds(list(judged.slides.values()), resolved.folds, resolved.seed)
    notes += _about_folds(judged, splits, resolved.folds)
    heads = [resolved, *(_as_baseline(name, resolved) for name in resolved.baselines)]
    place = Path(out) if out is not None else Path("runs") / resolved.name
    on = {} if cluster is None else {"engine": f"Ray, {cluster.threads(len(heads) * len(splits))} processors an actor"}
    question = _question(records, study, heads, jobs, on)
    with signals_as_flag() as stop, RunFolder(place, question) as folder:
        asked = {"heads": [each.name for each in heads], "fold_names": [fold.name for fold in splits], "notes": notes}
        begun = {**setting_of(resolved, study), **asked}
        if folder.resumed:
            progress.say(f"{len(Fits(folder.fits))} of {len(splits) * len(heads) + 1} fits are kept from before")
            folder.log("again", version=nh2st_pipe.__version__)
        else:
            folder.log("start", version=nh2st_pipe.__version__, slides=list(study.slides), run=begun)
        folder.write_yaml("recipe.yaml", resolved.model_dump(mode="json"))
        asked_for = _Asked(jobs, cluster, most)
        outcomes = _run_folds(folder, store, study, judged, heads, splits, asked_for, progress, stop)
        own = outcomes[resolved.name]
        fits = len(splits) * len(heads)
        progress.advance(fits, fits + 1, resolved.name)

        def tell(words: str) -> None:
            stop.check()
            progress.advance(fits, fits + 1, f"{resolved.name}, {words}")

        rival = outcomes[_RIVAL].slides if _RIVAL in outcomes and resolved.name != _RIVAL else None
        said = trust(own.slides, rival, bound=resolved.trust_from, rival_name=_RIVAL)
        final = fit_all(study, resolved, own.epochs, about(study, resolved, own, said), tell)
        wanted = resolved.targets.genes
        if isinstance(wanted, int) and len(final.model.genes) < wanted:
            notes.append(f"{wanted:,} genes were asked for, and the slides have {len(final.model.genes):,} in common")
        notes += [notice for outcome in outcomes.values() for notice in outcome.notices]
        if final.notice:
            notes.append(f"{resolved.name}, all slides: {final.notice}")
        for slide_id, words in own.cautions.items():
            notes.append(f"{slide_id}, held out: {words}")
        notes += _about_tiles(store.contract.tile["size_level0_px"], records)
        if store.contract.imported is not None:
            notes.append(f"trained on {store.contract.made_by()}: its files do not tell which weights made them")
        if not splits:
            write_in_sample(folder, study, resolved, final.model)
        if most is not None and before < peak() > most:
            note(f"training took {peak() / 1e9:.1f} GB of memory, and --max-memory asked for {most / 1e9:.1f} GB")
        metrics = {**metrics_of(resolved, study, outcomes, final, notes), "jobs": jobs, **on}
        card = model_card(metrics, About.of(final.model.about, folder.part))
        save_model(final.model, folder.part / "model", card, final.reference)
        folder.write_json("metrics.json", metrics)
        folder.write_table("per_gene.csv", gene_table(outcomes, resolved.name, final.half_pcc))
        if own.unseen:
            folder.write_table("unseen_genes.csv", gene_rows(own.slides, own.unseen))
        folder.write_table("per_slide.csv", [row for name, o in outcomes.items() for row in o.per_slide(name)])
        folder.write_table("history.csv", own.history + final.history)
        folder.log("end")
        folder.commit()
    return Run(folder.path, metrics)


@dataclass(frozen=True)
class _Asked:
    """How folds are to be done."""

    jobs: int
    cluster: TrainingOnRay | None
    most: int | None
    """Bytes of memory for an actor of a cluster."""


def _run_folds(
    folder: RunFolder,
    store: Store,
    study: Study,
    judged: Study,
    heads: list[TrainRecipe],
    folds: list[Fold],
    asked: _Asked,
    progress: Progress,
    stop: Stop,
) -> dict[str, Outcome]:
    """Train and judge every head on every fold, but for those that are kept; the first head's predictions are kept."""
    outcomes = {recipe.name: Outcome() for recipe in heads}
    device = str(study.device)
    joining = judged is not study
    writer = SlideWriter((folder.part / "predictions").absolute(), heads[0])
    tasks = [
        FoldTask(
            str(store.location),
            each,
            fold,
            device,
            tuple(study.slides),
            keep_off=each is heads[0],
            keep_predicted=each is heads[0] and joining,
            write=writer if each is heads[0] and not joining else None,
        )
        for each in heads
        for fold in folds
    ]
    own, fits, logged = list[FoldResult](), Fits(folder.fits), folder.logged("fold", "head", "fold")
    numbers = [i for _ in heads for i in range(len(folds))]
    # Read twice, so that no more than one of them is held.
    kept = [
        fits.find(task.recipe.name, number) is not None
        and (task.write is None or all(writer.path(name).is_file() for name in task.fold.test))
        for task, number in zip(tasks, numbers, strict=True)
    ]

    def tell(done: int, words: str) -> None:
        stop.check()
        progress.advance(sum(kept) + done, len(tasks) + 1, words)

    progress.start("training", len(tasks) + 1, "fits")
    left = [i for i, there in enumerate(kept) if not there]
    todo = [tasks[i] for i in left]

    def keep(number: int, result: FoldResult) -> None:
        fits.keep(result, numbers[left[number]])

    if asked.cluster is not None:
        anew = asked.cluster.run(todo, heads[0], store.location, asked.most, tell, progress.say, keep)
    else:
        anew = run_all(todo, judged, asked.jobs, tell, keep)
    for task, number, there in zip(tasks, numbers, kept, strict=True):
        found = fits.find(task.recipe.name, number) if there else None
        result = found or next(anew)
        outcomes[result.head].add(result)
        is_own = result.head == heads[0].name
        if is_own and joining:
            own.append(result)
        if (result.head, result.fold.name) not in logged:
            rows = [asdict(each.figures) for each in result.judged]
            figures = outcomes[result.head].folds[-1]
            folder.log("fold", head=result.head, fold=result.fold.name, figures=figures, slides=rows)
    if own:
        whole = joined(study, own)
        write_predictions(replace(writer, one_panel=whole.one_panel), study, whole)
    return outcomes


def _question(
    records: Mapping[str, SlideRecord], study: Study, heads: list[TrainRecipe], jobs: int, on: dict[str, str]
) -> str:
    """Return all that figures depend on: recipes, the slides to the byte, and what decides how numbers are rounded."""
    return json.dumps(
        {
            "version": nh2st_pipe.__version__,
            "heads": [each.model_dump(mode="json") for each in heads],
            "contract": study.contract.model_dump(mode="json"),
            "slides": {name: records[name].model_dump(mode="json") for name in study.slides},
            "jobs": jobs,
            **on,
            "device": str(study.device),
            "threads": torch.get_num_threads(),
        },
        sort_keys=True,
    )


def _about_folds(judged: Study, folds: list[Fold], by: str) -> list[str]:
    """Return what has to be said about folds that could be taken for more than they are."""
    if by == "block":
        return [
            "folds leave out blocks of slides: what is judged borders on what is trained on and has its stain; the "
            "figures are too good for another slide"
        ]
    both = on_both_sides(list(judged.slides.values()), folds)
    if both and len({slide.patient for slide in judged.slides.values()}) > 1:
        return [f"patients on both sides of a fold by {by}: {listed(both)}; the figures are too good for a new patient"]
    return []


def _about_tiles(px: float | None, records: Mapping[str, SlideRecord]) -> list[str]:
    """Say that a model of tiles in px fits slides of one resolution alone."""
    if px is None:
        return []
    known = sorted({round(of.resolved.mpp, 3) for of in records.values() if of.resolved and of.resolved.mpp})
    at = f" of {known[0]:g}" + (f" to {known[-1]:g}" if known[1:] else "") + " µm per px" if known else ""
    return [
        f"tiles were cut as {px:g} px: the model fits slides of the same resolution{at} alone; embed with --tile-um "
        "for one that fits others"
    ]


def _jobs(asked: int | None, store: Store, names: Sequence[str], recipe: TrainRecipe, device: torch.device) -> int:
    """Return how many processes train side by side: as asked for, by default one per processor where that pays."""
    if asked is not None and asked < 1:
        raise UsageError(f"--jobs takes a number from 1 on, not {asked}")
    if recipe.folds == "none" or device.type != "cpu":
        return 1  # one fit; or one device, which a single fit fills
    if asked is not None:
        return asked
    values = sum(store.tiles(name) for name in names) * store.contract.views * store.contract.dim
    return cores() if values >= _WORTHWHILE else 1


def resolve(
    recipe: str | Path | TrainRecipe,
    settings: Iterable[str],
    genes: int | str | Path | Sequence[str] | None,
    folds: str | int | None,
    seed: int | None,
    trust_from: float | None = None,
    gene_vectors: str | Path | None = None,
    leave_genes_out: int | None = None,
) -> TrainRecipe:
    """Return the recipe with everything that was asked for in it; arguments as in `train`."""
    if isinstance(recipe, TrainRecipe):
        values = with_settings(recipe.model_dump(mode="json"), settings)
    else:
        values = load_train_recipe(recipe, settings).model_dump()
    if genes is not None:
        if str(genes) == "0":
            raise UsageError("--genes takes a number from 1 on, all, or a file with one gene a line")
        if isinstance(genes, (str, Path, int)):
            word = str(genes)
            panel = "all" if word == "all" else int(word) if word.isdecimal() else read_gene_file(Path(word))
        else:
            panel = tuple(genes)
        values["targets"]["genes"] = panel
    if folds is not None:
        values["folds"] = str(folds)
    if seed is not None:
        values["seed"] = seed
    if trust_from is not None:
        values["trust_from"] = trust_from
    if leave_genes_out is not None:
        values["leave_genes_out"] = leave_genes_out
    if gene_vectors is not None:
        values["head"] |= {"vectors": str(Path(gene_vectors).absolute()), "vectors_sha256": None}
        if not head_recipe(values["head"]["kind"]).takes_queries:
            raise UsageError(
                f"--gene-vectors is of heads that take genes by query; {values['name']} predicts the genes that it is "
                "trained on alone (--recipe nh2st-query takes others)"
            )
    return _with_hash(validate(TrainRecipe, values, f"recipe {values['name']}"))


def _with_hash(recipe: TrainRecipe) -> TrainRecipe:
    """Return a recipe that says which gene vectors it is trained with, where it has some."""
    head = recipe.head
    if not isinstance(head, QueryHead) or head.vectors is None or head.vectors_sha256 is not None:
        return recipe
    path = Path(head.vectors).absolute()
    known = {"vectors": str(path), "vectors_sha256": vectors_sha256(path)}
    return recipe.model_copy(update={"head": head.model_copy(update=known)})


def _as_baseline(name: str, main: TrainRecipe) -> TrainRecipe:
    """Return the recipe called `name` with the targets, features, folds and seed of `main`: the same question."""
    shared = {key: getattr(main, key) for key in ("targets", "features", "protocol", "folds", "seed")}
    return load_train_recipe(name).model_copy(update=shared)


def _load(
    store: Store,
    recipe: TrainRecipe,
    device: torch.device,
    jobs: int | None,
    max_memory: int | None,
    say: Callable[[str], None],
) -> tuple[Study, int]:
    """Read every complete slide with expression, and say what is left out; return how many jobs there are to be."""
    unfinished = store.incomplete()
    if unfinished:
        say(f"not in this training: {listed(unfinished)}, unfinished (nh2st-pipe embed goes on with it)")
    damaged = store.damaged()
    if damaged:
        say(f"not in this training: {listed(damaged)}, damaged (nh2st-pipe inspect {store.location})")
    names = store.slides()
    if not names:
        raise TrainError(f"{store.location} holds no complete slide; run nh2st-pipe embed first")
    without = [name for name in names if not store.has_expression(name)]
    if len(without) == len(names):
        raise TrainError(
            f"{store.location} holds no expression, so there is nothing to learn from; add the column 'expression' "
            "(.h5ad files with counts) to the manifest and embed into a new store"
        )
    if without:
        say(f"not in this training: {listed(without)}, without expression")
    kept = [name for name in names if name not in without]
    first_only, jobs = recipe.features.views == "first", _jobs(jobs, store, kept, recipe, device)
    budget = plan(store, kept, recipe, device, max_memory, jobs)
    if budget.words:
        say(budget.words)
    study = Study.load(
        store,
        kept,
        first_view_only=first_only,
        device=device,
        shared=jobs > 1,
        max_memory=budget.embeddings,
        targets=budget.targets,
        spare=budget.spare,
        say=say,
    )
    empty = [name for name, slide in study.slides.items() if not slide.measured or slide.counted().sum() == 0]
    if len(empty) == len(kept):
        raise TrainError(f"all counts in {store.location} are zero, so there is nothing to learn from")
    if empty:
        say(f"not in this training: {listed(empty)}, all counts zero")
        study = study.only([name for name in kept if name not in empty])
    without = [slide.slide_id for slide in study.slides.values() if slide.stain_shift is None]
    if recipe.head.uses_stain_shift() and without:
        say(
            f"no stain shift of {listed(without)}: what another stain adds stays in the embeddings, and costs most on "
            "slides stained elsewhere; nh2st-pipe embed with the same manifest and store adds it, encoding nothing anew"
        )
    listed_genes = recipe.targets.genes if isinstance(recipe.targets.genes, tuple) else ()
    for slide in study.slides.values():
        lacks = set(listed_genes).difference(slide.genes)
        if lacks:
            say(f"slide {slide.slide_id} lacks {len(lacks)} genes of the panel, which are learnt from the others")
    width = min(slide.neighbours.shape[1] for slide in study.slides.values())
    if recipe.features.neighbours > width:
        raise TrainError(
            f"features.neighbours is {recipe.features.neighbours}, and {store.location} keeps {width} per spot"
        )
    return study, jobs
