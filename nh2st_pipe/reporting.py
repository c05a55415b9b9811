"""One self-contained page on a finished run: figures, genes, true and predicted maps, training, provenance.

The page is report_template.html with the run's data put in as JSON; its script builds everything else, so that
no text of the data is ever read as HTML. It needs no network and opens from disk.

Maps. Truth and prediction are kept as one byte per spot and gene, zlib-compressed, base64: slide by slide,
predicted behind true, gene after gene. A byte q stands for lo + q / levels · (hi − lo) of its gene on that slide;
255 is a spot without a value. PCCs are computed here, from the values as they are in the run.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.runs.folder import read_metrics

__all__ = ["report"]

_MARK = "@@DATA@@"
_NO_VALUE = 255
_FINE, _COARSE = 254, 62
_FINE_UP_TO = 6_000_000  # values; beyond that, 63 steps instead of 255 keep the page below 15 MB
_MOST_VALUES = 16_000_000  # values; beyond that, maps are kept of the best predicted genes alone
_FEWEST_GENES = 20
_THUMBNAIL_PX = 600
_FIGURES = ("pcc", "pcc_top50", "mse", "mae", "train_seconds")


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html for the finished run folder `run`, at `out` or inside it, and return its path.

    Raises RunError where `run` is not finished or not as training writes it, or `out` is a folder.
    """
    run = Path(run)
    metrics = read_metrics(run)
    target = Path(out) if out is not None else run / "report.html"
    if target.is_dir():
        raise RunError(f"{target} is a folder; give the report a file name, for example {target / 'report.html'}")
    try:
        data = _page_data(run, metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run} cannot be reported on: a file in it lacks {error} or is not as training writes it; was it changed, "
            "or written by another version?"
        ) from error
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # "<" is what could end the script element (</script>) or change how it is read (<!--).
    text = text.replace("<", "\\u003c")
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(template.replace(_MARK, text), encoding="utf-8")
    part.replace(target)
    return target


