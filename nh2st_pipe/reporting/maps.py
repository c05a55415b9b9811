"""True and predicted maps of a run's slides, packed for the page.

Truth and prediction are kept as one byte per spot and gene, zlib-compressed, base64: slide by slide, predicted behind
true, gene after gene. A byte q stands for lo + q / levels · (hi − lo) of its gene on that slide; 255 is a spot without
a value. PCCs are computed here, from the values as they are in the run.
"""

from __future__ import annotations

import base64
import io
import math
import zlib
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.evaluation.metrics import gene_metrics

__all__ = ["slide_maps"]

_NO_VALUE = 255

_FINE, _COARSE = 254, 62

_FINE_UP_TO = 6_000_000  # values; beyond that, 63 steps instead of 255 keep the page below 15 MB

_MOST_VALUES = 16_000_000  # values; beyond that, maps are kept of the best predicted genes alone

_FEWEST_GENES = 20

_THUMBNAIL_PX = 600


def slide_maps(folder: Path, genes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the maps of every prediction in `folder`; genes not in the table are added to it."""
    files = sorted(folder.glob("*.h5ad"))
    place = {name: i for i, name in enumerate(genes["names"])}
    shapes = [_shape(file) for file in files]
    spots = sum(n for n, _ in shapes)
    values = 2 * sum(n * g for n, g in shapes)
    most = None if values <= _MOST_VALUES else max(_FEWEST_GENES, _MOST_VALUES // (2 * spots))
    levels = _FINE if values <= _FINE_UP_TO else _COARSE
    slides = []
    for file in files:
        data = _read(file)
        names = [str(name) for name in data.var_names]
        for name in names:
            if name not in place:
                place[name] = len(place)
                genes["names"].append(name)
                for column in (genes["mean"], genes["folds"], genes["half"], *genes["pcc"]):
                    column.append(None)
        index = np.array([place[name] for name in names], dtype=np.int64)
        # per_gene.csv is sorted by PCC, so a low place in the table is a well predicted gene.
        kept = np.argsort(index)[:most]
        slides.append(_slide(file, data, index, kept, levels))
    return slides


def _read(file: Path, *, backed: bool = False) -> anndata.AnnData:
    """Read a prediction; `backed` leaves its values in the file."""
    try:
        with quiet_warnings():
            return anndata.read_h5ad(file, backed="r" if backed else None)
    except Exception as error:  # whatever h5py or anndata make of a broken file
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"the predictions {file} cannot be read: {reason}") from error


def _shape(file: Path) -> tuple[int, int]:
    data = _read(file, backed=True)
    shape = int(data.n_obs), int(data.n_vars)
    data.file.close()
    return shape


def _slide(
    file: Path, data: anndata.AnnData, index: NDArray[np.int64], kept: NDArray[np.int64], levels: int
) -> dict[str, Any]:
    """Return one slide: thumbnail, spots in thumbnail px, and the values of the genes at `kept`.

    `index` is the place in the gene table of each of the slide's genes.
    """
    about = data.uns.get("nh2st_pipe", {})
    slide_id = str(about.get("slide_id", file.stem))
    predicted = np.asarray(data.X, dtype=np.float32)
    target = (
        np.asarray(data.layers["target"], np.float32) if "target" in data.layers else np.full_like(predicted, np.nan)
    )
    xy = np.asarray(data.obsm["spatial"], dtype=np.float64)
    view = _background(data, slide_id, xy)
    pcc = gene_metrics(predicted, target)["pcc"]
    low, high, packed = _pack(target[:, kept], predicted[:, kept], levels)
    return {
        "id": slide_id,
        "patient": str(about.get("patient", "")),
        "fold": str(about.get("fold", "")),
        "n": len(xy),
        **view,
        "panel": index.tolist(),
        "genes": index[kept].tolist(),
        "pcc": [round(float(v), 4) if np.isfinite(v) else None for v in pcc[kept]],
        "measured": np.isfinite(target[:, kept]).any(axis=0).tolist(),
        "low": low,
        "high": high,
        "levels": levels,
        "values": packed,
    }


def _background(data: anndata.AnnData, slide_id: str, xy: NDArray[np.float64]) -> dict[str, Any]:
    """Return what maps are drawn on: the thumbnail around the spots (`image`, a data URI, None where the run has
    none), its width and height, and in its px the spots' x, y and radius.
    """
    spatial = data.uns.get("spatial", {})
    section: dict[str, Any] = spatial.get(slide_id) or next(iter(spatial.values()), {})
    images = section.get("images", {})
    which = "hires" if "hires" in images else "lowres"  # runs of earlier versions have this one
    picture = images.get(which)
    factors = section.get("scalefactors", {})
    step = float(np.median(cKDTree(xy).query(xy, k=[2])[0])) if len(xy) > 1 else 0.0
    diameter = float(factors.get("spot_diameter_fullres", 0.0)) or step or 1.0
    # Spots may touch and never overlap.
    radius = 0.48 * min(diameter, step or diameter)
    margin = 2.0 * max(step, diameter)
    low, high = xy.min(axis=0) - margin, xy.max(axis=0) + margin
    if picture is None:
        image, scale = None, _THUMBNAIL_PX / float((high - low).max())
        width, height = (math.ceil(side * scale) for side in high - low)
    else:
        pixels = np.asarray(picture)
        if pixels.dtype.kind == "f":  # scanpy's own thumbnails are 0..1
            pixels = np.rint(pixels * 255)
        whole = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
        scale = float(factors.get(f"tissue_{which}_scalef", 1.0))
        left, top = (max(0, math.floor(place * scale)) for place in low)
        right, bottom = (min(side, math.ceil(place * scale)) for place, side in zip(high, whole.size, strict=True))
        if right <= left or bottom <= top:
            raise RunError(f"the spots of slide {slide_id} are not on its thumbnail, in the run's predictions")
        cut = whole.crop((left, top, right, bottom))
        cut.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        low = np.array((left, top)) / scale
        scale *= cut.width / (right - left)
        width, height = cut.size
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=82, optimize=True)
        image = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    x, y = ((xy - low) * scale).round(1).T.tolist()
    return {"image": image, "width": width, "height": height, "x": x, "y": y, "radius": round(radius * scale, 2)}


def _pack(
    target: NDArray[np.float32], predicted: NDArray[np.float32], levels: int
) -> tuple[list[float], list[float], str]:
    """Return the lowest and highest value of each gene over both n × G arrays, and both as bytes (see above)."""
    both = np.stack((target, predicted)).astype(np.float64)
    seen = np.isfinite(both)
    any_seen = seen.any(axis=(0, 1))
    low = np.where(any_seen, np.where(seen, both, np.inf).min(axis=(0, 1), initial=np.inf), 0.0)
    high = np.where(any_seen, np.where(seen, both, -np.inf).max(axis=(0, 1), initial=-np.inf), 0.0)
    spread = np.where(high > low, high - low, 1.0)
    steps = np.rint((np.where(seen, both, low) - low) / spread * levels)
    steps[~seen] = _NO_VALUE
    raw = np.ascontiguousarray(steps.transpose(0, 2, 1).astype(np.uint8)).tobytes()
    packed = base64.b64encode(zlib.compress(raw, 9)).decode("ascii")
    return [float(f"{v:.6g}") for v in low], [float(f"{v:.6g}") for v in high], packed
