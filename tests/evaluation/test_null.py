from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.evaluation import null
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.evaluation.null import MOVES, moved_pcc, moves
from tests.evaluation.known import grid, smooth_maps, study


def test_a_move_is_a_shift_over_a_torus_with_or_without_a_mirror() -> None:
    """On a square array spots that stand beside each other stay beside each other, but at the seams."""
    xy = grid(12)
    ways = set()
    for rows, onto in moves(xy, seed=0):
        assert len(rows) == len(xy)  # the array is whole: all spots land
        step = (xy[onto[1:]] - xy[onto[:-1]])[np.abs(xy[rows[1:]] - xy[rows[:-1]]).sum(1) == 100]
        ways.add(tuple(np.sign(np.median(step, axis=0))))
        assert (np.abs(step).sum(1) == 100).mean() > 0.8
        assert (onto == rows).mean() < 0.2
    assert {(1, 0), (-1, 0)} <= ways


def test_a_tie_is_broken_and_the_structure_kept() -> None:
    """The spread of the null is that of maps that really have nothing to do with each other."""
    rng, side = np.random.default_rng(1), 16
    apart = np.concatenate(
        [gene_metrics(smooth_maps(rng, side, 60), smooth_maps(rng, side, 60))["pcc"] for _ in range(4)]
    )
    for guess_follows in (False, True):
        truth = smooth_maps(rng, side, 60)
        guess = truth if guess_follows else smooth_maps(rng, side, 60)
        of_null = moved_pcc(guess, truth, grid(side), seed=3)
        assert of_null.shape == (MOVES, 60)
        assert abs(of_null.mean()) < 0.05
        assert of_null.std() == pytest.approx(apart.std(), rel=0.3)
    rough = rng.standard_normal((side**2, 60)).astype(np.float32)
    assert moved_pcc(rough, rough, grid(side), seed=3).std() < apart.std() / 2


def test_spots_of_any_layout_and_too_few_of_them() -> None:
    rng = np.random.default_rng(0)
    ring = grid(20)[np.abs(np.hypot(*(grid(20) / 100 - 9.5).T) - 7) < 2]  # tissue with a hole
    values = rng.standard_normal((len(ring), 5)).astype(np.float32)
    of_null = moved_pcc(values, values, ring, seed=0)
    assert len(of_null) == MOVES
    assert np.abs(of_null).max() < 0.6
    assert moved_pcc(values[:7], values[:7], ring[:7], seed=0).shape == (0, 5)
    assert moved_pcc(values, values, np.zeros_like(ring), seed=0).shape == (0, 5)


def test_a_prediction_that_does_not_vary_has_a_null_of_zero_and_a_truth_that_does_not_none() -> None:
    truth = np.random.default_rng(0).standard_normal((36, 3)).astype(np.float32)
    guess = truth.copy()
    guess[:, 0], truth[:, 1], truth[:, 2] = 0.1, 0.1, np.nan
    of_null = moved_pcc(guess, truth, grid(6), seed=0)
    assert (of_null[:, 0] == 0).all()
    assert np.isnan(of_null[:, 1:]).all()


def test_the_papers_top_50_stands_beside_what_it_is_without_any_tie() -> None:
    """Of 250 smooth maps that follow nothing the 50 best have a PCC well above 0; those picked elsewhere do not."""
    picked = np.arange(50)
    for each in study(0, 2, 0.0, genes=250, picked=picked):
        figures = each.figures
        assert figures.pcc_top50 is not None
        assert figures.pcc_top50 > 0.25
        assert figures.pcc_top50_null == pytest.approx(figures.pcc_top50, abs=0.12)
        assert figures.pcc_top50_train == pytest.approx(0, abs=0.12)


def test_many_genes_are_moved_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = smooth_maps(np.random.default_rng(0), 8, 23)
    whole = moved_pcc(truth, truth[:, ::-1], grid(8), seed=0)
    monkeypatch.setattr(null, "_GENES_AT_ONCE", 5)
    assert np.array_equal(moved_pcc(truth, truth[:, ::-1], grid(8), seed=0), whole)
