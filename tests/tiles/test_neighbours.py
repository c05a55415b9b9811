from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from nh2st_pipe.tiles.neighbours import nearest_spots

places = hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.floats(0, 200_000, width=32))


@given(xy=places, k=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_neighbours_are_those_of_a_full_search(xy: NDArray[np.float64], k: int) -> None:
    indices, distances = nearest_spots(xy, k)
    n = len(xy)
    assert indices.shape == distances.shape == (n, k)
    every = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    assert np.array_equal(indices[:, 0], np.arange(n))  # the spot itself first, twins or not
    found = min(n, k)
    assert np.allclose(distances[:, :found], np.sort(every, axis=1)[:, :found], rtol=1e-6)
    assert np.allclose(np.take_along_axis(every, indices[:, :found].astype(int), 1), distances[:, :found], rtol=1e-6)
    assert all(len(set(row[:found])) == found for row in indices.tolist())
    assert (indices[:, found:] == -1).all()
    assert np.isinf(distances[:, found:]).all()


def test_neighbours_on_a_fine_grid_far_from_the_origin() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:70, :70])
    xy = np.column_stack((cols, rows)) * 4.0 + 150_000
    indices, distances = nearest_spots(xy, 9)
    inner = 35 * 70 + 35
    assert distances[inner].tolist() == pytest.approx([0, 4, 4, 4, 4] + [4 * 2**0.5] * 4)
    assert set(indices[inner]) == {inner + dr * 70 + dc for dr in (-1, 0, 1) for dc in (-1, 0, 1)}


def test_of_equally_distant_spots_those_of_lower_index_come_first() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:12, :12])
    xy = np.column_stack((cols, rows)) * 8.0
    order = np.random.default_rng(0).permutation(len(xy))
    indices, distances = nearest_spots(xy[order], 13)
    every = np.linalg.norm(xy[order][:, None] - xy[order][None], axis=2)
    for spot in range(len(xy)):
        others = sorted((round(d, 6), j) for j, d in enumerate(every[spot]) if j != spot)
        assert indices[spot].tolist() == [spot, *(j for _, j in others[:12])]
    assert (distances[:, 1:] > 0).all()


def test_many_spots_at_one_place_still_begin_with_themselves() -> None:
    indices, _ = nearest_spots(np.zeros((60, 2)), 5)
    assert np.array_equal(indices[:, 0], np.arange(60))
