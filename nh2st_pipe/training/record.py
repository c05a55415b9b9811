"""What a run keeps of a training: what its model says about itself, metrics.json, per_gene.csv, predictions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nh2st_pipe
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.pitch import pitch_in_tiles
from nh2st_pipe.data.study import Study
from nh2st_pipe.evaluation.statistics import gene_figures, intervals_of
from nh2st_pipe.evaluation.trust import Trust
from nh2st_pipe.evaluation.unseen import QUERY, in_words, unseen_figures
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.registry import Trained, source_of
from nh2st_pipe.recipes.train import QueryHead, TrainRecipe
from nh2st_pipe.runs.about import RUN_FORMAT, About, Seen, TrainedOn
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.training.fold import FoldResult, Said
from nh2st_pipe.training.outcome import Outcome

__all__ = [
    "SlideWriter",
    "about",
    "gene_table",
    "metrics_of",
    "setting_of",
    "unseen_genes",
    "write_in_sample",
    "write_predictions",
]


def about(study: Study, recipe: TrainRecipe, outcome: Outcome, trust: Trust) -> dict[str, Any]:
    """Return what a model says about itself."""
    slides = study.slides.values()
    genes = gene_figures(outcome.slides) if outcome.slides else []
    asked = unseen_genes(recipe, outcome)
    reached = {"queries": {"reached": in_words(asked["unseen_genes"])}} if asked else {}
    pitches = [pitch for slide in slides if (pitch := pitch_in_tiles(slide)) is not None]
    return (
        About(
            format=RUN_FORMAT,
            recipe=recipe.name,
            targets=recipe.targets,
            features=recipe.features,
            store=study.contract,
            unit=recipe.targets.unit(),
            trained_on=tuple(
                TrainedOn(slide_id=s.slide_id, patient=s.patient, image=s.image_fingerprint, mpp=s.mpp) for s in slides
            ),
            pitch=float(np.median(pitches)) if pitches else None,
            likeness=outcome.likeness(),
            cv_pcc={each.gene: each.pcc for each in genes},
            cv_low={each.gene: each.pcc_low for each in genes if each.pcc_low is not None},
            cv_high={each.gene: each.pcc_high for each in genes if each.pcc_high is not None},
            trusted=trust.verdicts,
            trusted_in_words=trust.words() if trust.verdicts else "",
            intervals=intervals_of(outcome.slides),
            **scaled_over(study),
            smooth_predictions=recipe.smooths_predictions(),
            version=nh2st_pipe.__version__,
        ).model_dump(mode="json")
        | reached
    )


def scaled_over(study: Study) -> dict[str, Any]:
    """Return `scale_genes` and `n_scale_genes`, as About and predictions keep them."""
    common = study.common_genes
    if common is not None:
        return {"scale_genes": common, "n_scale_genes": len(common)}
    return {"scale_genes": (), "n_scale_genes": len(next(iter(study.slides.values())).genes)}


def gene_table(outcomes: dict[str, Outcome], own: str, half_pcc: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return the rows of per_gene.csv: every head's, and for the run's own what halves of the tissue say of a gene."""
    rows = [row for name, outcome in outcomes.items() for row in outcome.per_gene(name)]
    if not half_pcc:
        return rows
    return [{**row, "half_pcc": half_pcc.get(row["gene"]) if row["head"] == own else None} for row in rows]


@dataclass(frozen=True)
class SlideWriter:
    """Writes what a head says of a slide that it has not seen, with what it is in uns."""

    folder: Path
    recipe: TrainRecipe
    one_panel: bool = True
    """Whether all spots' values were scaled over the panel; see FoldResult."""

    def path(self, name: str) -> Path:
        """Return where a slide's prediction lies."""
        return self.folder / f"{name}.h5ad"

    def __call__(self, study: Study, said: Said) -> None:
        """Write one."""
        recipe = self.recipe
        about = _about_fold(study, recipe, said.fold)
        if said.caution:
            about["caution"] = said.caution
        if said.predicted.carried is not None and (words := said.predicted.carried.words()):
            about["carried"] = words
        made = recipe.targets if self.one_panel or recipe.targets.scale_over == "all" else None
        write_prediction(
            self.path(said.name),
            study.slides[said.name],
            said.panel,
            said.predicted,
            said.target,
            made,
            about,
            **scaled_over(study),
        )


