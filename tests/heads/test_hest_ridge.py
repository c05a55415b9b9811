"""The probe of HEST-Benchmark against the steps of its code, with scikit-learn alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nh2st_pipe.data.samples import Part
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.runs.model import load_model
from tests.heads.test_heads import GENES, everything, samples


@pytest.mark.parametrize(("n", "dim", "components"), [(80, 7, 256), (80, 40, 5), (12, 40, 256)])
def test_a_fold_is_that_of_the_benchmarks_own_steps(n: int, dim: int, components: int) -> None:
    train, test = samples(n, 2, dim, seed=0), samples(30, 2, dim, seed=1)
    recipe = load_train_recipe("hest-ridge", [f"head.components={components}"])
    said = registry.fit(recipe, train, GENES, {}).model.predict(test)
    x, held = (everything(data)[:, 0].double().numpy() for data in (train, test))
    assert train.target is not None
    assert test.target is not None
    y, truth = train.target.double().numpy(), test.target.numpy()
    kept = min(components, n, dim)
    steps = make_pipeline(StandardScaler(), PCA(n_components=kept, random_state=1))
    ridge = Ridge(solver="lsqr", alpha=100 / (kept * 5), random_state=1, fit_intercept=False, max_iter=1000)
    expected = ridge.fit(steps.fit_transform(x), y).predict(steps.transform(held))
    assert said == pytest.approx(expected, abs=1e-6)
    by_hand = [np.corrcoef(expected[:, g], truth[:, g])[0, 1] for g in range(5)]
    assert gene_metrics(said, truth)["pcc"] == pytest.approx(by_hand, abs=1e-6)


def test_a_saved_probe_predicts_the_same_and_learns_a_gene_from_the_slides_that_have_it(tmp_path: Path) -> None:
    data = samples(40, 2)
    assert data.target is not None
    parts = tuple(Part(f"s{i}", 20 * i, 20 * i + 20, np.random.default_rng(i).normal(size=(20, 2))) for i in range(2))
    target = data.target.clone()
    target[20:, 1] = float("nan")
    lacking = replace(data, parts=parts, target=target, raw=target)
    trained = registry.fit(load_train_recipe("hest-ridge"), lacking, GENES, {}).model
    kept = torch.arange(40) < 20
    alone = registry.fit(load_train_recipe("hest-ridge"), replace(data, parts=parts).subset(kept), GENES, {}).model
    assert trained.predict(data)[:, 1] == pytest.approx(alone.predict(data)[:, 1], abs=1e-6)
    trained.save_pretrained(tmp_path / "model")
    assert np.array_equal(load_model(tmp_path).predict(data), trained.predict(data))


def test_a_single_gene_is_a_panel_too() -> None:
    data = samples(40, 1)
    assert data.target is not None
    one = replace(data, target=data.target[:, :1], raw=data.target[:, :1])
    said = registry.fit(load_train_recipe("hest-ridge"), one, GENES[:1], {}).model.predict(data)
    assert said.shape == (40, 1)
    assert np.corrcoef(said[:, 0], data.target[:, 0].numpy())[0, 1] > 0.5
