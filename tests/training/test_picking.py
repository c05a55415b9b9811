from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.study import Study as FoldData
from nh2st_pipe.data.targets import targets
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.training import picking
from nh2st_pipe.training.fold import FoldTask, run_fold
from nh2st_pipe.training.picking import picked_genes
from tests.conftest import GENES as STUDY_GENES
from tests.conftest import Study, slide
from tests.evaluation.known import grid, smooth_maps

GENES = [f"g{i}" for i in range(90)]
FOLLOW = np.arange(90) % 3 == 0  # thirty genes follow the image


def training(slides: int, side: int = 8) -> Samples:
    recipe, found = load_train_recipe("ridge").targets, []
    for i in range(slides):
        rng = np.random.default_rng(i)
        maps = smooth_maps(rng, side, 6)
        level = np.where(FOLLOW, maps[:, np.arange(90) % 6], smooth_maps(rng, side, 90))
        rows, cols = (axis.ravel() for axis in np.mgrid[:side, :side])
        found.append(
            slide(
                f"s{i}",
                counts=rng.poisson(20 * np.exp(0.5 * level)),
                genes=GENES,
                xy=grid(side),
                views=maps[:, None].astype(np.float16),
                array_row=rows,
                array_col=cols,
                neighbours=nearest_spots(grid(side), 9)[0],
            )
        )
    return Samples.of(found, [targets(each, GENES, recipe) for each in found], neighbours=9, smoothed=True)


@pytest.mark.parametrize("slides", [1, 2, 4])
def test_the_genes_that_are_picked_are_predicted_best_inside_the_training_slides(slides: int) -> None:
    patients = {f"s{i}": f"s{i}" for i in range(slides)}
    picked = picked_genes(load_train_recipe("ridge"), training(slides, 16 if slides == 1 else 8), patients, GENES)
    assert len(picked) == 50
    assert FOLLOW[picked].sum() >= 26  # 17 by chance
    assert (np.diff(picked) > 0).all()


def test_of_a_small_panel_all_genes_are_meant_and_of_many_spots_some_do(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, train = load_train_recipe("ridge"), training(3)
    patients = {f"s{i}": "P" for i in range(3)}
    assert picked_genes(recipe, train, patients, GENES[:50]).tolist() == list(range(50))
    monkeypatch.setattr(picking, "_MOST_SPOTS", 3 * 40)
    monkeypatch.setattr(picking, "_FEWEST_OF_A_SLIDE", 10)
    some = picked_genes(recipe, train, patients, GENES)
    assert FOLLOW[some].sum() >= 26
    assert np.array_equal(some, picked_genes(recipe, train, patients, GENES))


@pytest.mark.parametrize(("most", "fewest", "each"), [(3 * 40, 10, 40), (3 * 40, 50, 50), (10**6, 10, 64), (90, 1, 30)])
def test_of_each_slide_as_many_spots_are_drawn(
    monkeypatch: pytest.MonkeyPatch, most: int, fewest: int, each: int
) -> None:
    train = training(3)
    monkeypatch.setattr(picking, "_MOST_SPOTS", most)
    monkeypatch.setattr(picking, "_FEWEST_OF_A_SLIDE", fewest)
    kept = picking._drawn(train, 1)
    assert [int(kept[part.rows].sum()) for part in train.parts] == [each] * 3
    assert bool((kept == picking._drawn(train, 1)).all())
    assert each == 64 or not bool((kept == picking._drawn(train, 2)).all())


def test_test_slides_pick_nothing(study: Study) -> None:
    """Other counts on the slide that is judged: the same fifty genes."""
    study.stored(views=8)
    whole = FoldData.load(open_store(study.folder / "store.zarr"), ["s0", "s1", "s2"])
    many = [f"{gene}-{i}" for i in range(5) for gene in STUDY_GENES]
    rng, picked = np.random.default_rng(0), []
    counts = {name: sp.csr_matrix(rng.poisson(5, (len(whole.slides[name]), 60))) for name in whole.slides}
    for others in (counts["s2"], counts["s2"][::-1] * 3):
        slides = {
            name: replace(slide, genes=many, counts=others if name == "s2" else counts[name])
            for name, slide in whole.slides.items()
        }
        recipe = load_train_recipe("mean", ["targets.genes=all", "targets.scale_to=null"])
        result = run_fold(
            FoldTask("", recipe, Fold("f", ("s0", "s1"), ("s2",))), replace(whole, slides=slides, found={})
        )
        picked.append(result.judged[0].picked)
    assert len(picked[0]) == 50 < 60
    assert np.array_equal(picked[0], picked[1])
