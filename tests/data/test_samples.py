from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.samples import ResidentCache, Samples
from nh2st_pipe.data.study import Study
from nh2st_pipe.data.targets import targets
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import TargetRecipe, load_train_recipe
from nh2st_pipe.store.read import SlideData, open_store
from nh2st_pipe.tiles.lattice import pitch_px
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.training.fold import FoldTask, run_fold
from tests.conftest import GENES, slide
from tests.conftest import Study as Folder


@pytest.fixture
def embedded(study: Folder) -> Study:
    study.stored(views=8)
    store = open_store(study.folder / "store.zarr")
    return Study.load(store, store.slides())


def test_samples_are_rows_of_one_cache_that_nothing_copies(embedded: Study) -> None:
    recipe = load_train_recipe("ridge-context")
    store = open_store(embedded.path)
    some = embedded.samples(["s2", "s0"], recipe, None)
    other = embedded.samples(["s1"], recipe, embedded.targets(["s1"], GENES, recipe))
    assert some.cache is other.cache is embedded.cache
    s2, s0 = store.read("s2"), store.read("s0")
    assert isinstance(embedded.cache, ResidentCache)
    assert [len(each.views) for each in embedded.slides.values()] == [0, 0, 0]  # they lie in the cache alone
    got = some.gather(torch.arange(len(some)), slice(None)).numpy()
    assert np.array_equal(got, np.concatenate((s2.views, s0.views)))
    rows, views = torch.tensor([3, len(s2) + 4]), torch.tensor([1, 7])
    assert np.array_equal(some.gather(rows, views).numpy(), np.stack((s2.views[3, 1], s0.views[4, 7])))
    around = some.neighbours[len(s2) + 4].numpy() - len(s2)
    assert np.array_equal(around, s0.neighbours[4])
    assert [(part.slide_id, part.start, part.stop) for part in some.parts] == [("s2", 0, 25), ("s0", 25, 50)]


def test_chunks_cover_every_spot_once(embedded: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.data import samples as module

    data = embedded.samples(["s0", "s1"], load_train_recipe("ridge"), None)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 7 * data.n_views * data.dim)
    chunks = data.chunks()
    assert [i for part in chunks for i in range(part.start, part.stop)] == list(range(50))
    assert max(part.stop - part.start for part in chunks) == 7


def test_a_subset_keeps_neighbours_inside_and_stands_in_for_the_others() -> None:
    data = slide(
        counts=np.ones((4, 3)),
        neighbours=np.array([[0, 1], [1, 2], [2, 3], [3, -1]], np.int32),
        xy=np.array([[0, 0], [1, 0], [2, 0], [3, 0]], float),
    )
    whole = Samples.of([data], neighbours=2)
    assert whole.neighbours.tolist() == [[0, 1], [1, 2], [2, 3], [3, 3]]
    part = whole.subset(torch.tensor([True, False, True, True]))
    assert part.neighbours.tolist() == [[0, 0], [1, 2], [2, 2]]
    assert part.parts[0].xy[:, 0].tolist() == [0, 2, 3]
    assert torch.equal(part.gather(torch.arange(3), 0), whole.gather(torch.tensor([0, 2, 3]), 0))


def test_predictions_are_smoothed_as_the_target_is() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:4, :5])
    xy = np.column_stack((cols, rows)) * 30.0
    rng = np.random.default_rng(0)
    data = slide(counts=rng.poisson(4, (20, 3)), array_row=rows, array_col=cols, xy=xy)
    made = targets(data, ["a", "b"], TargetRecipe())
    samples = Samples.of([data], [made], neighbours=2, smoothed=True)
    assert np.allclose(samples.smooth(made.raw.astype(np.float64)), made.values, atol=1e-6)
    plain = Samples.of([data], [made], neighbours=2)
    assert np.array_equal(plain.smooth(made.raw.astype(np.float64)), made.raw)
    # Without array positions, distance finds the same eight neighbours.
    bare = Samples.of([slide(counts=rng.poisson(4, (20, 3)), array_row=None, xy=xy)], neighbours=2, smoothed=True)
    assert np.allclose(bare.smooth(made.raw.astype(np.float64)), made.values, atol=1e-6)


def tissue(seed: int, name: str = "s", genes: list[str] | None = None) -> SlideData:
    rng = np.random.default_rng(seed)
    rows, cols = (axis.ravel() for axis in np.mgrid[:4, :6])
    xy = np.column_stack((cols, rows)) * 30.0
    counts = rng.poisson(4, (24, len(genes or "abc")))
    views = rng.standard_normal((24, 1, 5)).astype(np.float16)
    neighbours = nearest_spots(xy, 9)[0]
    more = {"array_row": rows, "array_col": cols, "views": views, "neighbours": neighbours}
    return slide(name, counts=counts, genes=genes, xy=xy, **more)


