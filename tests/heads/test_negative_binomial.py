"""nh2st-nb on counts whose distribution is known, and what a head may declare that it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import anndata
import numpy as np
import pytest
import scipy.stats
import torch

from nh2st_pipe.core.errors import RecipeError, TrainError
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.negative_binomial import nb_loss
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.train import HeadRecipe, TrainRecipe, load_train_recipe
from nh2st_pipe.store.read import SlideData
from nh2st_pipe.training.run import train
from tests.conftest import GENES, Study, slide
from tests.evaluation.known import grid, smooth_maps

SIDE, DIM, GENES_N = 10, 8, [f"g{i}" for i in range(5)]
SMALL = [
    "head.network.components=8", "head.network.width=16", "head.network.members=2", "head.network.epochs=60",
    "head.network.lr=0.01", "head.network.dropout=0.1", "head.sigmas=[1]", "head.network.attention=null",
]  # fmt: skip
THETA = 4.0


def rates(seed: int) -> np.ndarray:
    """The shares of each spot's counts that its genes have, n × 5: each follows one value of the embedding."""
    maps = smooth_maps(np.random.default_rng(seed), SIDE, DIM)
    return np.asarray(0.002 * np.array([1, 2, 4, 8, 16]) * np.exp(0.8 * maps[:, : len(GENES_N)]))


def section(seed: int, depth: float = 5000.0, genes: list[str] | None = None) -> SlideData:
    rng = np.random.default_rng(1000 + seed)
    maps = smooth_maps(np.random.default_rng(seed), SIDE, DIM)
    size = depth * rng.lognormal(0, 0.6, (SIDE**2, 1))
    mean = size * rates(seed)
    counts = rng.poisson(rng.gamma(THETA, mean / THETA))
    others = rng.poisson(size * 0.9)  # all genes beyond these, so that each spot's sum follows its size
    of = ["other", *GENES_N]
    kept = [of.index(name) for name in (genes or of)]
    rows, cols = (axis.ravel() for axis in np.mgrid[:SIDE, :SIDE])
    values = np.concatenate([others, counts], 1)[:, kept]
    return slide(
        f"s{seed}", counts=values, genes=[of[i] for i in kept], xy=grid(SIDE), views=maps[:, None].astype(np.float16),
        array_row=rows, array_col=cols,
    )  # fmt: skip


def samples(recipe: TrainRecipe, of: list[SlideData], panel: list[str] | None = None) -> Samples:
    made = [targets(each, panel or GENES_N, recipe.targets) for each in of]
    return Samples.of(of, made, neighbours=1, smoothed=recipe.targets.smooth != "none")


def fitted(settings: list[str] | None = None, of: list[SlideData] | None = None) -> tuple[TrainRecipe, HeadModel]:
    recipe = load_train_recipe("nh2st-nb", [*SMALL, *(settings or [])])
    return recipe, registry.fit(recipe, samples(recipe, of or [section(i) for i in range(4)]), GENES_N, {}).model


def test_the_loss_is_the_likelihood() -> None:
    counts, mean = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 3, 50, 1000], [0.5, 2.0, 60, 700]))
    for theta in (0.3, 5.0, 200.0):
        expected = -scipy.stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean.numpy()))
        found = nb_loss(counts, mean, torch.tensor(theta, dtype=torch.float64).log())
        assert found.numpy() == pytest.approx(expected, rel=1e-6)


