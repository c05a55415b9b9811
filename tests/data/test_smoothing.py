from __future__ import annotations

import numpy as np

from nh2st_pipe.data.smoothing import grid_mean


def test_a_square_grids_mean_is_over_three_by_three() -> None:
    rows, columns = (axis.ravel() for axis in np.mgrid[:5, :5])
    grid = np.column_stack((rows, columns))
    mean = grid_mean(grid).toarray()
    near = np.abs(grid[:, None] - grid[None]).max(axis=2) <= 1
    assert np.allclose(mean, near / near.sum(axis=1, keepdims=True))


def test_on_visiums_grid_the_mean_is_over_the_six_that_touch_a_spot() -> None:
    rows, columns = (axis.ravel() for axis in np.mgrid[:7, :7])
    columns = 2 * columns + rows % 2
    grid = np.column_stack((rows, columns))
    xy = np.column_stack((columns / 2, rows * np.sqrt(3) / 2))  # pitch 1
    near = np.linalg.norm(xy[:, None] - xy[None], axis=2) < 1.01
    assert near.sum(axis=1).max() == 7
    assert np.allclose(grid_mean(grid).toarray(), near / near.sum(axis=1, keepdims=True))
