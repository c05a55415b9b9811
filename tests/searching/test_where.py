"""Conditions: what they mean, tile by tile, and where one is not understood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.exporting.view import PredictionView, read_view
from nh2st_pipe.searching.where import Where
from tests.exporting.made import genes_of, prediction

GENES = [*genes_of(3), "HLA-A", "a b"]


@pytest.fixture
def made(tmp_path: Path) -> tuple[PredictionView, NDArray[np.float32]]:
    trusted = {gene: gene != "G1" for gene in GENES}
    values = prediction(tmp_path / "p.h5ad", genes=GENES, trusted=trusted, unlike=(3,), nan=((0, 0),))
    return read_view(tmp_path / "p.h5ad"), values


def test_a_condition_holds_where_it_says(made: tuple[PredictionView, NDArray[np.float32]]) -> None:
    view, v = made
    percentile = np.asarray(view.percentile)
    known = np.isfinite(v[:, 0])
    expected = {
        "G0 > 1": v[:, 0] > 1,
        "G0>=1 and G2<1": (v[:, 0] >= 1) & (v[:, 2] < 1),
        "G0 > 1 or G2 < 1 and HLA-A <= 1": (v[:, 0] > 1) | ((v[:, 2] < 1) & (v[:, 3] <= 1)),
        "(G0 > 1 or G2 < 1) and not HLA-A <= 1": ((v[:, 0] > 1) | (v[:, 2] < 1)) & ~(v[:, 3] <= 1),
        "NOT unlike < 50": ~(percentile < 50),
        '"a b" > 1': v[:, 4] > 1,
        "low:G0 > 1": v[:, 0] - 0.25 > 1,
        "measured:G2 < 2": v[:, 2] + 1 < 2,
        'high:"a b" > 1.5': v[:, 4] + 0.25 > 1.5,
        "G0 > p50": v[:, 0] > np.percentile(v[known, 0], 50),
        "G0 > -1e3 and trusted": known,
        "G1 > -1e3 and trusted": np.zeros(16, bool),
        "trusted": np.ones(16, bool),
    }
    for text, mask in expected.items():
        where = Where(text)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(where.mask(view, where.bounds([view])), mask, err_msg=text)
    assert Where("G0 > 1 and unlike < 9 or low:G2 > p10").genes == ["G0", "G2"]


def test_a_percentile_is_over_all_tiles_that_are_searched(tmp_path: Path) -> None:
    values = [prediction(tmp_path / f"{seed}.h5ad", slide_id=f"s{seed}", seed=seed) for seed in range(2)]
    views = [read_view(tmp_path / f"{seed}.h5ad") for seed in range(2)]
    where = Where("G0 > p90")
    bounds = where.bounds(views)
    every = np.concatenate([each[:, 0] for each in values])
    assert list(bounds.values()) == pytest.approx([np.percentile(every, 90)])
    assert sum(int(where.mask(view, bounds).sum()) for view in views) == (every > np.percentile(every, 90)).sum()


def test_a_value_that_is_not_there_meets_nothing(tmp_path: Path) -> None:
    prediction(tmp_path / "p.h5ad", measured=False)
    view = read_view(tmp_path / "p.h5ad")
    for text in ("measured:G0 > -9", "NOTHERE > -9", "measured:G0 > p5"):
        where = Where(text)
        assert not where.mask(view, where.bounds([view])).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "says nothing"),
        ("G0 >", "a number or p90 is expected at the end"),
        ("G0 > x", "a number or p90 is expected at character 6 of 'G0 > x', where 'x' stands"),
        ("G0 > p101", "p0 to p100 is expected at character 6"),
        ("G0 > nan", "is expected at character 6"),
        ("G0 1", "one of > < >= <= is expected at character 4"),
        ("(G0 > 1", r"a \) is expected at the end"),
        ("G0 > 1)", "nothing more is expected at character 7"),
        ("G0 > 1 and", "a gene, unlike, trusted, not or .* is expected at the end"),
        ("and G0 > 1", "is expected at character 1"),
        ("G0 > 1 G1 < 2", "nothing more is expected at character 8"),
        ("G0 = 1", "'=' is not understood, at character 4"),
    ],
)
def test_where_it_is_not_understood_is_said(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Where(text)
