from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.morphology import isotropic_closing, isotropic_dilation, isotropic_erosion, isotropic_opening

from nh2st_pipe.tiles.morphology import closed, dilated, eroded, opened

Change = Callable[[NDArray[np.bool_], int], NDArray[np.bool_]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dilated, isotropic_dilation),
        (eroded, isotropic_erosion),
        (opened, isotropic_opening),
        (closed, isotropic_closing),
    ],
)
@pytest.mark.parametrize("radius", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("shape", "share"), [((60, 43), 0.03), ((60, 43), 0.97), ((9, 70), 0.5), ((3, 4), 0.5)])
def test_masks_change_as_their_distances_say(
    ours: Change, theirs: Change, radius: int, shape: tuple[int, int], share: float
) -> None:
    mask = np.random.default_rng(0).random(shape) < share
    mask[0, 0], mask[1, 1] = True, False  # a distance is defined where there is both
    before = mask.copy()
    if ours in (opened, closed) and not 0 < (eroded if ours is opened else dilated)(mask, radius).mean() < 1:
        pytest.skip("scikit-image has no distance to nothing")
    assert np.array_equal(ours(mask, radius), theirs(mask, radius))
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("change", [dilated, eroded, opened, closed])
@pytest.mark.parametrize("value", [True, False])
def test_nothing_stays_nothing_and_everything_everything(change: Change, value: bool) -> None:
    mask = np.full((5, 7), value)
    assert np.array_equal(change(mask, 9), mask)
