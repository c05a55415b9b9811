"""Exact search: a batch of queries held against a million tiles.

    python benchmarks/search.py [--tiles 1000000] [--dim 512] [--queries 100] [--slides 100]

An index of random vectors on the disk, read through once before. Beside it, reading the same bytes and nothing else,
and multiplying as large matrices in float32: what the machine needs at least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nh2st_pipe.core.machine import peak
from nh2st_pipe.searching.index import IndexedSlide
from nh2st_pipe.searching.scan import nearest_tiles


def asked_for(doc: str | None) -> argparse.Namespace:
    """Return the numbers of tiles, values, queries and slides that were asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--slides", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    given = asked_for(__doc__)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        slides, each = list[IndexedSlide](), given.tiles // given.slides
        for number in range(given.slides):
            values = rng.normal(size=(each, given.dim)).astype(np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            file = Path(folder) / f"s{number}.npy"
            np.save(file, values.astype(np.float16))
            slides.append(IndexedSlide(f"s{number}", f"s{number}", each, given.dim, file))
        queries = np.array(slides[0].vectors()[: given.queries])
        block = torch.randn(65_536, given.dim)
        asked = torch.from_numpy(queries.astype(np.float32))
        began = time.perf_counter()
        for _ in range(given.tiles // len(block)):
            _ = asked @ block.T
        multiplying = time.perf_counter() - began
        before = peak()
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            found = nearest_tiles(queries, slides, 20)
            seconds.append(time.perf_counter() - began)
        assert all(hits[0][1:] == ("s0", number) for number, hits in enumerate(found))
        began = time.perf_counter()
        for slide in slides:
            slide.file.read_bytes()
        reading = time.perf_counter() - began
    print(
        f"{given.tiles:,} × {given.dim}, {given.queries} queries: {min(seconds):.2f} s; reading {reading:.2f} s, "
        f"multiplying {multiplying:.2f} s; {(peak() - before) / 2**20:,.0f} MB more than before"
    )


if __name__ == "__main__":
    main()
