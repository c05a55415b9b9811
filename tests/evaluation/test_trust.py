"""Which genes are trusted, on data whose truth is known."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from nh2st_pipe.evaluation.judged import Judged
from nh2st_pipe.evaluation.trust import Trust, trust, trusted_p
from tests.evaluation.known import study


@pytest.mark.parametrize("slides", [3, 4, 8])
def test_of_maps_that_follow_nothing_hardly_any_is_trusted(slides: int) -> None:
    """Smooth maps, whose PCC is far from 0 by chance, over 20 seeds: of all genes that are named at most 5 %."""
    named = sum(sum(trust(study(seed, slides, 0.0, reach=5.0)).verdicts.values()) for seed in range(20))
    assert named <= 0.05 * 20 * 40


@pytest.mark.parametrize("slides", [4, 8])
def test_of_the_genes_that_are_trusted_one_of_twenty_at_most_follows_nothing(slides: int) -> None:
    tie = np.where(np.arange(40) < 20, 0.85, 0.0)
    wrong = right = 0
    for seed in range(20):
        for gene, yes in trust(study(seed, slides, tie, reach=5.0)).verdicts.items():
            follows = int(gene[1:]) < 20
            wrong, right = wrong + (yes and not follows), right + (yes and follows)
    assert right >= 0.7 * 20 * 20
    assert wrong <= 0.05 * (wrong + right)


def test_each_part_of_the_verdict_is_needed() -> None:
    """A spread over few units that is small by chance, a PCC that unrelated maps reach, one gene of many."""
    alike = np.array([[0.50], [0.51], [0.505]])
    assert trusted_p(alike, np.array([0.05]), 0.2) < 0.001
    assert trusted_p(alike, np.array([0.5]), 0.2) > 0.1, "maps without any tie reach this, however alike the three are"
    apart = np.array([[0.9], [0.1], [0.6]])
    assert trusted_p(apart, np.array([0.05]), 0.2) > 0.1, "the units differ, whatever the null's spread"
    assert trusted_p(alike, np.array([0.05]), 0.6) > 0.5
    rng = np.random.default_rng(0)
    names, null = tuple(f"g{i}" for i in range(400)), np.full(400, 0.05)
    at_the_bound = rng.normal(0.2, 0.1, (4, 400))
    slides = [
        Judged(f"s{i}", f"s{i}", "f", None, names, 9, row, row, row, row, np.empty(0, np.int64), null, None, None)
        for i, row in enumerate(at_the_bound)
    ]
    alone = (trusted_p(at_the_bound, np.full(400, 0.05), 0.2) <= 0.05).sum()
    assert alone > 8, "one in twenty by chance, each on its own"
    assert sum(trust(slides).verdicts.values()) <= 1


def test_what_is_above_0_and_below_the_useful_bound_is_not_trusted() -> None:
    slides = study(0, 12, 0.3, side=20)
    assert not any(trust(slides, bound=0.4).verdicts.values())
    assert sum(trust(slides, bound=0.05).verdicts.values()) > 20


def test_eighteen_thousand_genes_of_noise() -> None:
    rng = np.random.default_rng(0)
    p = trusted_p(rng.normal(0, 0.2, (4, 18_000)), np.full(18_000, 0.2), 0.2)
    from scipy.stats import false_discovery_control

    assert (false_discovery_control(p) <= 0.05).sum() == 0


def test_a_gene_on_fewer_than_three_units_is_not_judged() -> None:
    assert trust(study(0, 2, 0.9)).verdicts == {}
    assert trust([]) == Trust()
    slides = study(0, 3, 0.9, side=20)
    slides[0].pcc[0] = np.nan  # its truth does not vary on one slide
    found = trust(slides).verdicts
    assert "g0" not in found
    assert found["g1"] is True
    tiny = [replace(each, null_spread=each.null_spread * np.nan) for each in slides]  # too few spots for a null
    assert trust(tiny).verdicts == {}


def test_a_gene_that_the_rival_predicts_better_beyond_chance_is_not_trusted() -> None:
    ours, theirs = study(0, 8, 0.85, genes=4, side=20), study(0, 8, 0.85, genes=4, side=20)
    for mine, other in zip(ours, theirs, strict=True):
        other.pcc[:] = mine.pcc + np.array([0.05, -0.05, 0.05, 0.0])
    theirs[3].pcc[2] = ours[3].pcc[2] - 0.5  # better on seven of eight, and far worse on one
    found = found_all = trust(ours, theirs, rival_name="ridge-context")
    assert found.verdicts == {"g0": False, "g1": True, "g2": True, "g3": True}
    assert "ridge-context is not better beyond chance" in found.words()
    assert trust(ours, theirs[::-1], rival_name="ridge-context") == found_all, "joined by name, in whatever order"
    alone = trust(ours)
    assert all(alone.verdicts.values())
    assert "no baseline was there to hold them against" in alone.words()
    few = trust(ours[:4], theirs[:4], rival_name="ridge-context")
    assert all(few.verdicts.values())  # on four slides nothing is beyond chance


def test_many_genes_and_units_are_judged_in_bounded_time_and_memory() -> None:
    """A hundredth of what is promised (18,000 genes × 300 units in 30 s and 2 GB), a hundredth of it."""
    rng, genes, units = np.random.default_rng(0), 1800, 30
    names, null = tuple(f"g{i}" for i in range(genes)), np.full(genes, 0.1)
    values, none = rng.normal(0.4, 0.2, (2, units, genes)), np.empty(0, np.int64)
    ours, theirs = (
        [
            Judged(f"s{i}", f"s{i}", "f", None, names, 9, row, row, row, row, none, null, None, None)
            for i, row in enumerate(of)
        ]
        for of in values
    )
    tracemalloc.start()
    began = time.process_time()
    trust(ours, theirs, rival_name="x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 10
    assert peak < 500e6