def write_predictions(writer: SlideWriter, study: Study, result: FoldResult) -> None:
    """Write the predictions that a result holds."""
    for name, predicted in result.predicted.items():
        caution = result.cautions.get(name, "")
        writer(study, Said(name, result.fold, result.panel, predicted, result.target[name], caution))


def _about_fold(study: Study, recipe: TrainRecipe, fold: Fold) -> dict[str, Any]:
    known = ((study.slides[name].image_fingerprint, study.slides[name].patient) for name in fold.train)
    blocks = recipe.folds == "block"
    seen = study.once(("seen", fold, blocks), lambda: Seen.of(known, blocks=blocks).model_dump_json())
    return {
        "trained_on": seen,
        "recipe": recipe.name,
        "fold": fold.name,
        "out_of_fold": True,
        "unit": recipe.targets.unit(),
        "encoder": study.contract.identity["name"],
        "weights_sha256": study.contract.weights.sha256,
        "version": nh2st_pipe.__version__,
    }


def write_in_sample(folder: RunFolder, study: Study, recipe: TrainRecipe, model: HeadModel) -> None:
    """Write what a head says of the slides that it was trained on, labelled so: there are no others without folds."""
    said = {
        "recipe": recipe.name,
        "out_of_fold": False,
        "in_sample": "trained on this slide",
        "trained_on": Seen.of((s.image_fingerprint, s.patient) for s in study.slides.values()).model_dump_json(),
        "unit": recipe.targets.unit(),
        "encoder": study.contract.identity["name"],
        "weights_sha256": study.contract.weights.sha256,
        "version": nh2st_pipe.__version__,
    }
    half = {"half_pcc": model.about.get("half_pcc", {})}
    for name, slide in study.slides.items():
        predicted = model.predict_spots(study.samples([name], recipe, None))
        truth = study.targets([name], model.genes, recipe)[name].values
        path = folder.part / "predictions" / f"{name}.h5ad"
        write_prediction(path, slide, model.genes, predicted, truth, recipe.targets, said, half, **scaled_over(study))


def metrics_of(
    recipe: TrainRecipe, study: Study, outcomes: dict[str, Outcome], final: Trained, notes: list[str]
) -> dict[str, Any]:
    """Return what metrics.json holds."""
    return {
        **setting_of(recipe, study),
        "notes": notes,
        **outcomes[recipe.name].record(),
        **unseen_genes(recipe, outcomes[recipe.name]),
        "baselines": {name: o.record() for name, o in outcomes.items() if name != recipe.name},
        "model": {
            "genes": len(final.model.genes),
            "epochs": final.best_epoch,
            "slides": sorted(study.slides),
            "chosen": final.chosen,
        },
    }


def unseen_genes(recipe: TrainRecipe, outcome: Outcome) -> dict[str, Any]:
    """Return what was reached on genes that were left out, under `unseen_genes`; nothing where none were."""
    if recipe.leave_genes_out is None or not outcome.unseen.get(QUERY):
        return {}
    assert isinstance(recipe.head, QueryHead)
    file = recipe.head.vectors
    words = (
        "what training slides measured of each gene" if file is None else f"{Path(file).name}, no count of them read"
    )
    return {"unseen_genes": unseen_figures(outcome.slides, outcome.unseen, recipe.leave_genes_out, words)}


def setting_of(recipe: TrainRecipe, study: Study) -> dict[str, Any]:
    """Return what is known of a run before anything is trained: what is asked of which data."""
    contract, slides = study.contract, study.slides.values()
    return {
        "format": RUN_FORMAT,
        "head": recipe.name,
        "protocol": recipe.protocol,
        "protocol_in_words": recipe.protocol_in_words(),
        "folds_by": f"patient:{recipe.folds}" if recipe.folds.isdecimal() else recipe.folds,
        "n_slides": len(slides),
        "n_patients": len({slide.patient for slide in slides}),
        "n_spots": sum(map(len, slides)),
        "views": study.cache.n_views,
        "store": {
            "path": study.path,
            "encoder": contract.identity["name"],
            "weights_sha256": contract.weights.sha256,
            "weights_source": contract.weights.source,
            "origin": contract.origin,
            "precision": contract.precision,
            "tile": contract.tile,
            "views": contract.views,
            "dim": contract.dim,
        },
        "software": {
            "nh2st_pipe": nh2st_pipe.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": str(study.device),
            **({} if (plug_in := source_of(recipe.head.kind)) is None else {"plug_in": plug_in}),
        },
    }
