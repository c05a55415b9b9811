"""SpaRED (Mejia et al. 2024): 26 datasets as one AnnData each, with the split that its benchmark uses.

    <dataset>/**/adata.h5ad or *.h5ad
      X                       raw counts, or layers["counts"]
      obs                     slide_id, split (train, val, test), patient, array_row, array_col
      var                     Ensembl's ids; gene_symbol beside them
      obsm["spatial"]         px of the slide's image at full resolution, x then y
      obsm["patches_scale_s"] n × 150,528: the square of s spot diameters around each spot, as 224 × 224 px of RGB
      uns["spatial"][slide_id]["scalefactors"]["spot_diameter_fullres"]

The slides themselves are not part of it. Each is put together from its patches, `images/<slide_id>.tif` beside
the manifest: what lies between them is white, and a tile of 224 px (--tile-px 224) is a patch as it was published.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata.io import read_elem
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, reason_of
from nh2st_pipe.core.h5ad import checked_matrix
from nh2st_pipe.core.hdf5 import opened_h5
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.datasets.common import PATCH, Found, Made, Section, files_of, put_together, whole_numbers

__all__ = ["find_spared"]

_SCALE = re.compile(r"patches_scale_([0-9.]+)")


def find_spared(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find the slides of all AnnData below `folder`. Raises ExpressionError where there is none."""
    found = dict[str, Found]()
    for file in files_of(folder, "**/*.h5ad"):
        try:
            with quiet_warnings(), opened_h5(file) as opened:
                key = next((key for key in opened.get("obsm", ()) if _SCALE.fullmatch(key)), None)
                obs = read_elem(opened["obs"])
        except Exception as error:  # whatever h5py or anndata make of a broken file
            say(f"{file} is left out: it cannot be read ({reason_of(error)})")
            continue
        if key is None or "slide_id" not in obs:
            say(f"{file} is left out: it has no {'obs slide_id' if key else 'obsm patches_scale_…'}")
            continue
        for slide_id, rows in obs.groupby("slide_id", observed=True).indices.items():
            name = str(slide_id)
            if name in found:
                say(f"slide {name} of {file} is passed over: there is another of this name")
                continue
            about = {column: _common(obs[column].iloc[rows]) for column in ("split", "patient") if column in obs}
            read = partial(_read, file, name, rows, key, about)
            found[name] = Found(name, read, {**about, "dataset": file.parent.name})
    if not found:
        raise ExpressionError(f"there is no AnnData of SpaRED (.h5ad with obsm patches_scale_…) in {folder}")
    return [found[name] for name in sorted(found)]


def _common(values: Any) -> str:
    """Return the one value of a slide's spots; empty where they differ."""
    names = {str(each) for each in values}
    return names.pop() if len(names) == 1 else ""


def _read(file: Path, name: str, rows: NDArray[np.int64], key: str, about: dict[str, str]) -> Section:
    with quiet_warnings(), opened_h5(file) as opened:  # one slide's patches at a time: all are tens of GB
        layers = opened.get("layers", {})
        where = "layers/counts" if "counts" in layers else "X"
        counts = checked_matrix(sp.csr_matrix(read_elem(opened[where])), where)[rows]
        obs, var, uns = read_elem(opened["obs"]).iloc[rows], read_elem(opened["var"]), read_elem(opened["uns"])
        places = (
            np.asarray(read_elem(opened["obsm/spatial"]), np.float64)[rows] if "spatial" in opened["obsm"] else None
        )
        patches = np.asarray(opened["obsm"][key][np.sort(rows)], np.uint8)[np.argsort(np.argsort(rows))]
    scale = _SCALE.fullmatch(key)
    assert scale is not None
    try:
        diameter = float(uns["spatial"][name]["scalefactors"]["spot_diameter_fullres"])
    except (KeyError, TypeError, ValueError) as error:
        raise ExpressionError(
            f"{file}: uns spatial {name} does not say spot_diameter_fullres: {reason_of(error)}"
        ) from error
    if patches.shape[1] != PATCH * PATCH * 3:
        raise ExpressionError(f"{file}: {key} has {patches.shape[1]:,} values a spot, and 224 × 224 × 3 are expected")
    side = int(diameter * float(scale.group(1)))  # as SpaRED cuts them
    if places is None or side < 1:
        raise ExpressionError(f"{file} has no obsm spatial, or a spot diameter of {diameter:g} px")
    xy = places * (PATCH / side)
    xy += PATCH - xy.min(0)
    squares = patches.reshape(-1, PATCH, PATCH, 3)
    image = Made(f"{name}.tif", partial(put_together, np.rint(xy).astype(np.int64), squares))
    symbols = "gene_symbol" if "gene_symbol" in var else None
    return Section(
        image=image,
        counts=counts,
        barcodes=[str(each) for each in obs.index],
        genes=[str(each) for each in (var[symbols] if symbols else var.index)],
        gene_ids=[str(each) for each in var.index] if symbols else None,
        xy=np.rint(xy),
        array_row=whole_numbers(obs["array_row"]) if "array_row" in obs else None,
        array_col=whole_numbers(obs["array_col"]) if "array_col" in obs else None,
        patient=about.get("patient") or name,
        notes=[f"{image.name} put together from its patches"],
        extra={"split": about["split"]} if about.get("split") else {},
    )
