from __future__ import annotations

import pytest

from nh2st_pipe.encoders.batches import batch_that_fits, fitting
from nh2st_pipe.encoders.load import load_encoder
from nh2st_pipe.recipes.encoder import load_encoder_recipe

GB = 10**9


@pytest.mark.parametrize(
    ("of_tile", "free", "most", "tiles"),
    [
        (0.1, 80 * GB, 512, 256),  # 280 would fit twice, and more than 256 gain nothing
        (1.0, 80 * GB, 512, 16),  # 28 would fit twice
        (1.0, 80 * GB, 12, 8),  # no more than go through the encoder at once
        (9.0, 8 * GB, 512, 8),  # and fewer still are found when the memory runs out
        (0.0, 80 * GB, 64, 64),
    ],
)
def test_two_batches_fit_into_what_is_free(of_tile: float, free: int, most: int, tiles: int) -> None:
    begun = list[int]()

    def peak(n: int) -> int:
        begun.append(n)
        once = 3 * GB if len(begun) == 1 else 0  # a workspace that the first batch makes
        return 2 * GB + once + int(of_tile * GB * n)

    assert fitting(peak, free, most) == tiles


def test_a_cpu_takes_few() -> None:
    assert batch_that_fits(load_encoder(load_encoder_recipe("fake"), None), 8) == 8
