"""The slides of a report, packed for the page: where their spots lie, and what was measured and predicted there.

Values are kept as one byte per spot, gene and plane (measured, predicted, spread), zlib-compressed, base64: plane
behind plane, gene after gene. A byte q stands for lo + q / levels · (hi − lo) of its gene in that plane on that slide;
255 is a spot without a value. Measured and predicted share their range. How many levels there are, and whether maps are
kept of the best genes alone, follows from what the page may weigh. PCCs are computed here, from the values as they are
in the files.
"""

from __future__ import annotations

import base64
import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.evaluation.moran import morans_i
from nh2st_pipe.reporting.asked import Asked
from nh2st_pipe.reporting.crops import crops_of
from nh2st_pipe.reporting.domains import compared, domains_of
from nh2st_pipe.reporting.regions import Region, find_regions, means_of, read_regions
from nh2st_pipe.reporting.sets import PREFIX, GeneSet, score_of
from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["SlideMaps", "moran_columns", "packed", "read_slides"]

_NO_VALUE = 255
_LEVELS = (254, 127, 62, 30)
_MOST_BYTES = 9_500_000  # of all slides' values, packed; a third more as base64, and the page stays below 15 MB
_MOST_VALUES = 40_000_000  # of all slides; beyond that, maps are kept of the first genes of the table alone
_FEWEST_GENES = 20
_ROWS_AT_ONCE = 4096

_THUMBNAIL_PX, _SMALLEST_PX = 640, 96
_PICTURE_BYTES, _BYTES_PER_PX = 24_000_000, 0.3  # of all slides' thumbnails together, and what a px of one takes


@dataclass
class SlideMaps:
    """One slide's part of a report."""

    file: Path
    names: list[str]
    """All genes of the file."""
    var: dict[str, list[Any]]
    """What the file says of its genes, by column."""
    about: dict[str, Any]
    """Its uns["nh2st_pipe"]."""
    kept: NDArray[np.int64]
    """The genes, as places in `names`, of which maps are kept."""
    planes: dict[str, NDArray[np.uint8]]
    """genes × spots each, in 254 levels."""
    low: dict[str, NDArray[np.float64]]
    high: dict[str, NDArray[np.float64]]
    pcc: list[float | None]
    """Of the kept genes; empty where nothing was measured."""
    measured: list[bool]
    half_width: list[float | None]
    """Of the kept genes' intervals; empty where the file has none."""
    moran: dict[str, list[float | None]]
    """Moran's I of the kept genes' maps, predicted and measured (`target`)."""
    regions: dict[str, list[dict[str, list[float | None]]]]
    """By plane, of each region: mean and quartiles of the kept genes over its spots."""
    sets: dict[str, str]
    """Names of the gene sets that are among the kept genes' maps, and in words what each is of."""
    shown: dict[str, Any]
    """What else the page is told of the slide."""

    @property
    def slide_id(self) -> str:
        """The slide's name."""
        return str(self.about.get("slide_id", self.file.stem))


