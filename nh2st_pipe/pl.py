"""Three plots, each on axes of yours or its own: a gene's map, measured against predicted, and whether intervals hold.

Predictions are what `predict` and `train` write, as files or as AnnData. matplotlib is needed
(`pip install 'nh2st-pipe[plot]'`).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, UsageError, nearest

if TYPE_CHECKING:
    import anndata
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nh2st_pipe.training.run import Run

__all__ = ["calibration", "map", "maps", "pairs"]

_LAYERS = {"predicted": "", "measured": "target"}
_DOT_OF_A_PITCH = 0.9
_AROUND = 3  # dots, around the outermost
_LINE = 36  # letters


def map(  # scanpy's and squidpy's plots are called by what they show, too
    prediction: anndata.AnnData | str | Path,
    gene: str,
    *,
    of: str = "predicted",
    ax: Axes | None = None,
    image: bool = True,
    cmap: str = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Axes:
    """Draw a gene over a slide: `of` is predicted, measured, or a layer (low, high, spread).

    `image` puts the slide's thumbnail beneath. Tiles unlike those that were trained on are drawn as crosses, and the
    title says where a gene is not trusted. Raises UsageError for a gene or layer that is not there.
    """
    data, ax = _opened(prediction), _axes(ax)
    from matplotlib.collections import EllipseCollection

    values = _values(data, gene, of)
    xy = np.asarray(data.obsm["spatial"], dtype=np.float64)
    picture, scale, size = _beneath(data, xy)
    xy, size = xy * scale, size * scale
    if picture is not None and image:
        ax.imshow(picture)
    unlike = data.obs["unlike"].to_numpy() == "yes" if "unlike" in data.obs else np.zeros(len(xy), np.bool_)
    low, high = _range(values, vmin, vmax)
    like = ~unlike
    dots = EllipseCollection(
        np.full(like.sum(), size),
        np.full(like.sum(), size),
        np.zeros(like.sum()),
        units="x",
        offsets=xy[like],
        offset_transform=ax.transData,
        array=values[like],
        cmap=cmap,
    )
    dots.set_clim(low, high)
    ax.add_collection(dots)
    if unlike.any():
        ax.scatter(
            xy[unlike, 0],
            xy[unlike, 1],
            c=values[unlike],
            cmap=cmap,
            vmin=low,
            vmax=high,
            marker="x",
            s=12,
            linewidths=1,
        )
    if len(xy):
        (left, top), (right, bottom) = xy.min(axis=0) - _AROUND * size, xy.max(axis=0) + _AROUND * size
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)  # as images count: downwards
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"{gene}, {of}{_verdict(data, gene)}", fontsize="medium")
    assert ax.figure is not None
    bar = ax.figure.colorbar(dots, ax=ax, shrink=0.7)
    bar.set_label(textwrap.fill(str(_about(data).get("unit", "")), _LINE), fontsize="x-small")
    return ax


def maps(
    predictions: Sequence[tuple[str, anndata.AnnData | str | Path]],
    gene: str,
    *,
    of: str = "predicted",
    columns: int = 4,
) -> Figure:
    """Return a figure of a gene over several slides, each with its name, on one scale. Raises UsageError for none."""
    if not predictions:
        raise UsageError("there is no prediction to be drawn")
    plt = _pyplot()
    opened = [(name, _opened(each)) for name, each in predictions]
    ranges = [_range(_values(data, gene, of), None, None) for _, data in opened]
    wide = max(1, min(columns, len(opened)))
    high = -(-len(opened) // wide)
    made = plt.subplots(high, wide, figsize=(4 * wide, 3.5 * high), layout="constrained", squeeze=False)
    figure: Figure = made[0]
    axes = made[1]
    for place in axes.flat[len(opened) :]:
        place.set_axis_off()
    low, top = min(low for low, _ in ranges), max(top for _, top in ranges)
    for (name, data), place in zip(opened, axes.flat, strict=False):
        map(data, gene, of=of, ax=place, vmin=low, vmax=top)
        place.set_title(f"{name}: {place.get_title()}", fontsize="medium")
    return figure


def pairs(prediction: anndata.AnnData | str | Path, gene: str, *, ax: Axes | None = None) -> Axes:
    """Draw a gene's measured values against the predicted ones, a point a spot, with the PCC on this slide.

    Raises UsageError where it was not measured.
    """
    data, ax = _opened(prediction), _axes(ax)
    said, truth = _values(data, gene, "predicted"), _values(data, gene, "measured")
    known = np.isfinite(said) & np.isfinite(truth)
    said, truth = said[known], truth[known]
    ax.scatter(said, truth, s=8, alpha=0.6, linewidths=0)
    low, high = (float(of(np.concatenate([said, truth]))) for of in (np.min, np.max)) if len(said) else (0.0, 1.0)
    ax.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    varies = len(said) > 1 and said.std() > 0 and truth.std() > 0
    pcc = f"PCC {np.corrcoef(said, truth)[0, 1]:.2f}" if varies else "PCC undefined"
    ax.set_title(f"{gene}: {pcc}{_verdict(data, gene)}", fontsize="medium")
    ax.set_xlabel("predicted")
    ax.set_ylabel("measured")
    return ax


def calibration(run: Run | str | Path, *, ax: Axes | None = None) -> Axes:
    """Draw which share of a new patient's values the intervals of a run cover, at each level.

    Hollow points are levels that so few units cannot promise. Raises RunError where the run has no intervals.
    """
    from nh2st_pipe.runs.about import About
    from nh2st_pipe.runs.model import model_files

    where = Path(run) if isinstance(run, (str, Path)) else run.path
    config = json.loads((model_files(where) / "config.json").read_text("utf-8"))
    intervals = About.of(config["about"], where).intervals
    points = [(float(level), of.coverage, of.promised) for level, of in intervals.levels.items()]
    told = [(level, coverage, promised) for level, coverage, promised in points if coverage is not None]
    if not told:
        raise RunError(f"{where} has no intervals whose coverage is known: it takes folds, and two units at least")
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    ax.plot([level for level, _, _ in told], [coverage for _, coverage, _ in told], linewidth=1, color="C0")
    for level, coverage, promised in told:
        ax.plot(level, coverage, "o", color="C0", markerfacecolor="C0" if promised else "white")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.set_xlabel("level of the interval")
    ax.set_ylabel("share of values covered")
    ax.set_title(f"intervals, {intervals.groups} {intervals.by}s left out in turn", fontsize="medium")
    return ax


def _opened(prediction: anndata.AnnData | str | Path) -> anndata.AnnData:
    if not isinstance(prediction, (str, Path)):
        return prediction
    from nh2st_pipe.core.h5ad import read_h5ad

    return read_h5ad(Path(prediction), RunError)


def _axes(ax: Axes | None) -> Axes:
    """Return axes: those that are given, or new ones. Raises UsageError where there is no matplotlib."""
    plt = _pyplot()
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'nh2st-pipe[plot]'") from error
    return plt


def _values(data: anndata.AnnData, gene: str, of: str) -> NDArray[np.float64]:
    names = [str(name) for name in data.var_names]
    if gene not in names:
        raise UsageError(f"the prediction has no gene {gene}{nearest(gene, names)}")
    layer = _LAYERS.get(of, of)
    if layer and layer not in data.layers:
        known = ["predicted", *("measured" if name == "target" else name for name in data.layers)]
        raise UsageError(f"the prediction has no {of} values (there are {', '.join(known)})")
    matrix = data.layers[layer] if layer else data.X
    column = matrix[:, names.index(gene)]
    dense = column.toarray() if hasattr(column, "toarray") else column
    return np.asarray(dense, dtype=np.float64).ravel()


def _beneath(data: anndata.AnnData, xy: NDArray[np.float64]) -> tuple[NDArray[Any] | None, float, float]:
    """Return the slide's thumbnail (None without one), its px per level-0 px, and a dot's width in level-0 px."""
    picture, scale, size = None, 1.0, 0.0
    for of in dict(data.uns.get("spatial", {})).values():
        factors = of.get("scalefactors", {})
        picture = of.get("images", {}).get("hires")
        scale = float(factors.get("tissue_hires_scalef", 1.0)) if picture is not None else 1.0
        size = float(factors.get("spot_diameter_fullres", 0.0))
        break
    if size <= 0 and len(xy) > 1:
        from scipy.spatial import KDTree

        apart = np.asarray(KDTree(xy).query(xy, k=2)[0])
        size = _DOT_OF_A_PITCH * float(np.median(apart[:, 1]))
    return picture, scale, size or 1.0


def _range(values: NDArray[np.float64], low: float | None, high: float | None) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    return float(known.min()) if low is None else low, float(known.max()) if high is None else high


def _verdict(data: anndata.AnnData, gene: str) -> str:
    if "trusted" not in data.var or data.var["trusted"][gene]:
        return ""
    if "seen" in data.var and not data.var["seen"][gene]:
        return " (never seen: not trusted)"
    return " (not trusted)" if "judged" not in data.var or data.var["judged"][gene] else " (not judged)"


def _about(data: anndata.AnnData) -> dict[str, Any]:
    return dict(data.uns.get("nh2st_pipe", {}))
