from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.evaluation.intervals import LEVELS, Intervals, intervals, joined_sketch, sketch


def units_of(k: int, seed: int, n: int = 60, genes: int = 3, apart: float = 0.5) -> list[np.ndarray]:
    """Residuals of k units, each with a spread of its own, as patients have."""
    rng = np.random.default_rng(seed)
    return [rng.lognormal(0, apart) * rng.standard_normal((n, genes)) for _ in range(k)]


def test_a_sketch_stands_for_its_residuals() -> None:
    off = np.random.default_rng(0).standard_normal((5000, 3))
    off[:, 1] = np.nan
    off[7, 2] = np.nan  # one prediction that is not a number
    points = sketch(off)
    assert points.shape == (3, 200)
    assert np.median(points[0]) == pytest.approx(np.median(np.abs(off[:, 0])), abs=0.01)
    assert np.isnan(points[1]).all()
    assert np.median(points[2]) == pytest.approx(np.nanmedian(np.abs(off[:, 2])), abs=0.01)
    assert joined_sketch([points, points]) == pytest.approx(points, nan_ok=True, abs=0.2)


def test_half_widths_are_plain_quantiles_by_hand() -> None:
    """Four units whose residuals are 1, 2, 3 and 4 everywhere."""
    units = [np.full((1, 200), value, np.float32) for value in (1.0, 2.0, 3.0, 4.0)]
    made = intervals("patient", units, ["a"])
    assert (made.by, made.groups) == ("patient", 4)
    at = {level: (of.half_width["a"], of.promised) for level, of in made.levels.items()}
    # Above 4 of 5 not even a unit beyond all others would be covered often enough.
    assert at == {"0.5": (2.0, True), "0.8": (4.0, True), "0.9": (4.0, False), "0.95": (4.0, False)}
    # Made of the other three at 0.5: 3, 3, 2, 2, which cover the units of 1 and 2; the shortfall is none.
    assert made.levels["0.5"].coverage == pytest.approx(0.5)
    # At 0.8: 4, 4, 4, 3, which cover three quarters; of the shortfall of 0.05 four fifths are left with four units.
    assert made.levels["0.8"].coverage == pytest.approx(0.8 - 0.05 * 4 / 5)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_each_unit_is_left_out_as_if_the_others_were_all_there_is(k: int) -> None:
    units = [sketch(each) for each in units_of(k, seed=k, genes=4)]
    units[0][1] = np.nan  # a gene that one unit lacks
    made = intervals("slide", units, list("abcd"))
    for level in LEVELS:
        covered = []
        for i, own in enumerate(units):
            others = intervals("slide", units[:i] + units[i + 1 :], list("abcd")).levels[f"{level:g}"].half_width
            reached = [
                np.mean(points <= others[gene] + 1e-6)
                for gene, points in zip("abcd", own, strict=True)
                if np.isfinite(points).all() and gene in others
            ]
            covered.append(np.mean(reached))
        shortfall = (level - np.mean(covered)) * k / (k + 1)
        assert made.levels[f"{level:g}"].coverage == pytest.approx(level - shortfall, abs=2e-3)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9, 12, 20])
def test_no_interval_at_a_higher_level_is_narrower(k: int) -> None:
    for seed in range(20):
        made = intervals("slide", [sketch(each) for each in units_of(k, seed, apart=1.0)], list("abc"))
        for gene in "abc":
            widths = [made.levels[f"{level:g}"].half_width[gene] for level in LEVELS]
            assert widths == sorted(widths)
        assert [made.levels[f"{level:g}"].promised for level in LEVELS] == [
            level <= k / (k + 1) + 1e-9 for level in LEVELS
        ]


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [4, 9, 20])
def test_the_printed_coverage_is_that_of_the_intervals_which_are_delivered(k: int, apart: float) -> None:
    """Over 200 studies: what is printed, and what the very same intervals cover of units that nobody has seen."""
    true, printed = (dict.fromkeys(LEVELS, 0.0) for _ in range(2))
    draws = 200
    for seed in range(draws):
        made = intervals("patient", [sketch(each) for each in units_of(k, seed, genes=2, apart=apart)], ["a", "b"])
        new = np.abs(np.concatenate(units_of(30, 10_000 + seed, genes=2, apart=apart)))
        for level in LEVELS:
            of = made.levels[f"{level:g}"]
            assert of.coverage is not None
            true[level] += float(np.mean(new <= [of.half_width["a"], of.half_width["b"]])) / draws
            printed[level] += of.coverage / draws
    for level in LEVELS:
        assert printed[level] == pytest.approx(true[level], abs=0.03)


def test_genes_that_units_lack_and_a_single_unit() -> None:
    two = [np.full((3, 200), value, np.float32) for value in (1.0, 2.0)]
    two[1][1] = np.nan
    two[0][2] = two[1][2] = np.nan
    made = intervals("slide", two, ["a", "b", "c"])
    assert made.levels["0.5"].half_width == {"a": 1.0, "b": 1.0}
    assert made.levels["0.9"].half_width == {"a": 2.0, "b": 1.0}
    alone = intervals("slide", two[:1], ["a", "b", "c"])
    assert alone.levels["0.5"].coverage is None
    assert alone.levels["0.8"].promised is False
    assert intervals("slide", [], []) == Intervals()
