from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.targets import TargetsOf, targets
from nh2st_pipe.recipes.train import TargetRecipe, as_kept, load_train_recipe
from tests.conftest import slide


def test_targets_by_hand() -> None:
    data = slide(counts=[[1, 3, 6], [0, 0, 5]], array_row=np.array([0, 1]), array_col=np.array([0, 1]))
    panel = targets(data, ["b", "a"], TargetRecipe(smooth="none", scale_over="panel"))
    assert panel.values[0] == pytest.approx(np.log10([3 / 4 * 1e4 + 1, 1 / 4 * 1e4 + 1]))
    assert panel.values[1].tolist() == [0, 0]  # no counts in the panel
    assert panel.depth.tolist() == [10, 5]  # of all genes, whatever is scaled over
    raw = targets(data, ["b", "a"], TargetRecipe(smooth="none")).values
    assert raw[0] == pytest.approx(np.log10([3 / 10 * 1e4 + 1, 1 / 10 * 1e4 + 1]))
    smooth = targets(data, ["b", "a"], TargetRecipe()).values
    assert smooth == pytest.approx(np.tile(raw.mean(0), (2, 1)))
    assert targets(data, ["c"], TargetRecipe(smooth="none", log="none", scale_to=None)).values.ravel().tolist() == [
        6,
        5,
    ]
    assert targets(data, ["c"], TargetRecipe(smooth="none", log="log1p", scale_to=None)).values[0, 0] == pytest.approx(
        np.log(7)
    )


def test_smoothing_takes_the_eight_grid_neighbours() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:5, :5])
    counts = np.zeros((25, 1))
    counts[12] = 9
    data = slide(counts=counts, genes=["a"], array_row=rows, array_col=cols)
    got = targets(data, ["a"], TargetRecipe(scale_to=None, log="none")).values.reshape(5, 5)
    assert got[2, 2] == got[1, 1] == got[3, 2] == pytest.approx(1)
    assert got[0].sum() == 0
    corner = slide(counts=[[4], [0]], genes=["a"], array_row=np.array([0, 2]), array_col=np.array([0, 0]))
    assert targets(corner, ["a"], TargetRecipe(scale_to=None, log="none")).values.ravel().tolist() == [4, 0]


def test_smoothing_without_a_grid_says_what_to_do() -> None:
    with pytest.raises(TrainError, match=r"slide s has no array_row.*targets\.smooth=none"):
        targets(slide(array_row=None), ["a"], TargetRecipe())


def test_a_gene_that_is_missing_is_nan_not_zero() -> None:
    got = targets(slide(), ["a", "missing", "b"], TargetRecipe()).values
    assert np.isnan(got[:, 1]).all()
    assert np.isfinite(got[:, [0, 2]]).all()


def test_genes_do_not_depend_on_which_others_are_predicted_or_measured() -> None:
    """Scaled over all counts a gene is the same in every panel; over those in common, on every slide."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(5, (9, 3))
    whole = slide(counts=counts)
    alone = targets(whole, ["a"], TargetRecipe(smooth="none")).values
    assert np.array_equal(alone, targets(whole, ["c", "a"], TargetRecipe(smooth="none")).values[:, 1:])
    lacks = slide("t", counts=counts[:, 1:], genes=["b", "c"])  # the same tissue, of which a was not measured
    for data in (whole, lacks):
        made = targets(data, ["b"], TargetRecipe(smooth="none"), ["b", "c"])
        assert made.values == pytest.approx(np.log10(counts[:, [1]] / counts[:, 1:].sum(1, keepdims=True) * 1e4 + 1))
        assert made.depth.tolist() == counts[:, 1:].sum(1).tolist()
    with pytest.raises(TrainError, match="none of the 1 genes that counts are scaled over"):
        targets(lacks, ["b"], TargetRecipe(smooth="none"), ["a"])
    for recipe in (TargetRecipe(smooth="none", scale_over="panel"), TargetRecipe(smooth="none", scale_to=None)):
        made = targets(lacks, ["b"], recipe, ["a"])  # nothing is scaled over them
        assert made.depth.tolist() == counts[:, 1:].sum(1).tolist()


def test_the_protocol_says_over_which_counts_is_scaled() -> None:
    assert load_train_recipe("nh2st").targets.scale_over == "all"
    assert load_train_recipe("nh2st", ["protocol=paper"]).targets.scale_over == "panel"
    assert load_train_recipe("nh2st", ["protocol=paper", "targets.scale_over=all"]).targets.scale_over == "all"
    assert "over the panel" in load_train_recipe("nh2st", ["protocol=paper"]).targets.unit()
    assert TargetRecipe.model_validate(as_kept({"genes": 3})).scale_over == "panel"  # of versions that did not say


@pytest.mark.parametrize("over", ["all", "panel"])
def test_targets_of_some_genes_are_those_of_all(over: str) -> None:
    rng = np.random.default_rng(0)
    data = slide(counts=rng.poisson(2, (12, 6)), genes=list("abcdef"))
    recipe = TargetRecipe(scale_over=over)
    panel = ["f", "a", "z", "c", "d"]  # z is not measured
    whole, made = targets(data, panel, recipe), TargetsOf(data, panel, recipe)
    for genes in (slice(0, 2), slice(2, 3), slice(2, 5), slice(0, 5)):
        assert np.array_equal(made.values(genes), whole.values[:, genes], equal_nan=True)
        assert np.array_equal(made.made(genes).raw, whole.raw[:, genes], equal_nan=True)
    assert np.array_equal(made.depth, whole.depth)
