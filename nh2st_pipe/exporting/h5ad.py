"""AnnData: the chosen genes and tiles of a prediction, as it is kept otherwise."""

from __future__ import annotations

from pathlib import Path

import anndata

from nh2st_pipe.core.h5ad import write_h5ad
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["adata_of", "write"]


def adata_of(view: PredictionView) -> anndata.AnnData:
    """Return the chosen part of a prediction: X n × g, layers, obs, var, places, thumbnail, and what it is."""
    data = anndata.AnnData(view.values(), obs=view.obs.iloc[view.rows].copy(), var=view.var.iloc[view.columns].copy())
    for layer in view.layers:
        data.layers[layer] = view.values(layer)
    data.obsm["spatial"] = view.xy
    data.uns["nh2st_pipe"] = {**view.about, "unit": view.unit}
    if view.picture is not None:
        factors = {"tissue_hires_scalef": view.scale, "spot_diameter_fullres": view.spot_px or view.image.tile_px}
        data.uns["spatial"] = {view.slide_id: {"images": {"hires": view.picture}, "scalefactors": factors}}
    return data


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide. Returns notices."""
    write_h5ad(adata_of(view), path, compression="gzip", compression_opts=1)
    return []
