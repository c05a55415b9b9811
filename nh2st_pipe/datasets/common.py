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
from nh2st_pipe.core.whole import written_whole

__all__ = ["files_of", "write_section"]


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Return the files below `folder` that match, sorted, without hidden ones: macOS leaves `._A1.tsv.gz` beside
    `A1.tsv.gz` on disks of other systems.
    """
    found = (path for path in folder.glob(pattern) if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


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
    with written_whole(path) as part, quiet_warnings():
        data.write_h5ad(part, compression="gzip")
