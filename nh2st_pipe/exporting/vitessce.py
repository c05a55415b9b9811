"""Vitessce: a configuration, the tiles' values as AnnData-Zarr, and the thumbnail as OME-Zarr, in one folder a slide.

What its viewer can read decides the format: Zarr v2, float32, dense, a chunk a gene; places in the picture's px.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray

from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.core.whole import folder_whole
from nh2st_pipe.exporting.run import ExportOptions, file_name
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["write"]

_VERSION = "1.0.17"  # of the configuration
_VALUES, _PICTURE, _CONFIG = "predicted.zarr", "picture.ome.zarr", "vitessce.json"
_OF = {"obsType": "tile", "featureType": "gene", "featureValueType": "expression"}
_CHUNK_PX = 512


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide. Returns notices."""
    base = f"{options.base_url.rstrip('/')}/{quote(file_name(view.slide_id))}.vitessce"
    with quiet_warnings(), folder_whole(path) as part:
        part.mkdir(parents=True)
        _write_values(view, part / _VALUES)
        if view.picture is not None:
            _write_picture(view.picture, view, part / _PICTURE)
        config = json.dumps(_config(view, base), indent=2, ensure_ascii=False)
        (part / _CONFIG).write_text(f"{config}\n", encoding="utf-8")
    return [
        f"to look at it, serve {path.parent} at {options.base_url} with CORS (npx http-server --cors -p 8080 "
        f"{path.parent}), and open https://vitessce.io/#?url={options.base_url.rstrip('/')}/SLIDE.vitessce/{_CONFIG}"
    ]


def _write_values(view: PredictionView, path: Path) -> None:
    scale = view.scale if view.picture is not None else 1.0
    half = view.image.tile_px / 2
    corners = np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    obs = pd.DataFrame(index=pd.Index(view.barcodes, name="tile", dtype=object))
    unlike = np.where(view.unlike, "unlike the training tiles", "like the training tiles")
    obs["likeness"] = pd.Categorical(unlike)
    var = pd.DataFrame(index=pd.Index(view.marked_genes, name="gene", dtype=object))
    var["trusted"] = [verdict is True for verdict in view.trusted]
    parts: dict[str, Any] = {
        "obs": obs,
        "var": var,
        "obsm": {
            "spatial": (view.xy * scale).astype(np.float32),
            "segmentations": ((view.xy[:, None] + corners) * scale).astype(np.float32),
        },
        "uns": {"unit": view.unit, "about": view.label},
    }
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    with anndata.settings.override(zarr_write_format=2):
        for name, value in parts.items():
            write_elem(root, name, value)
    shape = len(view), len(view.columns)
    values: Any = root.create_array("X", shape=shape, chunks=(len(view), 1), dtype="float32", fill_value=np.nan)
    values.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for block in view.blocks():
        values[:, block] = view.values(of=block)
    zarr.consolidate_metadata(root.store, zarr_format=2)


def _write_picture(picture: NDArray[np.uint8], view: PredictionView, path: Path) -> None:
    """Write the thumbnail by NGFF 0.4."""
    channels = [
        {"label": label, "color": colour, "window": {"min": 0, "max": 255, "start": 0, "end": 255}, "active": True}
        for label, colour in (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    ]
    planes = np.moveaxis(picture, 2, 0)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    levels = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]}]
    multiscale: Any = {"version": "0.4", "name": view.slide_id, "axes": axes, "datasets": levels}
    omero: Any = {"channels": channels, "rdefs": {"model": "color"}}
    root.attrs.update({"multiscales": [multiscale], "omero": omero})
    chunks = (1, *(min(_CHUNK_PX, side) for side in planes.shape[1:]))
    array = root.create_array(
        "0",
        shape=planes.shape,
        chunks=chunks,
        dtype="uint8",
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )
    array[:] = planes


def _config(view: PredictionView, base: str) -> dict[str, Any]:
    files: list[dict[str, Any]] = [
        {
            "fileType": "anndata.zarr",
            "url": f"{base}/{_VALUES}",
            "coordinationValues": _OF,
            "options": {
                "obsFeatureMatrix": {"path": "X"},
                "obsLocations": {"path": "obsm/spatial"},
                "obsSegmentations": {"path": "obsm/segmentations"},
                "obsSets": [{"name": "Likeness to the training tiles", "path": "obs/likeness"}],
            },
        }
    ]
    if view.picture is not None:
        files.append({"fileType": "image.ome-zarr", "url": f"{base}/{_PICTURE}"})
    scopes = {"dataset": "A", **dict.fromkeys((*_OF, "featureSelection", "obsColorEncoding"), "A")}
    views = [
        ("spatial", scopes, (0, 0, 8, 12)),
        ("featureList", scopes, (8, 0, 4, 5)),
        ("obsSets", scopes, (8, 5, 4, 3)),
        ("layerController", {"dataset": "A"}, (8, 8, 4, 4)),
    ]
    return {
        "version": _VERSION,
        "name": f"{view.slide_id}: predicted expression",
        "description": view.label,
        "datasets": [{"uid": "A", "name": view.slide_id, "files": files}],
        "initStrategy": "auto",
        "coordinationSpace": {
            "dataset": {"A": "A"},
            **{kind: {"A": value} for kind, value in _OF.items()},
            "featureSelection": {"A": view.marked_genes[:1]},
            "obsColorEncoding": {"A": "geneSelection"},
        },
        "layout": [
            {"component": name, "coordinationScopes": of, **dict(zip("xywh", place, strict=True))}
            for name, of, place in views
        ],
    }
