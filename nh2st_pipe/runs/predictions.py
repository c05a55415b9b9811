"""One slide's predictions as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata.io import write_elem
from numpy.typing import NDArray

from nh2st_pipe.core.h5ad import new_h5ad, write_matrix
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.evaluation.reference import Familiarity
from nh2st_pipe.heads.base import Blocked, Prediction
from nh2st_pipe.heads.blocked import blocks_of
from nh2st_pipe.heads.carry import CUT
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData

__all__ = ["write_prediction"]

_BETWEEN = 4  # times as many genes as are asked for may be made for them
_LARGE = 20_000_000  # values, beyond which a file is made on the disk, and an interval's ends are told by its width
_OF_IMAGE = ("path", "fingerprint", "width", "height", "mpp", "tile_level0_px", "origin")


def write_prediction(
    path: Path,
    slide: SlideData,
    genes: list[str],
    predicted: Prediction | Blocked,
    target: NDArray[np.float32] | Callable[[slice], NDArray[np.float32]] | None,
    made: TargetRecipe | None,
    about: dict[str, Any],
    by_gene: Mapping[str, Mapping[str, float | None]] | None = None,
    *,
    half_width: Mapping[str, float] | None = None,
    familiar: Familiarity | None = None,
    columns: NDArray[np.int64] | None = None,
    scale_genes: Sequence[str] = (),
    n_scale_genes: int = 0,
    half: bool = False,
) -> None:
    """Write one slide's predictions: X n × G, layers["target"] where the truth is known, obsm["spatial"] in
    level-0 px, the spots' neighbours and the thumbnail where scanpy and squidpy look for them, and `about` in
    uns["nh2st_pipe"], with what is known of the image and the tiles' size (`image`, JSON), how the values are made of
    counts (`made`) and the panel they were scaled over; None where spots have several.

    obs["likeness"] tells how like each spot is to the training spots (its median stands in uns). `by_gene` are columns
    of var, each a value by gene: cv_pcc, half_pcc …; those that are empty are left out. With the `half_width` of each
    gene's interval, layers["low"] and layers["high"] are its ends, and var["half_width"] how far they are from X, which
    is all that is written of more than 20 million values; layers["spread"] is the members' where there are
    several. Where predictions are weighed by what carries over, var["cut"] is which share of a gene's variation was
    taken away on this slide, varm["factors"] which share of it lies in each factor, and uns["carry"] a table of these:
    weights, louder (how loud beside slides left out), reliability (PCC there); a gene that lost most of its variation
    is not trusted here. Where the head predicts a distribution, its parameters are layers (of each spot) or columns of
    var, under their names. `familiar` is kept in obs. var["trusted"] has var["judged"] beside it, false where there is
    no verdict. `scale_genes` are those that counts were scaled over where slides measure different ones,
    `n_scale_genes` how many there are in any case. With `columns`, those genes alone are written. `half` keeps values
    and layers in half precision. They are made and written by blocks of genes: of a prediction that is made so, no
    n × G array is ever held.
    """
    said = predicted if isinstance(predicted, Blocked) else Blocked.of(predicted)
    if said.shape[0] * said.shape[1] <= _LARGE:  # made once, not for each layer that has them
        said = Blocked.of(said.dense())
    obs = pd.DataFrame(index=pd.Index(slide.barcodes, name="barcode", dtype=object))
    for name, places in (("array_row", slide.array_row), ("array_col", slide.array_col)):
        if places is not None:
            obs[name] = places
    panel = list(genes)
    cut = np.arange(len(panel)) if columns is None else columns
    genes = [panel[i] for i in cut]
    var = pd.DataFrame(index=pd.Index(genes, name="gene", dtype=object))
    about = {"slide_id": slide.slide_id, "patient": slide.patient, **about}
    if "image" in slide.uns:
        of_image = {key: slide.uns["image"][key] for key in _OF_IMAGE if slide.uns["image"].get(key) is not None}
        about["image"] = json.dumps(of_image, default=lambda value: value.tolist())  # earlier formats have numpy's
    if made is not None:
        about |= {"targets": json.dumps({**made.model_dump(mode="json"), "genes": len(panel)}), "panel": panel}
        about["n_scale_genes"] = n_scale_genes
        if scale_genes:
            about["scale_genes"] = list(scale_genes)
    for column, known in (by_gene or {}).items():
        if known:
            of_genes = [known.get(gene) for gene in genes]
            if all(isinstance(value, bool) for value in known.values()):
                var[column] = np.array([bool(value) for value in of_genes])
                if column == "trusted":  # what was not judged is neither
                    var["judged"] = np.array([value is not None for value in of_genes])
            else:
                var[column] = np.array([np.nan if value is None else value for value in of_genes])
    carried = predicted.carried
    if carried is not None:
        var["cut"] = carried.cut[cut]
        if "trusted" in var:
            var["trusted"] &= var["cut"] <= CUT
    if predicted.likeness is not None:
        obs["likeness"] = predicted.likeness
        about["likeness"] = float(np.median(predicted.likeness))
    if familiar is not None:
        obs["train_distance"], obs["train_percentile"] = familiar.distance, familiar.percentile
        words = np.where(familiar.unlike, "yes", "no")  # categories: squidpy cannot colour by what is true or false
        obs["unlike"] = pd.Categorical(words, categories=["no", "yes"])
        about["unlike_share"] = float(familiar.unlike.mean()) if len(familiar.unlike) else 0.0
    reach = None
    if half_width:
        reach = np.array([half_width.get(gene, np.nan) for gene in genes], np.float32)
        var["half_width"] = reach
    data = anndata.AnnData(obs=obs, var=var)
    data.obsm["spatial"] = slide.xy
    obsp, data.uns["spatial_neighbors"] = slide.graph()
    for name, matrix in obsp.items():
        data.obsp[name] = matrix
    shape = len(slide), len(genes)
    large = shape[0] * shape[1] > _LARGE
    layers: dict[str, Callable[[], Iterator[NDArray[np.float32]]]] = {"": lambda: _taken(said, said.values, cut)}
    if target is not None:
        truth = target if callable(target) else partial(_columns, target)
        layers["target"] = lambda: _taken(said, truth, cut)
    if reach is not None and not large:
        for name, sign in (("low", -1), ("high", 1)):
            layers[name] = partial(_shifted, said, cut, sign * reach)
    if (spread := said.spread) is not None:
        layers["spread"] = lambda: _taken(said, spread, cut)
    if predicted.distribution is not None:
        about["distribution"] = predicted.distribution.kind
        for name, parameter in predicted.distribution.parameters.items():
            if parameter.ndim > 1:
                layers[name] = partial(_taken, said, partial(_columns, parameter), cut)
            else:
                data.var[name] = parameter[cut]
    data.uns["nh2st_pipe"] = about
    if carried is not None:
        data.varm["factors"] = carried.lives[cut]
        columns_of = {name: getattr(carried, name) for name in ("weights", "louder", "reliability")}
        numbers = [str(k) for k in range(1, len(carried.weights) + 1)]
        data.uns["carry"] = pd.DataFrame(columns_of, index=pd.Index(numbers, name="factor", dtype=object))
        about["carry"] = json.dumps(asdict(carried.strength))
    if "spatial" in slide.uns:
        data.uns["spatial"] = slide.uns["spatial"]
    kind = np.dtype(np.float16 if half else np.float32)
    with quiet_warnings(), new_h5ad(path, large=large) as file:
        data.strings_to_categoricals()
        write_elem(file, "/", data, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
        if "X" in file:
            del file["X"]
        for name, made_of in layers.items():
            group = file.require_group("layers") if name else file
            write_matrix(group, name or "X", shape, kind, made_of())


def _taken(
    said: Blocked, values: Callable[[slice], NDArray[np.float32]], columns: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """Yield the values of `columns` in their order, some at a time: with those between them where these are few, else
    those that follow each other at once.
    """
    for block in blocks_of((said.shape[0], len(columns))):
        of = columns[block]
        low, high = (int(of.min()), int(of.max()) + 1) if len(of) else (0, 0)
        if high - low <= _BETWEEN * len(of):
            found = values(slice(low, high))
            yield found if np.array_equal(of, np.arange(low, high)) else found[:, of - low]
            continue
        starts = np.flatnonzero(np.diff(of, prepend=of[:1] - 2) != 1)
        runs = [values(slice(int(run[0]), int(run[-1]) + 1)) for run in np.split(of, starts[1:])]
        yield np.concatenate(runs, axis=1)


def _shifted(said: Blocked, columns: NDArray[np.int64], by: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    at = 0
    for block in _taken(said, said.values, columns):
        yield block + by[at : at + block.shape[1]]
        at += block.shape[1]


def _columns(values: NDArray[np.float32], of: slice) -> NDArray[np.float32]:
    return values[:, of]
