from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.evaluation.judged import judge
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_pcc, top_mean
from tests.evaluation.known import grid


def test_metrics_by_hand() -> None:
    truth = np.array([[1.0, 2, 5], [2, 2, 5], [3, 2, 6], [4, 2, 8]])
    guess = np.array([[1.0, 1, 9], [3, 2, 7], [2, 3, 7], [4, 4, 5]])
    genes = gene_metrics(guess, truth)
    assert genes["pcc"][0] == pytest.approx(np.corrcoef(guess[:, 0], truth[:, 0])[0, 1])
    assert np.isnan(genes["pcc"][1])  # the truth does not vary
    assert genes["mse"] == pytest.approx(((guess - truth) ** 2).mean(0))
    assert genes["mae"] == pytest.approx(np.abs(guess - truth).mean(0))


def test_top_50_are_the_best_genes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 80))
    guess = truth + rng.normal(size=(30, 80)) * np.linspace(0.1, 5, 80)
    each = gene_metrics(guess, truth)["pcc"]
    assert top_mean(each) == pytest.approx(np.sort(each)[-50:].mean())
    assert top_mean(np.array([np.nan])) is None


def test_masked_genes_are_left_out_and_constants_have_no_correlation() -> None:
    truth = np.array([[1.0, np.nan], [2, np.nan], [4, np.nan]])
    masked = gene_metrics(np.array([[1.0, 1], [2, 2], [3, 9]]), truth)
    assert np.isnan(masked["pcc"][1])
    assert masked["mse"][0] == pytest.approx(1 / 3)
    says_nothing = gene_metrics(np.full((3, 1), 0.1, np.float32), np.array([[1.0], [2], [3]]))
    assert says_nothing["pcc"].tolist() == [0.0]
    for guess in (np.array([[1.0], [2], [3]]), np.full((3, 1), 0.3)):
        assert np.isnan(gene_metrics(guess, np.full((3, 1), 0.1, np.float32))["pcc"]).all()


def test_a_prediction_that_is_not_a_number_says_nothing_of_its_gene() -> None:
    truth = np.array([[1.0, 1, 7], [2, 2, 7], [3, 3, 7], [4, 4, 7]])
    guess = truth + np.array([[0.1, 0.2, 0.0]]) * [[1], [-1], [1], [1]]
    guess[2, 1:] = np.nan
    found = gene_metrics(guess, truth)
    assert found["pcc"][0] > 0.9
    assert found["pcc"][1] == 0.0
    assert np.isnan(found["pcc"][2])  # the truth does not vary, whatever is predicted
    assert found["mse"][1] == pytest.approx(0.04)  # of the other spots


def test_the_pcc_of_slides_is_never_that_of_their_spots_together() -> None:
    """Two slides at different levels: within each the prediction is against the truth, over both it follows it."""
    truth = np.array([[1.0], [2], [3], [11], [12], [13]])
    guess = np.array([[3.0], [2], [1], [13], [12], [11]])
    assert gene_metrics(guess, truth)["pcc"][0] > 0.9
    assert mean_pcc(guess, truth, [slice(0, 3), slice(3, 6)]) == pytest.approx(-1.0)


def test_genes_without_a_pcc_are_counted() -> None:
    truth = np.tile(np.arange(9.0)[:, None], (1, 3)).astype(np.float32)
    truth[:, 1], truth[:, 2] = 4.0, np.nan
    figures = judge(truth, truth, grid(3), slide_id="s", patient="s", genes="abc").figures
    assert (figures.n_genes, figures.n_genes_pcc_undefined, figures.n_spots) == (2, 1, 9)
    assert figures.pcc == pytest.approx(1.0)
