from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.evaluation.named import NAMED, gene_set_pcc, named, read_gmt

TRUTH = np.array([[1.0, 5, 2], [2, 1, 2], [3, 4, 9], [10, 2, 3]])
GUESS = np.array([[1.0, 1, 4], [4, 2, 5], [9, 3, 9], [16, 4, 1]])


def corr(a: object, b: object) -> float:
    return float(np.corrcoef(np.asarray(a), np.asarray(b))[0, 1])


def test_each_figure_by_hand() -> None:
    # Ranks of the truth: 1 2 3 4; 4 1 3 2; 1.5 1.5 4 3. Of the guess: 1 2 3 4; 1 2 3 4; 2 3 4 1.
    ranks = [corr([1, 2, 3, 4], [1, 2, 3, 4]), corr([4, 1, 3, 2], [1, 2, 3, 4]), corr([1.5, 1.5, 4, 3], [2, 3, 4, 1])]
    assert named("spearman").of(GUESS, TRUTH) == pytest.approx(np.mean(ranks))
    spots = [corr(guess, truth) for guess, truth in zip(GUESS, TRUTH, strict=True)]
    assert named("pcc_spot").of(GUESS, TRUTH) == pytest.approx(np.mean(spots))


def test_of_many_genes_the_highest_and_the_most_variable_are_judged() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 120))
    truth[:, :50] += 9  # high, and of the variance of the others
    truth[:, 60:110] *= 5  # variable
    guess = truth + rng.normal(size=truth.shape) * np.linspace(0.1, 9, 120)
    each = np.array([corr(guess[:, i], truth[:, i]) for i in range(120)])
    assert NAMED["pcc_heg"].of(guess, truth) == pytest.approx(each[:50].mean())
    assert NAMED["pcc_hvg"].of(guess, truth) == pytest.approx(each[60:110].mean())
    truth[:, :50] = np.nan  # genes that this slide lacks
    assert NAMED["pcc_heg"].of(guess, truth) is not None
    assert all(figure.of(guess, np.full_like(truth, np.nan)) is None for figure in NAMED.values())
    assert all(figure.definition and figure.source for figure in NAMED.values())
    with pytest.raises(UsageError, match="no figure is called 'spearmen'; did you mean 'spearman'"):
        named("spearmen")


def test_gene_sets_are_judged_by_their_mean_z_score(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    path.write_text("ONE\tabout it\tA\tB\tA\tunknown\nTWO\t\tC\tA\n\nLONELY\t-\tB\tunknown\n")
    sets = read_gmt(path)
    assert sets["ONE"] == ("A", "B", "unknown")
    found = gene_set_pcc(GUESS, TRUTH, ["A", "B", "C"], sets)
    assert set(found) == {"ONE", "TWO"}  # one gene is no program

    def z(values: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = (values - values.mean()) / values.std()
        return scaled

    one = corr(z(GUESS[:, 0]) + z(GUESS[:, 1]), z(TRUTH[:, 0]) + z(TRUTH[:, 1]))
    assert found["ONE"] == pytest.approx(one)
    for text, words in (("X\tonly\n", "line 1: a name, a description and genes"), ("", "holds no gene sets")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_gmt(path)
    path.write_text("X\t\tA\tB\nX\t\tC\tA\n")
    with pytest.raises(UsageError, match="line 2: the set X stands twice"):
        read_gmt(path)
    with pytest.raises(UsageError, match="cannot be read as gene sets"):
        read_gmt(tmp_path / "absent.gmt")
