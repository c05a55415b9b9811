"""How good predictions in `.h5ad` files are, against the expression in a store.

The truth is made from the store's counts, as the prediction says its values are made; what a file claims to be true is
not looked at. What is left out, and what was trained on, is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import NH2STError, RunError, TrainError, listed, reason_of
from nh2st_pipe.core.h5ad import read_h5ad
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.data.targets import targets
from nh2st_pipe.evaluation.judged import SlideFigures, judge, units_of
from nh2st_pipe.evaluation.named import Named, gene_set_pcc, named, read_gmt
from nh2st_pipe.evaluation.statistics import MEANS, headline, many, mean_over_units
from nh2st_pipe.recipes.train import TargetRecipe, as_kept
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.about import Seen
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.store.read import SlideData, Store, open_store

__all__ = ["evaluate"]

_OTHER_GENES = 0.1  # share of the genes from which on it is spoken of


def evaluate(
    predictions: str | Path,
    embeddings: str | Path,
    out: str | Path | None = None,
    *,
    figures: Sequence[str] = (),
    gene_sets: str | Path | None = None,
) -> dict[str, Any]:
    """Return the figures of the predictions in a folder (or a run folder's own), by slide and as their mean.

    `slides` are the figures by slide_id, `summary` their means over `unit` (patients where several are told, else
    slides), `notes` what has to be known of them: slides and patients that the head was trained on (found by the
    images' fingerprints, whatever files are called), genes that do not vary, and what was left out. Each slide's
    `in_sample` says so in words, None where it is new to the head; where some are and some are not (`in_sample` counts
    them), `summary_new` are the means over the new ones alone. Slides are joined with the store `embeddings` by name,
    spots by barcode, genes by name. `figures` are more of them by name (see `evaluation.named`); `gene_sets` is a GMT
    file whose sets are judged by their mean z-score, in `gene_sets` of each slide and their mean.
    With `out` all are written there as JSON.

    Raises RunError where there is nothing to judge, a run's files have changed, or a file is not what prediction writes
    or not of the store's spots; TrainError where the store has expression for none of the slides.
    """
    folder = Path(predictions)
    if (folder / "metrics.json").is_file():
        read_metrics(folder)  # and every file of the run held against its hash
        folder = folder / "predictions"
    files = sorted(folder.glob("*.h5ad"))
    if not files:
        raise RunError(f"there are no predictions (*.h5ad) in {predictions}")
    more = {name: named(name) for name in figures}
    sets = {} if gene_sets is None else read_gmt(Path(gene_sets))
    store = open_store(embeddings)
    known = store.slides()
    slides: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for file in files:
        slide_id = file.stem
        if slide_id not in known:
            raise RunError(f"{file} is of slide {slide_id}, which {store.location} does not hold")
        if not store.has_expression(slide_id):
            notes.append(f"{slide_id}: left out, the store has no expression of it")
            continue
        slides[slide_id] = _judge(file, slide_id, store, notes, more, sets)
    if not slides:
        raise TrainError(f"none of the slides in {predictions} has expression to be judged against")
    absent = [name for name in known if store.has_expression(name) and name not in slides]
    if absent:
        notes.append(f"not predicted, and so not judged: {listed(absent)}")
    keys = (*(key for key in MEANS if key != "pcc_top50_train"), *more)
    unit, summary = _means(slides.values(), keys)
    found: dict[str, Any] = {"slides": slides, "summary": summary, "unit": unit, "notes": notes}
    new = [slide for slide in slides.values() if not slide["in_sample"]]
    found["in_sample"] = len(slides) - len(new)
    if 0 < len(new) < len(slides):
        found["summary_new"] = _means(new, keys)[1]
    if more:
        found["definitions"] = {name: f"{each.definition} ({each.source})" for name, each in more.items()}
    if sets:
        known_sets = sorted({name for slide in slides.values() for name in slide["gene_sets"]})
        found["gene_sets"] = {
            name: mean_over_units([slide["gene_sets"].get(name) for slide in slides.values()], _places(slides.values()))
            for name in known_sets
        }
        if len(known_sets) < len(sets):
            notes.append(f"{len(sets) - len(known_sets)} of {len(sets)} gene sets have fewer than two predicted genes")
    if out is not None:
        with written_whole(Path(out)) as part:
            part.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return found


def _means(slides: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return what the units are, and the means over them of slides' figures."""
    every = list(slides)
    places = _places(every)
    return units_of(places)[0], {key: mean_over_units([slide[key] for slide in every], places) for key in keys}


def _places(slides: Iterable[Mapping[str, Any]]) -> list[SlideFigures]:
    return [SlideFigures(slide["slide_id"], slide["patient"]) for slide in slides]


def _judge(
    file: Path,
    slide_id: str,
    store: Store,
    notes: list[str],
    more: Mapping[str, Named],
    sets: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return one slide's figures, and add to `notes` what has to be known of them."""
    data, about = _read(file)
    slide = store.read(slide_id, first_view_only=True)
    place = {barcode: i for i, barcode in enumerate(slide.barcodes)}
    strangers = [name for name in data.obs_names if name not in place]
    if strangers:
        raise RunError(
            f"{file} names spots that slide {slide_id} of {store.location} does not have: {listed(strangers)}"
        )
    if data.obs_names.has_duplicates:
        raise RunError(f"{file} names spots twice: {listed(data.obs_names[data.obs_names.duplicated()])}")
    rows = np.array([place[name] for name in data.obs_names], dtype=np.int64)
    truth = _truth(file, data, about, slide)[rows]
    scale = _another_scale(about, slide)
    if scale:
        notes.append(f"{slide_id}: {scale}")
    predicted = np.asarray(data.X, dtype=np.float64)
    if len(rows) < len(slide):
        notes.append(f"{slide_id}: {len(rows)} of its {len(slide)} spots are predicted; the figures are of those alone")
    unknown = int(np.isnan(truth).all(axis=0).sum()) if len(truth) else 0
    if unknown:
        notes.append(f"{slide_id}: {unknown} of the {data.n_vars} genes are not in its expression, and left out")
    missing = ~np.isfinite(predicted) & np.isfinite(truth)
    if missing.any():
        genes = int(missing.any(axis=0).sum())
        notes.append(
            f"{slide_id}: {int(missing.sum()):,} predictions are not numbers: the PCC of {many(genes, 'gene')} counts "
            "as 0, and errors are of the others"
        )
    seen = _seen(file, about).words(slide.image_fingerprint, slide.patient) or str(about.get("in_sample") or "")
    if seen:
        notes.append(f"{slide_id}: {seen}; its figures do not say how good predictions of new slides are")
    genes_of = [str(gene) for gene in data.var_names]
    of_slide = judge(
        predicted.astype(np.float32),
        truth,
        slide.xy[rows],
        slide_id=slide_id,
        patient=slide.patient,
        genes=genes_of,
        points=0,
    )
    left_out = ("fold", "block", "likeness", "pcc_top50_train")  # of training
    judged = {key: value for key, value in asdict(of_slide.figures).items() if key not in left_out}
    if judged["n_genes_pcc_undefined"]:
        notes.append(f"{slide_id}: {headline(judged)}")
    truth = np.where(missing, np.nan, truth)
    predicted = np.where(np.isfinite(predicted), predicted, 0.0)
    judged |= {name: each.of(predicted, truth) for name, each in more.items()}
    if sets:
        judged["gene_sets"] = gene_set_pcc(predicted, truth, genes_of, sets)
    return {**judged, "in_sample": seen or None}


def _seen(file: Path, about: Mapping[str, Any]) -> Seen:
    """Return what the head had seen; nothing where the file does not say, as those of earlier versions."""
    return validate(Seen, json.loads(str(about.get("trained_on") or "{}")), f"{file}, trained_on")


def _read(file: Path) -> tuple[anndata.AnnData, dict[str, Any]]:
    data = read_h5ad(file, RunError)
    try:
        about = dict(data.uns["nh2st_pipe"])
    except KeyError as error:
        raise RunError(
            f"{file} does not say what it is (uns['nh2st_pipe']); was it made by nh2st-pipe predict?"
        ) from error
    except (TypeError, ValueError) as error:
        raise RunError(f"{file}: uns['nh2st_pipe'] is no mapping") from error
    return data, about


def _truth(file: Path, data: anndata.AnnData, about: dict[str, Any], slide: SlideData) -> NDArray[np.float32]:
    """Return the targets of all spots of `slide` for the file's genes, n × G, made as the file says its values are."""
    if "targets" not in about:
        raise RunError(
            f"{file} was made by a version that did not keep how its values are made; predict again, and evaluate that"
        )
    panel = [str(gene) for gene in about["panel"]]
    strangers = [gene for gene in data.var_names if gene not in set(panel)]
    if strangers:
        raise RunError(f"{file} has genes that are not of the panel it was predicted with: {listed(strangers)}")
    recipe = validate(TargetRecipe, as_kept(json.loads(str(about["targets"]))), f"{file}, targets")
    common = [str(gene) for gene in about["scale_genes"]] if "scale_genes" in about else None
    try:
        whole = targets(slide, panel, recipe, common).values
    except NH2STError as error:
        raise RunError(f"{file} cannot be judged: {reason_of(error)}") from error
    column = {gene: i for i, gene in enumerate(panel)}
    return whole[:, [column[gene] for gene in data.var_names]]


def _another_scale(about: Mapping[str, Any], slide: SlideData) -> str | None:
    """Say in words that a slide's counts are scaled over far other genes than the head's targets were, if so."""
    genes = int(about.get("n_scale_genes", 0))
    have = len(slide.genes) if "scale_genes" not in about else len(set(about["scale_genes"]).intersection(slide.genes))
    if not genes or abs(have / genes - 1) <= _OTHER_GENES:
        return None
    return (
        f"its counts are scaled over {have:,} genes, and those of the training slides were over {genes:,}: its MSE and "
        "MAE are of two scales, its PCC hardly"
    )
