"""Several at a time, in order, no further ahead than is needed, and not at all when nobody asks for more."""

from __future__ import annotations

import threading
import time

import pytest

from nh2st_pipe.core.pool import in_order


def test_results_are_in_order_and_several_are_made_at_once() -> None:
    meeting = threading.Barrier(3)

    def work(number: int) -> int:
        meeting.wait(10)
        time.sleep(0.01 * (3 - number % 3))
        return number * 2

    assert list(in_order(work, range(9), 3)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_no_more_is_begun_than_is_soon_needed() -> None:
    begun = list[int]()
    results = in_order(lambda number: begun.append(number), range(1000), 2)
    next(results)
    results.close()
    assert 1 <= len(begun) <= 6


def test_what_is_raised_comes_in_its_place_and_ends_the_rest() -> None:
    begun = list[int]()

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    results = in_order(work, range(1000), 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 10
