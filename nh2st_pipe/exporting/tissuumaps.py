"""TissUUmaps: a project (`.tmap`) that shows the tiles' values as markers on the slide, or on its thumbnail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nh2st_pipe.core.h5ad import write_h5ad
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.exporting.h5ad import adata_of
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView
from nh2st_pipe.store.write import as_png

__all__ = ["write"]


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide: the project, its markers, and the thumbnail where no manifest says where the slide is."""
    markers = path.with_name(f"{path.stem}.tissuumaps.h5ad")
    write_h5ad(adata_of(view), markers, compression="gzip", compression_opts=1)
    said, layers, factor = list[str](), list[dict[str, Any]](), 1.0
    slide = options.slides.get(view.slide_id)
    if slide is not None:
        shown = os.path.relpath(slide.resolve(), path.parent.resolve())
        layers.append({"name": slide.name, "tileSource": f"{Path(shown).as_posix()}.dzi"})
    elif view.picture is not None:
        picture = path.with_name(f"{path.stem}.tissuumaps.png")
        with written_whole(picture) as part:
            part.write_bytes(as_png(view.picture))
        layers.append({"name": f"{view.slide_id}, made smaller", "tileSource": f"{picture.name}.dzi"})
        factor = view.scale
        said.append("its TissUUmaps project shows the thumbnail; --slides manifest.csv shows the slide itself")
    with written_whole(path) as part:
        project = json.dumps(_project(view, markers.name, layers, factor), indent=2, ensure_ascii=False)
        part.write_text(f"{project}\n", encoding="utf-8")
    return said


def _project(view: PredictionView, markers: str, layers: list[dict[str, Any]], factor: float) -> dict[str, Any]:
    header = {
        "X": "/obsm/spatial;0",
        "Y": "/obsm/spatial;1",
        "cb_col": "",
        "cb_cmap": "interpolateViridis",
        "scale_factor": 1,
        "coord_factor": factor,
        "shape_fixed": "square",
        "opacity": "1",
        "edges_col": "",
        "collectionItem_col": "",
        "collectionItem_fixed": "0",
    }
    radios = {
        "cb_col": True,
        "cb_gr": False,
        "cb_gr_dict": False,
        "cb_gr_key": False,
        "cb_gr_rand": False,
        "pie_check": False,
        "scale_check": False,
        "shape_col": False,
        "shape_fixed": True,
        "shape_gr": False,
        "shape_gr_dict": False,
        "shape_gr_rand": False,
        "sortby_check": True,
        "collectionItem_col": False,
        "collectionItem_fixed": True,
    }
    options = [
        {
            "optionName": name,
            "name": name,
            "expectedHeader.cb_col": f"/X;{column}",
            "expectedHeader.sortby_col": f"/X;{column}",
            "expectedRadios.cb_col": True,
        }
        for column, name in enumerate(view.marked_genes)
    ]
    return {
        "filename": f"{view.slide_id}: {view.label}",
        "layers": layers,
        "layerOpacities": {"0": "1.0"},
        "markerFiles": [
            {
                "title": f"Predicted expression ({view.unit})",
                "name": "Predicted expression",
                "uid": "predicted",
                "path": markers,
                "hideSettings": True,
                "expectedHeader": header,
                "expectedRadios": radios,
                "dropdownOptions": options,
            }
        ],
        "regionFiles": [],
        "plugins": [],
        "collectionMode": True,
    }
