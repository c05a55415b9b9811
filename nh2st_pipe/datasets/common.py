"""What every importer shares: writing a section as `.h5ad`, and the manifest beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.quiet import quiet_warnings

__all__ = ["estimate_mpp", "write_section"]


def write_section(
    path: Path,
    *,
    counts: sp.csr_matrix,
    barcodes: list[str],
    genes: list[str],
    xy_level0_px: NDArray[np.float64],
    array_row: NDArray[np.int64],
    array_col: NDArray[np.int64],
    uns: dict[str, Any],
) -> None:
    """Write one section: raw counts n × g, spot centres n × 2 (x, y) in full-resolution px, grid position."""
    obs = pd.DataFrame({"array_row": array_row, "array_col": array_col}, index=pd.Index(barcodes, name="barcode"))
    data = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="gene")))
    data.obsm["spatial"] = xy_level0_px
    data.uns.update(uns)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with quiet_warnings():
        data.write_h5ad(part, compression="gzip")
    part.replace(path)


def estimate_mpp(xy_level0_px: NDArray[np.float64], grid_xy: NDArray[np.float64], pitch_um: float) -> float:
    """Return µm per px from spots whose grid position is known: `pitch_um` over the fitted px per grid step."""
    steps = []
    for axis in (0, 1):
        grid = grid_xy[:, axis] - grid_xy[:, axis].mean()
        steps.append(abs(float(grid @ xy_level0_px[:, axis]) / float(grid @ grid)))
    return pitch_um / float(np.mean(steps))