def read_slides(
    files: Sequence[Path],
    order: dict[str, int],
    asked: Asked | None = None,
    trusted: Mapping[str, bool] | None = None,
) -> list[SlideMaps]:
    """Read predictions, and what is `asked` for beside. `order` is the table's place of each gene: where not all genes'
    maps can be kept, those that stand first are. Gene sets are of genes that are not known to be untrusted, by the file
    or by `trusted`.

    Raises RunError where a file cannot be read, or two are of one slide.
    """
    shapes = [_shape(file) for file in files]
    spots = sum(n for n, _ in shapes)
    values = 2 * sum(n * g for n, g in shapes)
    most = None if values <= _MOST_VALUES else max(_FEWEST_GENES, _MOST_VALUES // (2 * max(1, spots)))
    longest = int(max(_SMALLEST_PX, min(_THUMBNAIL_PX, (_PICTURE_BYTES / _BYTES_PER_PX / max(1, len(files))) ** 0.5)))
    asked = asked or Asked()
    outlined = {} if asked.regions is None else find_regions(asked.regions, [_name(file) for file in files])
    found = [_read(file, order, most, longest, asked, trusted or {}, outlined) for file in files]
    for each in found:
        if each.slide_id in asked.images:
            crops = _crops(each, asked.images[each.slide_id], len(files))
            each.shown["crop_rows"], each.shown["crops"] = crops
    seen: dict[str, Path] = {}
    for each in found:
        if each.slide_id in seen:
            raise RunError(f"{seen[each.slide_id]} and {each.file} are both of slide {each.slide_id}; leave one out")
        seen[each.slide_id] = each.file
    return found


def moran_columns(slides: Sequence[SlideMaps]) -> dict[str, dict[str, float | None]]:
    """Return each gene's Moran's I, the mean over slides, of predicted and of measured maps (`target`)."""
    of: dict[str, dict[str, list[float]]] = {}
    for slide in slides:
        for key, values in slide.moran.items():
            for place, value in zip(slide.kept, values, strict=True):
                if value is not None:
                    of.setdefault(key, {}).setdefault(slide.names[place], []).append(value)
    return {key: {gene: float(np.mean(each)) for gene, each in genes.items()} for key, genes in of.items()}


def packed(slides: Sequence[SlideMaps], place: dict[str, int]) -> list[dict[str, Any]]:
    """Return the slides for the page, in as many levels as there is room for; `place` is each gene's in its table."""
    crops = sum(len(crop) for slide in slides for crop in slide.shown["crops"]) * 3 // 4
    room = max(_MOST_BYTES // 3, _MOST_BYTES - crops)  # of the same page
    most = max((len(slide.kept) for slide in slides), default=0)
    for levels in _LEVELS:
        values = [_pack(slide, levels, most) for slide in slides]
        if sum(map(len, values)) <= room:
            break
    while sum(map(len, values)) > room and most > 1:
        most = max(1, min(most - 1, int(0.95 * most * room / sum(map(len, values)))))
        values = [_pack(slide, levels, most) for slide in slides]
    out = []
    for slide, packed_values in zip(slides, values, strict=True):
        kept = slide.kept[:most]
        out.append(
            {
                **slide.shown,
                "panel": [place[name] for name in slide.names],
                "genes": [place[slide.names[i]] for i in kept],
                "pcc": slide.pcc[:most],
                "measured": slide.measured[:most],
                "half_width": slide.half_width[:most],
                "moran": {key: values[:most] for key, values in slide.moran.items()},
                "region_means": {
                    key: [{name: values[:most] for name, values in region.items()} for region in of]
                    for key, of in slide.regions.items()
                },
                "planes": [
                    {
                        "key": key,
                        "low": [_short(v) for v in slide.low[key][:most]],
                        "high": [_short(v) for v in slide.high[key][:most]],
                    }
                    for key in slide.planes
                ],
                "levels": levels,
                "values": base64.b64encode(packed_values).decode("ascii"),
            }
        )
    return out


def _pack(slide: SlideMaps, levels: int, most: int) -> bytes:
    parts = []
    for values in slide.planes.values():
        some = values[:most]
        if levels != _LEVELS[0]:
            fewer = np.rint(np.arange(256) * (levels / _LEVELS[0])).astype(np.uint8)
            fewer[_NO_VALUE] = _NO_VALUE
            some = fewer[some]
        parts.append(some.tobytes())
    return zlib.compress(b"".join(parts), 6)


def _finite(values: Iterable[float]) -> list[float | None]:
    return [round(float(v), 4) if math.isfinite(v) else None for v in values]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _opened(file: Path) -> h5py.File:
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> RunError:
    return RunError(f"the predictions {file} cannot be read: {reason_of(error)}")


def _shape(file: Path) -> tuple[int, int]:
    with _opened(file) as data:
        try:
            n, g = data["X"].shape
        except Exception as error:
            raise _unreadable(file, error) from error
        return int(n), int(g)


def _read(
    file: Path,
    order: dict[str, int],
    most: int | None,
    longest: int,
    asked: Asked,
    trusted: Mapping[str, bool],
    outlined: Mapping[str, Path],
) -> SlideMaps:
    with _opened(file) as data, quiet_warnings():
        try:
            obs, var, uns = (read_elem(data[name]) for name in ("obs", "var", "uns"))
            xy = np.asarray(data["obsm/spatial"], np.float64)
            about = dict(uns.get("nh2st_pipe", {}))
            names = [str(name) for name in var.index]
            last = len(order)
            kept = np.array(sorted(range(len(names)), key=lambda i: (order.get(names[i], last), i))[:most], np.int64)
            predicted = _columns(data["X"], kept)
            layers = data["layers"]
            target = _columns(layers["target"], kept) if "target" in layers else None
            spread = _columns(layers["spread"], kept) if "spread" in layers and target is None else None
            half = []
            if "half_width" in var:
                half = [_short(v) if math.isfinite(v) else None for v in var["half_width"].to_numpy()[kept].tolist()]
            elif "high" in layers:  # of earlier versions
                half = _half_width(data, predicted, kept)
            plain = predicted, target
            of_sets, words = _places(asked.sets, names, var, trusted)
            if of_sets:
                scores, n = _scores(data["X"], of_sets), len(of_sets)  # first: they are kept where some cannot be
                predicted = np.column_stack((scores, predicted))
                target = None if target is None else np.column_stack((_scores(layers["target"], of_sets), target))
                spread = None if spread is None else np.column_stack((np.full((len(spread), n), np.nan), spread))
                half = [*[None] * n, *half] if half else []
                kept = np.concatenate((np.arange(n) + len(names), kept))
        except Exception as error:  # whatever h5py or anndata make of a broken file
            raise _unreadable(file, error) from error
    slide_id = str(about.get("slide_id", file.stem))
    domains = _domains(asked, slide_id, *plain, xy, [str(name) for name in obs.index])
    background = _background(uns, slide_id, xy, longest)
    regions = _regions(outlined.get(slide_id), xy, about)
    planes: dict[str, NDArray[np.float32]] = {"predicted": predicted}
    if target is not None:
        planes = {"target": target, **planes}
    low, high = _range([*planes.values()])
    lows, highs = dict.fromkeys(planes, low), dict.fromkeys(planes, high)
    if spread is not None:
        planes["spread"] = spread
        lows["spread"], highs["spread"] = np.zeros(len(kept)), _range([spread])[1]
    pcc = [] if target is None else gene_metrics(predicted, target)["pcc"].tolist()
    shown = {
        "id": slide_id,
        "patient": str(about.get("patient", "")),
        "label": _label(about),
        "in_sample": bool(about.get("in_sample")),
        "notes": [str(about[key]) for key in ("in_sample", "caution", "unlike", "carried", "pitch") if about.get(key)],
        "n": len(xy),
        "crop_rows": [],
        "crops": [],
        "domains": domains,
        **{key: value for key, value in background.items() if key != "low"},
        "regions": [
            {
                "name": region.name,
                "n": len(region.rows),
                "rings": region.rings(background["low"], 1 / background["per_px"]),
            }
            for region in regions
        ],
        "um_per_px": _um_per_px(about, background["per_px"]),
        "barcodes": _zipped(json.dumps([str(name) for name in obs.index]).encode()),
        "unlike": np.flatnonzero(obs["unlike"] == "yes").tolist() if "unlike" in obs else [],
        "percentile": (
            _zipped(np.rint(obs["train_percentile"].to_numpy(np.float64)).clip(0, 100).astype(np.uint8).tobytes())
            if "train_percentile" in obs
            else ""
        ),
    }
    return SlideMaps(
        file=file,
        names=[*names, *of_sets],
        sets={name: words[name] for name in of_sets},
        var={str(column): var[column].tolist() for column in var.columns},
        about=about,
        kept=kept,
        planes={key: _steps(values, lows[key], highs[key]) for key, values in planes.items()},
        low=lows,
        high=highs,
        pcc=_finite(pcc),
        measured=[] if target is None else np.asarray(np.isfinite(target).any(axis=0)).tolist(),
        half_width=half,
        regions={key: means_of(values, regions) for key, values in planes.items() if key != "spread" and regions},
        moran={key: _finite(morans_i(values, xy)) for key, values in planes.items() if key != "spread"},
        shown=shown,
    )


def _label(about: dict[str, Any]) -> str:
    """Say in words what a prediction is."""
    if about.get("in_sample"):
        return f"in-sample: {about['in_sample']}"
    if about.get("out_of_fold", "fold" in about):
        return f"out of fold ({about.get('fold', '')})"
    return "a slide the head was not trained on"


def _places(
    sets: Sequence[GeneSet], names: list[str], var: pd.DataFrame, trusted: Mapping[str, bool]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the places of each set's genes, and in words which those are; a set with too few genes has words alone."""
    known = dict(zip(names, var["trusted"], strict=True)) if "trusted" in var else dict(trusted)
    if "trusted" in var and "judged" in var:
        known = {name: yes for name, yes, judged in zip(names, var["trusted"], var["judged"], strict=True) if judged}
    doubted = {name for name, yes in known.items() if not yes}
    found = {f"{PREFIX}{each.name}": each.of(names, doubted) for each in sets}
    return {name: places for name, (places, _) in found.items() if places}, {
        n: words for n, (_, words) in found.items()
    }


def _scores(values: h5py.Dataset, of_sets: Mapping[str, list[int]]) -> NDArray[np.float32]:
    """Return the scores of sets, n × S, from a stored matrix of which their genes are read."""
    needed = sorted({place for places in of_sets.values() for place in places})
    within = {place: i for i, place in enumerate(needed)}
    some = _columns(values, np.array(needed, np.int64))
    return score_of(some, {name: [within[place] for place in places] for name, places in of_sets.items()})


def _columns(values: h5py.Dataset, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return columns of a stored matrix, n × kept, without holding the whole."""
    n, g = values.shape
    if len(kept) == g:
        return np.asarray(values, np.float32)[:, kept]
    out = np.empty((n, len(kept)), np.float32)
    for start in range(0, n, _ROWS_AT_ONCE):
        out[start : start + _ROWS_AT_ONCE] = values[start : start + _ROWS_AT_ONCE][:, kept]
    return out


def _half_width(data: h5py.File, predicted: NDArray[np.float32], kept: NDArray[np.int64]) -> list[float | None]:
    """Return how far the genes' intervals reach, which is the same at every spot."""
    if not len(predicted):
        return []
    reach = np.asarray(data["layers/high"][0], np.float64)[kept] - predicted[0]
    return [_short(v) if math.isfinite(v) else None for v in reach.tolist()]


def _zipped(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


def _domains(
    asked: Asked,
    slide_id: str,
    predicted: NDArray[np.float32],
    target: NDArray[np.float32] | None,
    xy: NDArray[np.float64],
    barcodes: list[str],
) -> dict[str, dict[str, Any]]:
    """Return the slide's domains, of the genes whose maps are kept and of its embeddings."""
    if asked.domains is None:
        return {}
    number = asked.domains
    of = {
        "measured": None if target is None else domains_of(target, number),
        "predicted": domains_of(predicted, number),
    }
    if asked.store is not None and asked.store.record(slide_id) is not None:
        slide = asked.store.read(slide_id, first_view_only=True)
        if slide.barcodes != barcodes:
            raise RunError(
                f"slide {slide_id} in {asked.store.location} has other tiles than the prediction; is it the store?"
            )
        of["embeddings"] = domains_of(slide.views[:, 0], number)
    return compared(of, xy, number)


def _crops(of: SlideMaps, image: Path, slides: int) -> tuple[list[int], list[str]]:
    image_of = _image(of.about)
    if any(image_of.get(key) is None for key in ("width", "height", "tile_level0_px")):
        raise RunError(f"{of.file} does not say how large its tiles are: it is an earlier version's; predict again")
    with _opened(of.file) as data:
        return crops_of(image, np.asarray(data["obsm/spatial"], np.float64), image_of, slides)


def _image(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a prediction says of its image, nothing where it is an earlier version's."""
    said: dict[str, Any] = json.loads(str(about.get("image", "null"))) or {}
    return said


def _name(file: Path) -> str:
    """Return the slide that a prediction says it is of."""
    with _opened(file) as data:
        said = data.get("uns/nh2st_pipe/slide_id")
        return file.stem if said is None else str(said.asstr()[()])


def _regions(path: Path | None, xy: NDArray[np.float64], about: dict[str, Any]) -> list[Region]:
    if path is None:
        return []
    origin = _image(about).get("origin") or (0, 0)
    return read_regions(path, xy, (int(origin[0]), int(origin[1])))


def _um_per_px(about: dict[str, Any], level0_px: float) -> float | None:
    """Return µm per px of the picture, each so many level-0 px; None where the file does not say the slide's mpp."""
    mpp = _image(about).get("mpp")
    return None if mpp is None else _short(float(mpp) * level0_px)


def _background(
    uns: dict[str, Any], slide_id: str, xy: NDArray[np.float64], longest: int = _THUMBNAIL_PX
) -> dict[str, Any]:
    """Return what maps are drawn on: the thumbnail around the spots (`image`, a data URI, None where the run has none)
    with at most `longest` px a side, its width and height, level-0 px per px of it, and in its px the spots' x, y and
    radius; `square` where they are tiles side by side.
    """
    spatial = uns.get("spatial", {})
    section: dict[str, Any] = spatial.get(slide_id) or next(iter(spatial.values()), {})
    images = section.get("images", {})
    which = "hires" if "hires" in images else "lowres"  # runs of earlier versions have this one
    picture = images.get(which)
    factors = section.get("scalefactors", {})
    step = pitch_px(xy)
    diameter = float(factors.get("spot_diameter_fullres", 0.0)) or step or 1.0
    square = bool(step) and diameter >= 0.97 * step
    # Spots may touch and never overlap.
    radius = 0.5 * step if square else 0.48 * min(diameter, step or diameter)
    margin = 2.0 * max(step, diameter)
    low, high = (xy.min(axis=0) - margin, xy.max(axis=0) + margin) if len(xy) else (np.zeros(2), np.ones(2))
    if picture is None:
        image, scale = None, longest / float((high - low).max())
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
        cut.thumbnail((longest, longest))
        low = np.array((left, top)) / scale
        scale *= cut.width / (right - left)
        width, height = cut.size
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=82, optimize=True)
        image = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    x, y = ((xy - low) * scale).round(1).T.tolist()
    shape = {"radius": round(radius * scale, 2), "square": square}
    size = {"image": image, "width": width, "height": height, "per_px": 1 / scale, "low": low}
    return {**size, "x": x, "y": y, **shape}


def _range(planes: list[NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lowest and highest value of each gene over n × G arrays; 0 where there is none."""
    low, high = (np.full(planes[0].shape[1], value, np.float64) for value in (np.inf, -np.inf))
    for values in planes:
        seen = np.isfinite(values)
        low = np.minimum(low, np.where(seen, values, np.inf).min(axis=0, initial=np.inf))
        high = np.maximum(high, np.where(seen, values, -np.inf).max(axis=0, initial=-np.inf))
    none = ~np.isfinite(low)
    return np.where(none, 0.0, low), np.where(none, 0.0, high)


def _steps(values: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return n × G values as G × n bytes (see above)."""
    spread = np.where(high > low, high - low, 1.0)
    seen = np.isfinite(values)
    steps = np.rint((np.where(seen, values, low) - low) / spread * _LEVELS[0])
    steps[~seen] = _NO_VALUE
    return np.ascontiguousarray(steps.T.astype(np.uint8))