def _page_data(run: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return all that the page shows, ready for JSON."""
    recipe_text, recipe = _recipe(run)
    heads = _heads(metrics)
    genes = _genes(_table(run / "per_gene.csv"), [head["name"] for head in heads])
    slides = _slides(run / "predictions", genes)
    return {
        "run": run.resolve().name,
        "head": metrics["head"],
        "about": str(recipe.get("about") or ""),
        "facts": _facts(metrics, recipe),
        "warnings": _warnings(metrics),
        "verdict": _verdict(heads),
        "heads": heads,
        "genes": genes,
        "unit": _unit(recipe),
        "slides": slides,
        "history": _history(_table(run / "history.csv")),
        "watched": "the test fold" if metrics["protocol"] == "paper" else "a held-out training slide",
        "provenance": _provenance(metrics, recipe),
        "recipe": recipe_text,
    }


def _recipe(run: Path) -> tuple[str, dict[str, Any]]:
    """Return recipe.yaml as it stands, and as values (empty where it is not there)."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return text, values if isinstance(values, dict) else {}


def _table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where it is empty or not there, as in a run without folds."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _heads(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the run's head and its baselines: name, figures over all folds (None without folds), by fold."""
    found = []
    for name, record in ((metrics["head"], metrics), *metrics["baselines"].items()):
        summary = record["summary"]
        found.append(
            {
                "name": name,
                "summary": None if summary is None else {key: summary.get(key) for key in _FIGURES},
                "folds": [
                    {
                        "fold": fold["fold"],
                        "slides": len(fold["test_slides"]),
                        **{key: fold.get(key) for key in (*_FIGURES, "n_spots", "n_genes", "n_genes_pcc_undefined")},
                    }
                    for fold in record["folds"]
                ],
            }
        )
    return found


def _verdict(heads: list[dict[str, Any]]) -> str:
    """Say in one or two sentences which head is best by mean PCC, whoever that is."""
    own = heads[0]
    if own["summary"] is None:
        return (
            "Nothing was judged: this run was trained on all slides, without folds, so there are no figures and no "
            "out-of-fold predictions. Train with --folds patient to learn how good the head is on slides it has not "
            "seen."
        )
    known = [(head["summary"]["pcc"], head["name"]) for head in heads if (head["summary"] or {}).get("pcc") is not None]
    if not known:
        return "No head has a defined PCC: predictions or targets do not vary."
    best, name = max(known, key=lambda pair: pair[0])  # of equals the first, which is the run's own
    mine = own["summary"]["pcc"]
    if mine is None:
        return (
            f"Best by mean PCC is the baseline {name} ({best:.3f}). The PCC of the run's own head, {own['name']}, is "
            "undefined: its predictions do not vary."
        )
    if len(known) == 1:
        return f"{own['name']} reaches a mean PCC of {mine:.3f}; no baseline with a defined PCC stands beside it."
    if name == own["name"]:
        second, runner_up = max((pair for pair in known if pair[1] != name), key=lambda pair: pair[0])
        return f"Best by mean PCC is {name} ({best:.3f}); the best baseline is {runner_up} ({second:.3f})."
    better = [each for pcc, each in sorted(known, reverse=True) if pcc > mine]
    return (
        f"Best by mean PCC is the baseline {name} ({best:.3f}). The run's own head, {own['name']} ({mine:.3f}), is "
        f"beaten by {len(better)} of the {len(heads) - 1} baselines: {', '.join(better)}."
    )


def _warnings(metrics: dict[str, Any]) -> list[str]:
    """Say what a reader could take these figures for and must not."""
    found: list[str] = []
    if metrics["summary"] is None:
        return found
    if metrics["protocol"] == "paper":
        found.append(
            "The figures on this page are optimistic. Protocol “paper”: the gene panel comes from all slides and the "
            "epoch kept is the best on the test fold. Use them to compare with published tables, not to say how "
            "good the head is on a new slide."
        )
    if metrics["n_patients"] == 1:
        found.append("All slides are of one patient; the figures say nothing about new patients.")
    elif metrics["folds_by"] == "slide" and metrics["n_patients"] < metrics["n_slides"]:
        found.append(
            "Folds leave out slides, not patients: slides of one patient stand on both sides, and the figures are "
            "likely too good for a new patient."
        )
    return found


def _facts(metrics: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was trained and how it was judged, as label and words."""
    store, views = metrics["store"], metrics["views"]
    by = str(metrics["folds_by"])
    folds = {
        "patient": "one patient left out in turn",
        "slide": "one slide left out in turn",
        "none": "none: nothing was judged",
    }.get(by, f"{by} folds of whole patients")
    count, patients = len(metrics["folds"]), metrics["n_patients"]
    model = metrics["model"]
    epochs = f", {model['epochs']} epochs" if model["epochs"] else ""
    return [
        ("Data", f"{_many(metrics['n_slides'], 'slide')}, {_many(patients, 'patient')}, {metrics['n_spots']:,} spots"),
        ("Targets", f"{_many(model['genes'], 'gene')} in the model (a fold's panel can differ); {_unit(recipe)}"),
        ("Encoder", f"{store['encoder']}, {store['dim']} values per tile, {_many(views, 'view')} used"),
        ("Folds", f"{folds} ({_many(count, 'fold')})" if count else folds),
        ("Protocol", f"{metrics['protocol']}: {metrics['protocol_in_words']}"),
        ("Model", f"model/ is trained on all slides ({len(model['slides'])}){epochs}"),
    ]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _unit(recipe: dict[str, Any]) -> str:
    """Say what a target is a number of."""
    targets = recipe.get("targets") or {}
    scale, smooth = targets.get("scale_to"), targets.get("smooth") == "grid8"
    counts = "counts" if scale is None else f"counts scaled to {scale:,.0f} per spot"
    logged = {"log10": f"log10({counts} + 1)", "log1p": f"ln({counts} + 1)"}.get(targets.get("log", "none"), counts)
    return logged + (", mean over a spot and its grid neighbours" if smooth else "")


def _genes(rows: list[dict[str, str]], heads: list[str]) -> dict[str, Any]:
    """Return the gene table by column: names, mean target, folds of the run's own head, and PCC per head."""
    names = list(dict.fromkeys(row["gene"] for row in rows))
    cells = {(row["head"], row["gene"]): row for row in rows}
    own = [cells.get((heads[0], name), {}) for name in names]
    return {
        "names": names,
        "mean": [_number(row.get("target_mean")) for row in own],
        "folds": [_number(row.get("n_folds")) for row in own],
        "pcc": [[_number(cells.get((head, name), {}).get("pcc")) for name in names] for head in heads],
    }


def _slides(folder: Path, genes: dict[str, Any]) -> list[dict[str, Any]]:
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
                for column in (genes["mean"], genes["folds"], *genes["pcc"]):
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
    picture = section.get("images", {}).get("lowres")
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
        scale = float(factors.get("tissue_lowres_scalef", 1.0))
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


def _history(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return one curve per fold and phase: its epochs, losses and watched PCCs (None where there is none)."""
    curves: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if _number(row.get("epoch")) is not None:
            curves.setdefault((row.get("fold") or "", row.get("phase") or ""), []).append(row)
    loss = next((name for name in (rows[0] if rows else ()) if name.startswith("loss")), "loss")
    return [
        {
            "fold": fold,
            "phase": phase,
            "epoch": [_number(row["epoch"]) for row in part],
            "loss": [_number(row.get(loss)) for row in part],
            "pcc": [_number(row.get("watched_pcc")) for row in part],
        }
        for (fold, phase), part in curves.items()
    ]


def _provenance(metrics: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    store, software = metrics["store"], metrics["software"]
    tile = store["tile"]
    size = f"{tile['size_um']:g} µm" if tile.get("size_um") is not None else f"{tile['size_level0_px']:g} px (level 0)"
    return [
        ("Store", str(store["path"])),
        ("Encoder", f"{store['encoder']}, {store['dim']} values"),
        ("Weights", str(store["weights_source"])),
        ("Weights SHA-256", str(store["weights_sha256"])),
        ("Tile", size),
        ("Views", str(store["views"])),
        ("Precision", str(store["precision"])),
        ("Seed", str(recipe.get("seed", "not recorded"))),
        *((str(name), str(value)) for name, value in software.items()),
    ]
