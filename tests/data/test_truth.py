"""Targets that are made slide by slide are those that would lie in memory, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nh2st_pipe.core.errors import DamageError, TrainError
from nh2st_pipe.core.memory import _trim, give_back
from nh2st_pipe.data import budget
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.streamed import scratch_file
from nh2st_pipe.data.study import Study
from nh2st_pipe.evaluation.intervals import POINTS
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.store.read import StoredCounts, open_store
from nh2st_pipe.training import fold
from nh2st_pipe.training.fold import FoldTask, fit_all, run_fold
from nh2st_pipe.training.on_ray import Reading, Trainer
from nh2st_pipe.training.run import train
from tests.conftest import GENES
from tests.conftest import Study as Folder


@pytest.fixture
def both(study: Folder) -> tuple[Study, Study]:
    """The same slides with their counts in memory, and in the store."""
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    resident = Study.load(store, store.slides())
    streamed = Study.load(store, store.slides(), targets=0, spare=0)
    lacking = GENES[3:]  # s1 measures fewer
    for each in (resident, streamed):
        s1 = each.slides["s1"]
        if s1.counts is not None:
            each.slides["s1"] = replace(s1, counts=s1.counts[:, 3:], genes=lacking)
    return resident, streamed


def of(study: Study, recipe: TrainRecipe) -> Samples:
    names = list(study.slides)
    return study.samples(names, recipe, study.targets(names, GENES[:6], recipe))


def same(one: Samples, two: Samples) -> None:
    assert one.truth is None
    assert two.truth is not None
    assert two.target is None
    assert (len(one), one.n_genes) == (len(two), two.n_genes)
    for rows in (slice(None), slice(3, len(one) - 2), *(part.rows for part in one.parts)):
        for a, b in ((one.targets(rows), two.targets(rows)), (one.raws(rows), two.raws(rows))):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    assert one.depth is not None
    assert two.depth is not None
    assert torch.equal(one.depth, two.depth)
    held = two.in_memory()
    assert held.target is not None
    assert one.target is not None
    assert torch.equal(held.target.nan_to_num(-1), one.target.nan_to_num(-1))
    assert (held.raw is held.target) == (one.raw is one.target)


@pytest.mark.parametrize("smooth", ["grid8", "none"])
def test_whatever_is_taken_of_samples_its_targets_are_the_same(study: Folder, smooth: str) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    recipe = load_train_recipe("ridge", [f"targets.smooth={smooth}"])
    one = of(Study.load(store, store.slides()), recipe)
    two = of(Study.load(store, store.slides(), targets=0), recipe)
    same(one, two)
    draw = torch.Generator().manual_seed(0)
    some, fewer = torch.rand(len(one), generator=draw) < 0.7, None
    some[one.parts[1].rows] = True  # whole, so that it is not smoothed anew
    for anew in (True, False):
        a, b = (each.subset(some, smooth_anew=anew) for each in (one, two))
        same(a, b)
        same(a.of_part(a.parts[1]), b.of_part(b.parts[1]))
        fewer = torch.rand(len(a), generator=draw) < 0.5
        for again in (True, False):
            same(*(each.subset(fewer, smooth_anew=again) for each in (a, b)))
    for (genes, a), (others, b) in zip(one.by_genes(), two.by_genes(), strict=True):
        assert torch.equal(genes, others)
        assert torch.equal(a.target_mean(), b.target_mean())


def test_genes_that_a_slide_lacks_are_known_without_its_counts(both: tuple[Study, Study]) -> None:
    resident, streamed = both
    s1 = streamed.slides["s1"]
    streamed.slides["s1"] = replace(resident.slides["s1"], views=s1.views)  # of this slide the counts are in memory
    recipe = load_train_recipe("ridge")
    one, two = of(resident, recipe), of(streamed, recipe)
    same(one, two)
    groups = list(zip(one.by_genes(), two.by_genes(), strict=True))
    assert len(groups) == 2
    for (genes, a), (others, b) in groups:
        assert torch.equal(genes, others)
        same(a, b)


@pytest.mark.parametrize("recipe", ["ridge-context", "nh2st-context", "knn"])
def test_a_fold_comes_to_the_same_bit_for_bit(study: Folder, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=1)
    files = list[str]()

    def file(*of: Any) -> Any:
        files.append(of[-1])
        return scratch_file(*of)

    monkeypatch.setattr("nh2st_pipe.heads.context.scratch_file", file)
    store = open_store(study.folder / "store.zarr")
    few = ["head.network.epochs=1", "head.network.members=1"] if recipe == "nh2st-context" else []
    resolved = load_train_recipe(recipe, ["targets.genes=6", *few])
    one = Fold("one", ("s0", "s1"), ("s2",))
    found = []
    for targets in (None, 0, 10_000):
        data = Study.load(store, store.slides(), targets=targets, spare=None if targets is None else 0)
        assert all((slide.counts is None) == (targets is not None) for slide in data.slides.values())
        found.append(run_fold(FoldTask(str(store.location), resolved, one), data))
        assert bool(files) == (recipe == "nh2st-context" and targets is not None)  # features of its network
        if targets is None:
            kept = fit_all(data, resolved, [], {})
        else:
            again = fit_all(data, resolved, [], {})
            for name, value in kept.model.state_dict().items():
                assert torch.equal(value, again.model.state_dict()[name]), name
            assert again.half_pcc == kept.half_pcc
    for other in found[1:]:
        assert np.array_equal(other.predicted["s2"].values, found[0].predicted["s2"].values)
        assert other.judged[0].figures == found[0].judged[0].figures


def test_counts_are_read_for_the_spots_depths_once(study: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    read, plain = list[str](), StoredCounts.read

    def counted(self: StoredCounts) -> Any:
        read.append(self.slide_id)
        return plain(self)

    monkeypatch.setattr(StoredCounts, "read", counted)
    data, recipe = Study.load(store, store.slides(), targets=0), load_train_recipe("ridge")
    for panel in (GENES[:6], GENES[3:], GENES[:6]):  # as folds have them, and every step of one
        data.samples(["s0", "s2"], recipe, data.targets(["s0", "s2"], panel, recipe))
    assert read == ["s0", "s2"]


def test_an_actor_reads_a_study_once_whatever_the_head(study: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=1)
    where, loaded, plain = str(study.folder / "store.zarr"), list[bool](), Study.load

    def load(*of: Any, **how: Any) -> Study:
        loaded.append(how["first_view_only"])
        return plain(*of, **how)

    monkeypatch.setattr(Study, "load", load)
    trainer = Trainer("cpu", torch.get_num_threads(), 2)
    for alpha, read in ((3, "a"), (30, "a"), (30, "b")):
        recipe = load_train_recipe("ridge", ["choose={}", "targets.genes=6", f"head.alpha={alpha}"])
        task = FoldTask(where, recipe, Fold("one", ("s0", "s1"), ("s2",)))
        assert trainer.do((Reading(where, ("s0", "s1", "s2"), read, recipe, None), task)).predicted.keys() == {"s2"}
    assert len(loaded) == 2


def test_residuals_of_very_many_slides_and_genes_are_kept_by_fewer_points(study: Folder) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    data = Study.load(store, store.slides())
    assert fold._points(data, GENES) == POINTS
    assert fold._points(data, ["g"] * 200_000) == 50_000_000 // 600_000
    assert fold._points(data, ["g"] * 10_000_000) == 20


def test_what_targets_were_made_of_is_given_back(study: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    data, given = of(Study.load(store, store.slides(), targets=0), load_train_recipe("ridge")), list[int]()
    monkeypatch.setattr("nh2st_pipe.data.targets.give_back", lambda: given.append(1))
    for part in data.parts:
        for _ in range(2):
            data.targets(part.rows)
    assert len(given) == 3  # the last slide's are there the second time
    give_back()
    monkeypatch.setattr("nh2st_pipe.core.memory.ctypes.CDLL", lambda name: object())  # of another C library
    _trim.cache_clear()
    give_back()
    _trim.cache_clear()


def test_targets_that_do_not_fit_are_refused_to_a_head_that_needs_them_all(
    study: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    data = of(Study.load(store, store.slides(), targets=0), load_train_recipe("ridge"))
    monkeypatch.setattr("nh2st_pipe.core.memory.memory", lambda: 1000)
    with pytest.raises(TrainError, match=r"targets of 75 spots and 6 genes, .* train on fewer genes"):
        data.in_memory()


def test_counts_that_are_gone_when_they_are_asked_for_are_named(study: Folder) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")
    data = Study.load(store, store.slides(), targets=0)
    (file,) = (study.folder / "store.zarr/slides/s1/expression/X/data/c").rglob("0")
    file.unlink()
    with pytest.raises(DamageError, match="slide s1"):
        of(data, load_train_recipe("ridge"))


def test_a_budget_is_for_all_that_training_holds(study: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=8)
    store = open_store(study.folder / "store.zarr")
    names, recipe, cpu = store.slides(), load_train_recipe("ridge"), torch.device("cpu")
    monkeypatch.setattr(budget, "held_now", lambda: 0)
    size = 2 * 75 * 8 * store.contract.dim
    counts = sum(store.counts_size(name) for name in names)
    assert counts > 0
    targets = int(4 * 75 * 12 * 2 * budget._COPIES)
    enough = budget._WORK + size + counts + targets
    whole = budget.plan(store, names, recipe, cpu, enough, 1)
    assert (whole.targets, whole.spare, whole.words) == (None, 0, "")
    assert whole.embeddings >= size
    tight = budget.plan(store, names, recipe, cpu, enough - 1, 1)
    assert tight.targets is not None
    assert tight.spare is not None
    assert min(tight.embeddings, size) + tight.targets + tight.spare <= enough - budget._WORK
    assert "targets are made slide by slide" in tight.words
    assert budget.plan(store, names, recipe, cpu, enough, 2).targets is not None  # each of two has its own
    assert budget.plan(store, names, recipe, cpu, 5, 1).targets == 0


def test_a_run_says_that_counts_stay_in_the_store_and_what_it_took(
    study: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.stored(views=1)
    run = train(study.folder / "store.zarr", recipe="ridge", genes=6, out=tmp_path / "run", max_memory="1MB")
    assert [note for note in run.metrics["notes"] if "counts stay in the store" in note]
    monkeypatch.setattr("nh2st_pipe.training.run.peak", iter([1, 3 * 10**9, 3 * 10**9, 3 * 10**9]).__next__)
    more = train(study.folder / "store.zarr", recipe="ridge", genes=6, out=tmp_path / "more", max_memory="2GB")
    assert "training took 3.0 GB of memory, and --max-memory asked for 2.0 GB" in more.metrics["notes"]
