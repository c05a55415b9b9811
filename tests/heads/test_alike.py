"""What spots that look alike express, against the search written out."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads import alike
from nh2st_pipe.heads.alike import Alike, Expressing, evenly
from nh2st_pipe.heads.base import FeatureScaler
from nh2st_pipe.heads.blocks import Blur
from nh2st_pipe.recipes.train import RetrievalPart
from tests.training.test_choosing import slides


def blocks(samples: Samples, mean: np.ndarray, scale: np.ndarray, sigmas: tuple[float, ...]) -> np.ndarray:
    """The B blocks of every spot, each of unit length, slide by slide."""
    found = []
    for part in samples.parts:
        rows = torch.arange(part.start, part.stop)
        x = samples.gather(rows, slice(None)).double().numpy().mean(1)
        x = np.clip((x - 0.5 * x.mean(0) - mean) / scale, -8, 8)
        alone = replace(part, start=0, stop=len(x))
        each = [b.numpy() for b in Blur(alone, sigmas, samples.device, torch.float64)(torch.from_numpy(x))]
        found.append(np.concatenate([b / np.linalg.norm(b, axis=1, keepdims=True) for b in each], 1))
    return np.concatenate(found)


def test_it_is_the_mean_over_the_most_alike_of_the_training_spots() -> None:
    data = slides([40, 30, 50])
    out = torch.zeros(len(data), dtype=torch.bool)
    out[40:70] = True
    train, new = data.subset(~out), data.subset(out)
    recipe = RetrievalPart(k=7, sigmas=(1.0, 2.0))
    said = Alike.of(recipe, train, 0).expressed(recipe, new)

    centred = []
    for part in train.parts:
        x = train.gather(torch.arange(part.start, part.stop), slice(None)).double().mean(1)
        centred.append(x - 0.5 * x.mean(0))
    x = torch.cat(centred)
    std = x.std(0, correction=0)
    mean, scale = x.mean(0).numpy(), torch.maximum(std, 0.1 * std.quantile(0.5)).numpy()
    like = blocks(new, mean, scale, recipe.sigmas) @ blocks(train, mean, scale, recipe.sigmas).T
    assert train.target is not None
    target = np.concatenate([train.target[p.rows].numpy() - train.target[p.rows].numpy().mean(0) for p in train.parts])
    expected = target[np.argsort(-like, axis=1)[:, :7]].mean(1)
    agree = np.isclose(said, expected, atol=2e-3).all(1)  # keys in half precision: the seventh may change places
    assert agree.mean() > 0.9
    assert np.corrcoef(said.ravel(), expected.ravel())[0, 1] > 0.999


def test_the_scale_is_that_of_the_baselines() -> None:
    """Where no slide's mean is off nothing, scaling is `FeatureScaler`'s on the mean over views."""
    data = slides([60])
    made = Alike.of(RetrievalPart(), data, 0)
    x = data.gather(torch.arange(60), slice(None)).float().mean(1)
    x -= 0.5 * x.mean(0)
    scaler = FeatureScaler(data.dim, 8.0)
    one = replace(data, cache=type(data.cache)(x[:, None]))  # type: ignore[call-arg]
    scaler.fit(one)
    assert made.scale[0] == pytest.approx(scaler.mean.numpy(), abs=1e-4)
    assert made.scale[1] == pytest.approx(scaler.scale.numpy(), rel=1e-3)


def test_spots_are_kept_evenly_over_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evenly([3, 100, 50], 1000) == [3, 100, 50]
    assert evenly([3, 100, 50], 63) == [3, 30, 30]
    assert evenly([10, 10, 10], 7) == [2, 2, 3]
    data = slides([40, 30, 50])
    few = Alike.of(RetrievalPart(most=60), data, 0)
    assert len(few.keys) == len(few.values) == 60
    assert few.keys.dtype == few.values.dtype == np.float16
    assert not np.array_equal(few.keys, Alike.of(RetrievalPart(most=60), data, 1).keys)
    monkeypatch.setattr(alike, "_MOST_VALUES", 100)  # of two genes
    assert len(Alike.of(RetrievalPart(k=10), data, 0).keys) == 50


def test_a_gene_that_a_slide_lacks_is_taken_from_the_others() -> None:
    data = slides([40, 30, 50])
    assert data.target is not None
    target = data.target.clone()
    target[:40, 0] = torch.nan
    lacking = replace(data, target=target, raw=target)
    recipe = RetrievalPart(k=40)
    said = Alike.of(recipe, lacking, 0).expressed(recipe, data)
    assert np.isfinite(said).all()
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[:40] = False
    others = RetrievalPart(k=80)
    whole = Alike.of(recipe, lacking, 0)
    every = whole.expressed(RetrievalPart(k=120), data)[:, 0]
    assert every == pytest.approx(Alike.of(others, data.subset(kept), 0).expressed(others, data)[:, 0], abs=1e-4)
    alone = Alike.of(recipe, lacking.subset(~kept), 0).expressed(recipe, data)
    assert alone[:, 0].tolist() == [0.0] * len(data)  # no spot has it


def test_among_very_many_spots_the_cells_that_are_nearest_find_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = slides([600, 600])
    recipe = RetrievalPart(k=20)
    made = Alike.of(recipe, data, 0)
    each = made.expressed(recipe, data)
    monkeypatch.setattr(alike, "_EXHAUSTIVE", 100)
    assert made._index().nlist == 35
    few = pickle.loads(pickle.dumps(made))  # without its index
    assert 0.9 < np.corrcoef(few.expressed(recipe, data)[:, 0], each[:, 0])[0, 1] < 1
    assert np.array_equal(few.expressed(recipe, data), replace(few).expressed(recipe, data))
    many = made.expressed(RetrievalPart(k=1000), data)  # more than the cells hold that are looked at
    assert np.isfinite(many).all()
    assert np.abs(many).max() <= np.abs(made.values).max()


def test_what_is_expressed_is_turned_without_being_made() -> None:
    data = slides([40, 30, 50])
    recipe, basis = RetrievalPart(k=10), np.array([[1.0, 0.5], [-2.0, 0.25]])
    said = Alike.of(recipe, data, 0).expressing(recipe, data)
    found = said.onto(basis)
    assert found is not None
    assert np.allclose(found, said(slice(None)) @ basis, atol=1e-3)
    assert np.array_equal(said(slice(1, 2)), said(slice(None))[:, 1:])
    lacking = Alike.of(recipe, data, 0).values.copy()
    lacking[3, 1] = np.nan
    assert Expressing(lacking, said.like).onto(basis) is None
