"""Coarse search: recall@10 against comparing every tile, and how much is read for it.

    python benchmarks/search_coarse.py [--tiles 1000000] [--dim 512] [--queries 100] [--slides 100]

Vectors about 300 kinds of tissue, drawn from 64 directions with some noise in all, of length 1; queries are tiles of
one slide, which is left out. The index is made for them whatever their number. Exact search is timed in the same run.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from search import asked_for

from nh2st_pipe.searching import coarse
from nh2st_pipe.searching.index import Index, IndexedSlide, Space
from nh2st_pipe.searching.scan import nearest_tiles


def main() -> None:
    given = asked_for(__doc__)
    coarse.EXACT_UP_TO = 0
    rng = np.random.default_rng(0)
    ways = rng.standard_normal((64, given.dim))
    kinds = rng.standard_normal((300, 64)) @ ways
    with tempfile.TemporaryDirectory() as name:
        folder, slides, each = Path(name), dict[str, IndexedSlide](), given.tiles // given.slides
        for number in range(given.slides):
            about = rng.standard_normal((each, 64)) @ ways
            values = kinds[rng.integers(300, size=each)] + 0.6 * about + 2 * rng.standard_normal((each, given.dim))
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            np.save(folder / f"s{number}.npy", values.astype(np.float16))
            slides[f"s{number}"] = IndexedSlide(f"s{number}", "", each, given.dim, folder / f"s{number}.npy", "x")
        space = Space(np.zeros(given.dim, np.float32), np.zeros((0, given.dim), np.float32))
        began = time.perf_counter()
        made = coarse.coarse_of(Index(folder, space, slides))
        assert made is not None
        print(f"made in {time.perf_counter() - began:.0f} s, {(folder / 'coarse.faiss').stat().st_size / 1e6:.0f} MB")
        queries, others = np.array(slides["s0"].vectors()[: given.queries]), list(slides.values())[1:]
        began = time.perf_counter()
        exact = nearest_tiles(queries, others, 10)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        found = made.nearest(queries, others, 10)
        took = time.perf_counter() - began
        shared = [len({hit[1:] for hit in a} & {hit[1:] for hit in b}) / 10 for a, b in zip(found, exact, strict=True)]
        print(f"recall@10 {np.mean(shared):.3f}; {coarse._COMPARED:,} vectors a query are read of {given.tiles:,}, "
              f"codes of {coarse._LOOKED_AT:.0%} of the cells")  # fmt: skip
        print(f"{given.queries} queries: {took:.2f} s, every tile compared {whole:.2f} s")


if __name__ == "__main__":
    main()