def test_smoothing_never_crosses_the_border_of_a_part() -> None:
    """Where part of a slide is left out, no count of it is in the others' target; a sample of spots is as it was."""
    recipe = TargetRecipe()
    data = tissue(0)
    kept = torch.from_numpy(data.xy[:, 0] < 90)
    other = replace(data, counts=data.counts.copy())  # type: ignore[union-attr]
    other.counts[np.flatnonzero(~kept.numpy())] = 50  # type: ignore[index]
    parts = []
    for each in (data, other):
        # Each spot is scaled by itself: what reaches across is smoothing alone.
        samples = Samples.of([each], [targets(each, ["a", "b"], recipe)], neighbours=2, smoothed=True)
        parts.append(samples.subset(kept))
        assert samples.target is not None
        drawn = samples.subset(kept, smooth_anew=False).target
        assert drawn is not None
        assert torch.equal(drawn, samples.target[kept])
    one, two = (part.target for part in parts)
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    raw = parts[0].raw
    assert raw is not None
    assert np.allclose(one.numpy(), parts[0].smooth(raw.numpy()), atol=1e-6)
    assert drawn is not None
    assert not torch.equal(one, drawn)


def test_counts_of_any_gene_are_within_reach() -> None:
    first, second = tissue(0), tissue(1, "t", ["c", "d", "a"])
    samples = Samples.of([first, second], neighbours=9)
    rows = torch.tensor([30, 3, 25])
    got = samples.counts(rows, ["a", "d", "zzz"]).numpy()
    one, two = (data.counts.toarray() for data in (first, second))  # type: ignore[union-attr]
    assert got[1, 0] == one[3, 0]
    assert got[[0, 2], 0].tolist() == two[[6, 1], 2].tolist()
    assert got[[0, 2], 1].tolist() == two[[6, 1], 1].tolist()
    assert np.isnan(got[1, 1])  # a gene that the slide lacks
    assert np.isnan(got[:, 2]).all()
    kept = torch.arange(48) % 2 == 1
    part = samples.subset(kept)
    assert part.counts(torch.tensor([0, 12]), ["a"]).ravel().tolist() == [one[1, 0], two[1, 2]]


@pytest.mark.parametrize("name", ["ridge", "ridge-context", "knn", "mlp", "nh2st", "nh2st-context"])
def test_every_head_is_smoothed_alike_and_not_by_the_papers_protocol(name: str) -> None:
    small = {
        "knn": ["head.k=3"],
        "mlp": ["head.network.epochs=1", "head.network.members=2"],
        "nh2st": ["head.width=8", "head.hidden=8", "head.decoder_hidden=8", "head.heads=2", "fit.epochs=1"],
        "nh2st-context": ["head.network.epochs=1", "head.network.attention=null"],
    }.get(name, [])
    for protocol in ("nested", "paper"):
        recipe = load_train_recipe(name, [*small, f"protocol={protocol}"])
        slides = [tissue(seed, f"s{seed}") for seed in range(3)]
        made = [targets(each, ["a", "b"], recipe.targets) for each in slides]
        train = Samples.of(slides[:2], made[:2], neighbours=9, smoothed=True)
        model = registry.fit(recipe, train, ["a", "b"], {}, epochs=1 if name == "nh2st" else None).model
        test = Samples.of(slides[2:], neighbours=9, smoothed=True)
        plain, said = model.predict_unsmoothed(test), model.predict_spots(test)
        smoothed = protocol == "nested" or name == "nh2st-context"  # which learns from what is not smoothed
        assert np.allclose(said.values, test.smooth(plain.values) if smoothed else plain.values, atol=1e-6)
        assert not smoothed or not np.allclose(said.values, plain.values, atol=1e-6)
        if plain.spread is not None and smoothed:
            assert said.spread is not None
            assert np.allclose(said.spread, test.smooth(plain.spread), atol=1e-6)
        bare = Samples.of(slides[2:], neighbours=9)
        assert np.array_equal(model.predict_spots(bare).values, model.predict_unsmoothed(bare).values)


def test_genes_that_all_slides_have_are_what_is_scaled_over(embedded: Study) -> None:
    assert embedded.common_genes is None
    turned = replace(embedded.slides["s1"], genes=GENES[::-1])  # the same genes in another order
    assert replace(embedded, slides={**embedded.slides, "s1": turned}).common_genes is None
    some = replace(embedded.slides["s1"], genes=["other", *GENES[1:]])
    apart = replace(embedded, slides={**embedded.slides, "s1": some})
    assert apart.common_genes == tuple(GENES[1:])
    recipe = load_train_recipe("ridge", ["targets.smooth=none", "targets.log=none"])
    made = apart.targets(["s0", "s1"], [GENES[2]], recipe)
    for name in ("s0", "s1"):
        counts = apart.slides[name].counts.toarray()[:, 1:]  # type: ignore[union-attr]
        assert made[name].depth.tolist() == counts.sum(1).tolist()
        assert made[name].values[:, 0] == pytest.approx(1e4 * counts[:, 1] / counts.sum(1), rel=1e-5)


def test_the_pitch_is_the_median_distance_to_the_nearest_spot() -> None:
    assert pitch_px(np.array([[0, 0], [3, 0], [3, 4], [20, 0]], float)) == pytest.approx((3 + 4) / 2)
    assert pitch_px(np.array([[5.0, 5.0]])) == 0


def test_a_fold_is_a_task_that_can_be_sent_away(embedded: Study) -> None:
    task = FoldTask(str(embedded.path), load_train_recipe("ridge"), Fold("P2", ("s0", "s1"), ("s2",)))
    here = run_fold(task, embedded)
    there = pickle.loads(pickle.dumps(run_fold(pickle.loads(pickle.dumps(task)))))
    assert here.panel == there.panel
    assert set(here.predicted) == {"s2"}
    assert np.array_equal(here.predicted["s2"].values, there.predicted["s2"].values)
    assert np.array_equal(here.target["s2"], there.target["s2"])
