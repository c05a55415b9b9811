"""Tables: a row a tile with a column a gene, and a row for each tile and gene; units stand in the header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["write"]

_MOST_LONG = 5_000_000  # rows; beyond, a table of them is of no use to anyone
_NAMES = {"": "", "low": " low", "high": " high", "spread": " spread", "target": " measured"}


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write the wide table to `path`, the long one beside it. Returns notices."""
    layers = ["", *view.layers]
    unit = view.unit or "unit not recorded"
    first: dict[str, Any] = {
        "slide_id": [view.slide_id] * len(view),
        "tile": view.barcodes,
        "x [level-0 px]": view.xy[:, 0],
        "y [level-0 px]": view.xy[:, 1],
    }
    if view.percentile is not None:
        first["unlike [% of training tiles nearer]"] = view.percentile
    if view.everything:
        first["tile unlike training"] = np.where(view.unlike, "yes", "no")
    with written_whole(path) as part, part.open("wb") as file:
        header = True
        for rows in view.parts():
            columns = {name: values[rows] for name, values in first.items()}
            for layer in layers:
                values = view.values(layer, tiles=rows)
                columns |= {f"{gene}{_NAMES[layer]} [{unit}]": values[:, i] for i, gene in enumerate(view.marked_genes)}
            pl.DataFrame(columns).fill_nan(None).write_csv(file, include_header=header)
            header = False
    if len(view) * len(view.columns) > _MOST_LONG:
        return [
            f"the long table would have {len(view) * len(view.columns):,} rows and is left out; --genes names fewer"
        ]
    with written_whole(path.with_name(path.name.removesuffix(".csv") + ".long.csv")) as part, part.open("wb") as file:
        header = True
        for rows in view.parts():
            n, g = len(view.barcodes[rows]), len(view.columns)
            of_tile = {name: np.repeat(np.asarray(values[rows]), g) for name, values in first.items()}
            genes = {"gene": view.genes * n}
            if view.everything:
                words = {True: "yes", False: "no", None: "not judged"}
                genes["gene trusted"] = [words[verdict] for verdict in view.trusted] * n
            values_of = {
                f"{_NAMES[layer].strip() or 'value'} [{unit}]": view.values(layer, tiles=rows).ravel()
                for layer in layers
            }
            pl.DataFrame({**of_tile, **genes, **values_of}).fill_nan(None).write_csv(file, include_header=header)
            header = False
    return []
