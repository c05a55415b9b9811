"""DeepSpot's head against its formula written out, and on slides where what is around a spot decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.deepspot import DeepSpot
from nh2st_pipe.recipes.train import load_train_recipe
from tests.recipes.test_every_setting import GENES, samples
from tests.training.test_choosing import slides

SMALL = ["head.width=16", "head.networks=3", "choose={}", "fit.epochs=40", "fit.lr=0.01", "fit.batch_size=12"]


def test_a_prediction_is_the_formula() -> None:
    recipe = load_train_recipe("deepspot", SMALL)
    data = samples(recipe, slice(0, 1))
    torch.manual_seed(0)
    model = DeepSpot(data.dim, GENES, width=4, networks=5, scale_features=False).eval()
    model.rho_bias.data.normal_()
    said = model.forward_view(data, torch.arange(len(data)), 1).detach().double().numpy()
    x = data.gather(torch.arange(len(data)), 1).double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (model.phi.weight, model.phi.bias))
    phi = np.median(np.maximum(x @ weight.T + bias, 0).reshape(-1, 5, 4), axis=1)  # of five: the third
    near = data.neighbours.numpy()
    joined = np.concatenate((phi[near[:, 0]], phi[near[:, 1:]].max(1)), 1)
    rho, last = (p.detach().double().numpy() for p in (model.rho, model.rho_bias))
    expected = np.mean([joined @ rho[j] + last[j] for j in range(5)], axis=0)
    assert said == pytest.approx(expected, abs=1e-4)


def test_it_learns_from_a_spots_neighbours_and_from_slides_that_have_the_gene() -> None:
    """What is around a spot says nothing of the spot itself here."""
    data = slides([60, 60, 60, 60])
    draw = np.random.default_rng(0)
    near = np.stack([np.concatenate(([i], i // 60 * 60 + draw.choice(60, 4))) for i in range(240)])
    highest = data.gather(torch.from_numpy(near[:, 1:]), 0).float()[..., 0].amax(1)
    assert data.target is not None
    target = torch.stack((highest + 5, data.target[:, 1]), 1)
    target[:60, 1] = torch.nan  # one slide lacks a gene
    recipe = load_train_recipe("deepspot", SMALL)
    found = []
    for neighbours in (near, near[:, :1]):
        every = replace(data, neighbours=torch.from_numpy(neighbours), target=target, raw=target)
        new = torch.arange(240) >= 180
        model = registry.fit(recipe, every.subset(~new), ["a", "b"], {}, epochs=40).model
        said = model.predict_unsmoothed(every.subset(new)).values
        assert np.isfinite(said).all()
        assert abs(said[:, 0].mean() - 6) < 1  # the last bias began at the mean
        found.append(gene_metrics(said[:, :1], highest[180:, None].numpy())["pcc"][0])
    assert found[0] > 0.8 > 0.4 > found[1]
