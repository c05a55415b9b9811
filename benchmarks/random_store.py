"""A store of random embeddings and counts, on a square grid of spots, for the benchmarks to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import scipy.sparse as sp

from nh2st_pipe.store.format import Contract, ImageSource, ManifestRow, Picture, Resolved, WeightsOf
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots


def make_store(path: Path, sizes: list[int], dim: int, views: Literal[1, 8], genes: int, rate: float = 1.0) -> None:
    """Write a slide of each of `sizes` spots, each of a patient of its own; counts are `rate` on average."""
    rng = np.random.default_rng(0)
    contract = Contract(
        encoder={"name": "random", "dim": dim},
        identity={"name": "random", "dim": dim},
        weights=WeightsOf(sha256="none", source="random"),
        precision="float32",
        tile={"size_um": 112.0, "size_level0_px": None},
        views=views,
    )
    store = StoreWriter(path, contract)
    for i, size in enumerate(sizes):
        side = int(np.ceil(np.sqrt(size)))
        rows, cols = (axis.ravel()[:size] for axis in np.mgrid[:side, :side])
        counts = sp.csr_matrix(rng.poisson(rate, (size, genes)).astype(np.float64))
        names, xy = [f"b{j}" for j in range(size)], np.column_stack((cols, rows)) * 200.0
        spots = Spots(names, xy, rows, cols, counts, [f"g{j}" for j in range(genes)])
        resolved = Resolved(width=side * 200, height=side * 200, mpp=0.5, tile_level0_px=224)
        row = ManifestRow(slide_id=f"s{i}", slide=f"s{i}.tif", patient=f"p{i}")
        writer = store.slide(row, ImageSource(image=f"1-{i}"), spots, resolved, f"1-{i}")
        for start in range(0, size, 256):
            n = min(256, size - start)
            writer.append(rng.standard_normal((n, views, dim), np.float32).astype(np.float16))
        writer.finish(*nearest_spots(xy, 9), np.zeros((8, 8, 3), np.uint8), Picture(scale=0.01, spot_px=100))