def test_it_finds_rates_and_dispersion_whatever_the_depth() -> None:
    recipe, model = fitted()
    said = model.predict_unsmoothed(samples(recipe, [section(7)]))
    assert said.distribution is not None
    assert said.distribution.kind == recipe.head.distribution == "negative binomial"
    rate, theta = said.distribution.parameters["rate"], said.distribution.parameters["dispersion"]
    assert gene_metrics(np.log(rate), np.log(rates(7)))["pcc"].min() > 0.8
    assert np.log(rate).mean(0) == pytest.approx(np.log(rates(7)).mean(0), abs=0.5)
    assert theta == pytest.approx(THETA, rel=0.5)
    assert said.values == pytest.approx(np.log10(1e4 * rate + 1), abs=1e-5)
    deep = [section(i, depth=5000.0 * (1 + 4 * (i % 2))) for i in range(4)]
    _, other = fitted(of=deep)
    again = other.predict_unsmoothed(samples(recipe, [section(7)])).distribution
    assert again is not None
    assert np.log(again.parameters["rate"]) == pytest.approx(np.log(rate), abs=0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["targets.log=none"], lambda rate, size: 1e4 * rate),
        (["targets.log=log1p"], lambda rate, size: np.log1p(1e4 * rate)),
        (["targets.log=none", "targets.scale_to=null"], lambda rate, size: size * rate),
        (["targets.log=none", "targets.scale_over=panel"], lambda rate, size: 1e4 * rate / rate.sum(1, keepdims=True)),
    ],
)
def test_values_are_the_target_of_the_mean(settings: list[str], expected: object) -> None:
    recipe, model = fitted([*settings, "head.network.epochs=2"])
    said = model.predict_unsmoothed(samples(recipe, [section(7)]))
    assert said.distribution is not None
    rate = said.distribution.parameters["rate"].astype(np.float64)
    depth = samples(recipe, [section(i) for i in range(4)]).depth
    assert depth is not None
    assert said.values == pytest.approx(expected(rate, float(depth.median())), rel=2e-2)  # type: ignore[operator]


def test_a_gene_that_a_slide_lacks_is_learnt_from_the_others() -> None:
    without = section(0, genes=["other", *GENES_N[1:]])
    recipe, model = fitted(of=[without, *(section(i) for i in range(1, 4))])
    said = model.predict_unsmoothed(samples(recipe, [section(7)])).distribution
    assert said is not None
    assert gene_metrics(np.log(said.parameters["rate"]), np.log(rates(7)))["pcc"].min() > 0.7


def test_what_a_head_reads_has_to_be_there() -> None:
    recipe = load_train_recipe("nh2st-nb", SMALL)
    data = samples(recipe, [section(0), section(1)])
    bare = replace(data, parts=(replace(data.parts[0], counts=None), data.parts[1]))
    with pytest.raises(TrainError, match="the head reads raw counts, and there is none of s0"):
        registry.fit(recipe, bare, GENES_N, {})
    model = registry.fit(recipe, data, GENES_N, {}).model
    assert np.isfinite(model.predict(bare)).all()  # in training alone

    class OfSlides(HeadRecipe):
        reads: ClassVar[tuple[Literal["counts", "slide_vector"], ...]] = ("slide_vector",)

    with pytest.raises(TrainError, match="reads a vector of the whole slide, and there is none of s0, s1"):
        OfSlides.check_slides(data.parts, training=False)
    seen = samples(recipe, [replace(section(0), slide_vector=np.ones(3, np.float32))])
    OfSlides.check_slides(seen.parts, training=True)
    kept = torch.zeros(len(seen), dtype=torch.bool)
    kept[:5] = True
    vector = seen.subset(kept).parts[0].slide_vector
    assert vector is not None
    assert vector.tolist() == [1, 1, 1]


@pytest.mark.parametrize("setting", ["head.network.low_count=0.2", "head.network.contrast={}"])
def test_what_does_nothing_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match="has no effect"):
        load_train_recipe("nh2st-nb", [setting])


def test_a_run_keeps_the_distribution(study: Study, tmp_path: Path) -> None:
    study.stored(views=1)
    store = study.folder / "store.zarr"
    run = train(store, recipe="nh2st-nb", out=tmp_path / "run", genes=GENES[:4], settings=[*SMALL, "baselines=[]"])
    held = anndata.read_h5ad(run.path / "predictions" / "s1.h5ad")
    done = predict(run.path, embeddings=store, out=tmp_path / "p", genes=[GENES[2], GENES[0]])
    data = anndata.read_h5ad(done.files["s1"])
    for each in (held, data):
        assert each.uns["nh2st_pipe"]["distribution"] == "negative binomial"
        assert each.layers["rate"].shape == each.shape
        assert (each.layers["rate"] > 0).all()
        assert (each.var["dispersion"] > 0).all()
    assert data.var_names.tolist() == [GENES[2], GENES[0]]
    whole = anndata.read_h5ad(predict(run.path, embeddings=store, out=tmp_path / "q").files["s1"])
    assert np.array_equal(whole[:, data.var_names].layers["rate"], data.layers["rate"])
    assert whole[:, data.var_names].var["dispersion"].tolist() == data.var["dispersion"].tolist()
