"""Moran's I: that of maps whose structure is known, and as its definition has it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from nh2st_pipe.evaluation.moran import morans_i

Y, X = (axis.ravel() for axis in np.mgrid[:20, :20])
XY = np.column_stack((X, Y)) * 50.0 + 7


def test_noise_has_none_a_gradient_nearly_all_and_a_chessboard_less_than_none() -> None:
    noise = np.random.default_rng(0).normal(size=(400, 40))
    maps = np.column_stack((X, (X + Y) % 2, np.ones(400), noise)).astype(float)
    gradient, board, flat, *of_noise = morans_i(maps, XY)
    assert gradient > 0.9
    assert board < -0.3
    assert np.isnan(flat)
    assert abs(np.mean(of_noise)) < 0.02
    assert np.abs(of_noise).max() < 0.12


def test_it_is_what_its_definition_gives() -> None:
    rng = np.random.default_rng(1)
    xy, values = rng.uniform(0, 300, (60, 2)), rng.normal(size=(60, 3)) + rng.normal(size=(60, 1))
    apart = cdist(xy, xy)
    nearest = np.sort(apart, axis=1)[:, 1]
    weights = np.zeros((60, 60))
    for i in range(60):
        near = [j for j in np.argsort(apart[i])[1:7] if apart[i, j] <= 1.6 * np.median(nearest)]
        weights[i, near] = 1 / max(1, len(near))
    beside = weights.sum(axis=1) > 0
    z = values - values.mean(axis=0)
    numerator = (z * (weights @ z))[beside].sum(axis=0) / beside.sum()
    np.testing.assert_allclose(morans_i(values, xy), numerator / (z**2).mean(axis=0))


def test_spots_without_a_value_are_left_out() -> None:
    values = np.column_stack((X, X)).astype(float)
    values[:, 1][::7] = np.nan
    values[3:, 0] = np.nan  # two pairs of neighbours are left
    few, most = morans_i(values, XY)
    assert np.isfinite(few)
    assert most == pytest.approx(morans_i(X[:, None].astype(float), XY)[0], abs=0.02)
    values[2:, 0] = np.nan
    assert np.isnan(morans_i(values, XY)[0])
    few = morans_i(np.zeros((2, 5)), XY[:2])
    assert few.shape == (5,)
    assert np.isnan(few).all()
