from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of, summarise


def test_metrics_by_hand() -> None:
    truth = np.array([[1.0, 2, 5], [2, 2, 5], [3, 2, 6], [4, 2, 8]])
    guess = np.array([[1.0, 1, 9], [3, 2, 7], [2, 3, 7], [4, 4, 5]])
    genes = gene_metrics(guess, truth)
    assert genes["pcc"][0] == pytest.approx(np.corrcoef(guess[:, 0], truth[:, 0])[0, 1])
    assert np.isnan(genes["pcc"][1])  # the truth does not vary
    assert genes["mse"] == pytest.approx(((guess - truth) ** 2).mean(0))
    figures = summarise(guess, truth)
    assert figures["pcc"] == pytest.approx(np.nanmean(genes["pcc"]))
    assert figures["mae"] == pytest.approx(np.abs(guess - truth).mean())
    assert (figures["n_spots"], figures["n_genes"], figures["n_genes_pcc_undefined"]) == (4, 3, 1)


def test_top_50_are_the_best_genes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 80))
    guess = truth + rng.normal(size=(30, 80)) * np.linspace(0.1, 5, 80)
    each = gene_metrics(guess, truth)["pcc"]
    assert summarise(guess, truth)["pcc_top50"] == pytest.approx(np.sort(each)[-50:].mean())


def test_masked_genes_are_left_out_and_constants_have_no_correlation() -> None:
    truth = np.array([[1.0, np.nan], [2, np.nan], [4, np.nan]])
    figures = summarise(np.array([[1.0, 1], [2, 2], [3, 9]]), truth)
    assert figures["n_genes"] == 1
    assert figures["mse"] == pytest.approx(1 / 3)
    says_nothing = summarise(np.full((3, 1), 0.1, np.float32), np.array([[1.0], [2], [3]]))
    assert (says_nothing["pcc"], says_nothing["pcc_top50"], says_nothing["n_genes_pcc_undefined"]) == (0.0, 0.0, 0)
    flat = summarise(np.array([[1.0], [2], [3]]), np.full((3, 1), 0.1, np.float32))
    assert (flat["pcc"], flat["pcc_top50"], flat["n_genes_pcc_undefined"]) == (None, None, 1)
    both = summarise(np.full((3, 1), 0.3), np.full((3, 1), 0.1))
    assert (both["pcc"], both["n_genes_pcc_undefined"]) == (None, 1)
    folds = [{**flat, "train_seconds": 1.0}, {**figures, "train_seconds": 2.0}]
    assert mean_of(folds)["pcc"] == figures["pcc"]
    assert mean_of(folds)["train_seconds"] == 3.0
