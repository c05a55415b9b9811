from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.evaluation.intervals import LEVELS, Intervals, intervals, mean_interval, sketch


def groups_of(k: int, seed: int, n: int = 60, genes: int = 3) -> list[np.ndarray]:
    """Residuals of k groups, each with a spread of its own, as patients have."""
    rng = np.random.default_rng(seed)
    return [rng.lognormal(0, 0.5) * rng.standard_normal((n, genes)) for _ in range(k)]


def test_a_sketch_stands_for_its_residuals() -> None:
    off = np.random.default_rng(0).standard_normal((5000, 2))
    off[:, 1] = np.nan
    points = sketch(off)
    assert points.shape == (2, 200)
    assert np.median(points[0]) == pytest.approx(np.median(np.abs(off[:, 0])), abs=0.01)
    assert np.isnan(points[1]).all()


def test_half_widths_are_the_weighted_quantile_by_hand() -> None:
    """Four groups whose residuals are 1, 2, 3 and 4 everywhere, a fifth of all at infinity."""
    groups = [np.full((1, 200), value, np.float32) for value in (1.0, 2.0, 3.0, 4.0)]
    made = intervals("patient", groups, ["a"])
    assert (made.by, made.groups) == ("patient", 4)
    at = {level: (of.half_width["a"], of.promised) for level, of in made.levels.items()}
    # 0.5 × 5 / 4 of the residuals lie at or below 3; 0.8 takes all of them; above it nothing is promised.
    assert at == {"0.5": (3.0, True), "0.8": (4.0, True), "0.9": (4.0, False), "0.95": (4.0, False)}
    # Made of the other three at 0.5 (a quarter at infinity: two thirds of the rest): 3, 3, 2, 2.
    assert made.levels["0.5"].coverage == pytest.approx(2 / 4)
    assert made.levels["0.8"].coverage == pytest.approx(3 / 4)


def test_a_new_group_is_covered_as_promised_and_one_more_alike_than_its_spots_would_be() -> None:
    """Over many draws; a quantile of all spots, as if each was drawn alone, covers less."""
    covered, plain = dict.fromkeys(LEVELS, 0.0), 0.0
    draws = 200
    for seed in range(draws):
        *known, new = groups_of(10, seed, genes=1)
        made = intervals("patient", [sketch(each) for each in known], ["a"])
        for level in LEVELS:
            covered[level] += np.mean(np.abs(new) <= made.levels[f"{level:g}"].half_width["a"]) / draws
        plain += np.mean(np.abs(new) <= np.quantile(np.abs(np.concatenate(known)), 0.9)) / draws
    for level in (0.5, 0.8, 0.9):
        assert made.levels[f"{level:g}"].promised
        assert covered[level] > level - 0.02
    assert not made.levels["0.95"].promised
    assert plain < covered[0.9]


def test_genes_that_groups_lack_and_a_single_group() -> None:
    two = [np.full((2, 200), value, np.float32) for value in (1.0, 2.0)]
    two[1][1] = np.nan
    made = intervals("slide", two, ["a", "b"])
    assert made.levels["0.5"].half_width == {"a": 2.0, "b": 1.0}
    assert "c" not in made.levels["0.5"].half_width
    alone = intervals("slide", two[:1], ["a", "b"])
    assert alone.levels["0.5"].coverage is None
    assert alone.levels["0.8"].promised is False
    assert intervals("slide", [], []) == Intervals()


def test_the_interval_of_a_mean_over_groups() -> None:
    found = mean_interval({"p": [0.2, 0.4], "q": [0.5], "r": [0.1, float("nan")]})
    assert found is not None
    # Means 0.3, 0.5, 0.1: 0.3 ± 4.303 × 0.2 / √3.
    assert found == pytest.approx((0.3 - 0.4968, 0.3 + 0.4968), abs=1e-3)
    assert mean_interval({"p": [0.2, 0.4], "q": [float("nan")]}) is None
