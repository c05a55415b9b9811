from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.samples import ResidentCache, Samples
from nh2st_pipe.data.study import Study
from nh2st_pipe.data.targets import targets
from nh2st_pipe.recipes.train import TargetRecipe, load_train_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.lattice import pitch_px
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
