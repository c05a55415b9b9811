from __future__ import annotations

import numpy as np
import pytest

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.targets import targets
from nh2st_pipe.recipes.train import TargetRecipe
from tests.conftest import slide


def test_targets_by_hand() -> None:
    data = slide(counts=[[1, 3, 6], [0, 0, 5]], array_row=np.array([0, 1]), array_col=np.array([0, 1]))
    raw = targets(data, ["b", "a"], TargetRecipe(smooth="none")).values
    assert raw[0] == pytest.approx(np.log10([3 / 4 * 1e4 + 1, 1 / 4 * 1e4 + 1]))
    assert raw[1].tolist() == [0, 0]  # no counts in the panel
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
