"""Whether two stores hold the same."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from nh2st_pipe.store.read import open_store

__all__ = ["same"]


def same(one: object, two: object, but: Collection[str] = ()) -> bool:
    """Whether two stores, folders or URLs, hold the same slides, those in `but` aside."""
    a, b = open_store(str(one)), open_store(str(two))
    if a.slides() != b.slides():
        return False
    for name in a.slides():
        if name in but:
            continue
        x, y = a.read(name), b.read(name)
        assert x.counts is not None
        assert y.counts is not None
        arrays = [(getattr(x, key), getattr(y, key)) for key in ("views", "neighbours", "xy", "stain_shift")]
        if not all(np.array_equal(left, right) for left, right in arrays) or x.barcodes != y.barcodes:
            return False
        if (x.counts - y.counts).count_nonzero():
            return False
    return True
