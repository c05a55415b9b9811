"""Statements about figures, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test

from nh2st_pipe.evaluation.compare import in_words
from nh2st_pipe.evaluation.judged import SlideFigures, judge, units_of
from nh2st_pipe.evaluation.statistics import (
    figures_from,
    gene_figures,
    gene_pcc,
    headline,
    mean_interval,
    sign_flip,
    summary,
    verdict,
)
from tests.evaluation.known import grid, study


def test_the_interval_of_a_mean_is_students() -> None:
    # Means 0.3, 0.5, 0.1: 0.3 ± 4.303 × 0.2 / √3.
    assert mean_interval([0.3, 0.5, np.nan, 0.1]) == pytest.approx((0.3 - 0.4968, 0.3 + 0.4968), abs=1e-3)
    assert mean_interval([0.3, np.nan]) is None


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_it_covers_the_mean_as_often_as_it_says(k: int) -> None:
    rng = np.random.default_rng(k)
    covered = 0
    for _ in range(2000):
        low, high = mean_interval(rng.normal(0.4, 0.1, k)) or (0, 0)
        covered += low <= 0.4 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("k", [2, 5, 8])
def test_the_sign_flip_test_is_scipys_for_all_genes_at_once(k: int) -> None:
    differences = np.random.default_rng(k).normal(0.3, 1.0, (k, 6))
    differences[:, 5] = 0.0
    found = sign_flip(differences)
    for i, p in enumerate(found):
        there = permutation_test((differences[:, i],), np.mean, permutation_type="samples", vectorized=False)
        assert p == pytest.approx(there.pvalue)
    assert found[5] == 1.0
    unknown = differences.copy()
    unknown[0, 0] = np.nan  # takes no part
    assert sign_flip(unknown)[0] == pytest.approx(sign_flip(differences[1:, :1])[0])


def test_of_many_units_signs_are_drawn() -> None:
    differences = np.random.default_rng(0).normal(0.25, 1.0, (40, 3))
    assert np.array_equal(sign_flip(differences), sign_flip(differences))
    for p, values in zip(sign_flip(differences), differences.T, strict=True):
        z = values.sum() / np.sqrt((values**2).sum())
        from scipy.stats import norm

        assert p == pytest.approx(2 * norm.sf(abs(z)), abs=0.02)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 8, 12])
def test_better_is_said_by_chance_in_one_of_twenty_cases_at_most_and_never_with_few_units(k: int) -> None:
    rng, draws = np.random.default_rng(k), 1000
    sides = [verdict(rng.standard_t(4, k)).side for _ in range(draws)]  # no difference, with heavy tails
    said = sum(side in ("more", "less") for side in sides) / draws
    assert said <= 0.055
    sure = verdict(np.full(k, 0.3) + rng.normal(0, 0.01, k))
    if k < 6:
        assert said == 0
        assert sure.side == "few"
        assert in_words(sure, "slide") == f"behind on {k} of {k} slides; too few to rule out chance"
    else:
        assert said > 0
        assert (sure.side, in_words(sure, "slide")) == ("more", "worse")


def test_a_verdict_says_what_it_rests_on() -> None:
    found = verdict(np.array([0.1, -0.2, np.nan, 0.4, 0.0]))
    assert (found.units, found.ahead, found.behind) == (4, 2, 1)
    assert found.mean == pytest.approx(0.075)
    assert in_words(verdict(np.array([-0.1, -0.2, 0.1])), "patient") == (
        "ahead on 2 of 3 patients; too few to rule out chance"
    )
    assert verdict(np.array([np.nan])).side == "undefined"
    assert verdict(np.array([0.1, -0.1] * 4)).side == "unclear"
    assert verdict(np.array([0.4])).low is None


def test_units_are_patients_slides_or_blocks_as_they_are() -> None:
    def of(*places: tuple[str, str, int | None]) -> tuple[str, int]:
        unit, units = units_of([SlideFigures(slide, patient, block=block) for slide, patient, block in places])
        return unit, len(set(units))

    assert of(("a1", "A", None), ("a2", "A", None), ("b1", "B", None)) == ("patient", 2)
    assert of(("a", "a", None), ("b", "b", None)) == ("slide", 2)  # none was told: a slide's own name stands in
    assert of(("a1", "A", None), ("a2", "A", None)) == ("slide", 2)
    assert of(("a", "a", 1), ("a", "a", 2)) == ("block", 2)
    assert of(("a", "A", 1), ("a", "A", 2), ("b", "A", 1), ("b", "A", 2)) == ("slide", 2)
    assert of(("a", "A", None)) == ("slide", 1)


def test_slides_of_a_unit_are_averaged_first() -> None:
    rows = [SlideFigures(f"s{i}", "AAB"[i], pcc=value, n_spots=10) for i, value in enumerate((0.2, 0.4, 0.9))]
    made = summary(rows, 3.0)
    assert made is not None
    assert (made["unit"], made["n_units"], made["n_spots"], made["train_seconds"]) == ("patient", 2, 30, 3.0)
    assert made["pcc"] == pytest.approx(0.6)
    assert made["pcc_low"] == -1.0  # 0.6 ± 12.7 × 0.3: no PCC lies there
    assert summary([]) is None


def test_a_gene_is_averaged_over_slides_and_never_over_their_spots() -> None:
    """On both slides predictions run against the truth; with all spots together they would follow it."""
    ramp = np.repeat(np.arange(9.0)[:, None], 2, 1).astype(np.float32)
    slides = [
        judge(level - ramp, level + ramp, grid(3), slide_id=name, patient=name, genes=("a", "b"))
        for name, level in (("s0", 0.0), ("s1", 100.0))
    ]
    genes, units, matrix = gene_pcc(slides)
    assert units == ["s0", "s1"]
    assert genes == ["a", "b"]
    assert matrix == pytest.approx(np.full((2, 2), -1.0))
    assert [each.pcc for each in gene_figures(slides)] == pytest.approx([-1.0, -1.0])


def test_a_gene_that_a_slide_lacks_or_that_does_not_vary_there() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 25, 3)).astype(np.float32)
    truth[0, :, 0] = np.nan  # absent on one slide
    truth[1, :, 1], truth[:, :, 2] = 7.0, 5.0  # constant on one, on all
    slides = [
        judge(truth[i] + 0.1, truth[i], grid(5), slide_id=f"s{i}", patient=f"s{i}", genes="abc") for i in range(3)
    ]
    a, b, c = gene_figures(slides)
    assert (a.n_units, b.n_units, c.n_units) == (2, 2, 0)
    assert a.pcc == pytest.approx(1.0)
    assert a.target_mean == pytest.approx(truth[1:, :, 0].mean(), abs=1e-6)  # not NaN
    assert c.pcc is None
    assert c.target_mean == pytest.approx(5.0)
    made = summary([each.figures for each in slides])
    assert made is not None
    assert headline(made).endswith("over 1 to 2 genes a slide; 1 to 2 of 3 do not vary there")
    one = summary([slides[1].figures])
    assert one is not None
    assert headline(one) == "PCC 1.000 over 1 gene; 2 of 3 do not vary on these spots"


def test_a_headline_says_what_it_is_over() -> None:
    figures = {"pcc": 0.125, "n_genes": 250, "n_genes_pcc_undefined": 222}
    assert headline(figures) == "PCC 0.125 over 28 genes; 222 of 250 do not vary on these spots"
    assert headline({"pcc": None, "n_genes": 2}) == "PCC undefined over 2 genes"
    more = {**figures, "pcc_low": 0.1, "pcc_high": 0.2, "unit": "patient", "n_units": 4, "n_genes_pcc_undefined": 0}
    assert headline(more) == "PCC 0.125 (95 % interval 0.100 to 0.200, over 4 patients) over 250 genes"


def test_figures_by_slide_are_read_back_from_a_row() -> None:
    figures = study(0, 1, 0.5)[0].figures
    assert figures_from(vars(figures)) == figures
    assert figures_from({"slide_id": "s", "pcc": 0.5, "later": 1}) == SlideFigures("s", "s", pcc=0.5)
