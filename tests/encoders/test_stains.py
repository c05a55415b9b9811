from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.encoders import stains
from nh2st_pipe.encoders.load import load_encoder
from nh2st_pipe.encoders.stains import STAINS, restain, stain_shift, tiles_for_shift
from nh2st_pipe.recipes.encoder import load_encoder_recipe


def tiles(n: int = 5, side: int = 32) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 250, (n, side // 8, side // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("stain", range(STAINS))
def test_a_stain_scales_and_moves_concentrations(stain: int) -> None:
    gains, offsets = stains._draws()
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    before = tiles()
    density = -np.log((before.astype(float) + 1) / 256)
    concentrations = np.linalg.solve(vectors.T, density.reshape(-1, 3).T).T
    expected = 256 * np.exp(-(concentrations * gains[stain] + offsets[stain]) @ vectors) - 1
    got = restain(before, stain).reshape(-1, 3)
    assert np.abs(got - np.clip(expected, 0, 255)).max() < 0.51
    assert (gains >= 0.75).all()
    assert (gains <= 1.25).all()
    assert (np.abs(offsets) <= 0.03).all()
    assert np.abs(got.astype(int) - before.reshape(-1, 3)).mean() > 2


@pytest.mark.parametrize("views", [1, 8])
def test_the_shift_is_the_mean_of_stained_less_own_view_by_view(views: int) -> None:
    encoder = load_encoder(load_encoder_recipe("fake"), None)
    side = load_encoder_recipe("fake").input_px
    x = tiles(3, side)
    own = encoder.encode(x, views)
    got = stain_shift(encoder, x, own)
    assert got.shape == (8, own.shape[2])
    for stain in (0, 3, 6):
        stained = encoder.encode(restain(x, stain), 8)
        view = stain if views == 8 else 0
        assert np.allclose(
            got[stain], stained[:, view].astype(float).mean(0) - own[:, view].astype(float).mean(0), atol=1e-3
        )
    assert np.abs(got).max() > 0.01


def test_tiles_are_spread_over_the_slide() -> None:
    assert tiles_for_shift(1).tolist() == [0]
    assert tiles_for_shift(5).tolist() == [0, 1, 2, 3, 4]
    many = tiles_for_shift(10_000)
    assert (len(many), many[0], many[-1]) == (48, 0, 9999)
    assert np.diff(many).min() > 200
