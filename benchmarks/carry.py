"""What weighing by what carries over is worth, on slides like the training slides and on stand-ins for another patient.

    python benchmarks/carry.py STORE [--stained STORE] [--seeds 1,2,3] [--set key=value …]

Columns: each slide left out in turn; the same, seen under another stain (benchmarks/restain.py); the left half of each
slide by a head trained on the right halves of the others. Rows: the same heads, weighed otherwise. PCC / top 50, means
over slides and seeds, and the median g (1: like the training slides, 0: unlike). Prints a Markdown table.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nh2st_pipe.data.blocks import part_of
from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.study import Study
from nh2st_pipe.evaluation.metrics import gene_metrics, top_mean
from nh2st_pipe.heads import registry
from nh2st_pipe.recipes.train import CarryRecipe, load_train_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.carrying import learn_carry

ALWAYS_LIKE, ALWAYS_UNLIKE = {"gate_from": -2.0, "gate_to": -1.0}, {"gate_from": 2.0, "gate_to": 3.0}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "as it is": {},
    "nothing retrieved": {"retrieval": None},
    "retrieved alone": {"q": (0.0, 0.0), "p": (0.0, 0.0)},
    "amplitude alone": {"p": (0.0, 0.0), "retrieval": None},
    "reliability alone": {"q": (0.0, 0.0), "retrieval": None},
    "q = 2, every slide": {"q": (2.0, 2.0), "p": (0.0, 0.0), "retrieval": None, **ALWAYS_LIKE},
    "q = 1, p = 1, every slide": {"q": (1.0, 1.0), "p": (1.0, 1.0), "retrieval": None, **ALWAYS_LIKE},
    "every slide taken for unlike": ALWAYS_UNLIKE,
}


def main(
    store: Annotated[Path, typer.Argument(help="Store with expression.")],
    stained: Annotated[Path | None, typer.Option(help="The same slides under another stain.")] = None,
    seeds: str = "1,2,3",
    setting: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    study = _load(store)
    kinds = {"left out": (study, study), "halves": (_halves(study, 1), _halves(study, 0))}
    if stained is not None:
        kinds["re-stained"] = (study, _load(stained))
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    gates: dict[str, list[float]] = defaultdict(list)
    for seed in map(int, seeds.split(",")):
        recipe = load_train_recipe("nh2st-context", [f"seed={seed}", "baselines=[]", "carry={}", *(setting or ())])
        for held in sorted(study.slides):
            trained: dict[int, tuple[registry.Trained, list[str]]] = {}
            for kind, (of, test) in kinds.items():
                if id(of) not in trained:
                    trained[id(of)] = _train(of, [name for name in sorted(of.slides) if name != held], recipe)
                model, panel = trained[id(of)][0].model, trained[id(of)][1]
                carry = model.carry
                assert carry is not None
                truth = test.targets([held], panel, recipe)[held].values
                samples = test.samples([held], recipe, None)
                for name, changes in VARIANTS.items():
                    other = CarryRecipe.model_validate({**carry.recipe.model_dump(), **(changes or {})})
                    model.carry = None if changes is None else replace(carry, recipe=other)
                    said = model.predict_spots(samples)
                    pcc = gene_metrics(said.values, truth)["pcc"]
                    found[name, kind].append((float(np.nanmean(pcc)), top_mean(pcc) or 0.0))
                    if changes == {}:
                        gates[kind].append(carry.gate(said.likeness))
                model.carry = carry
    print("| weighed |", " | ".join(kinds), "|\n|---|" + "---|" * len(kinds))
    for name in VARIANTS:
        means = [np.mean(found[name, kind], axis=0) for kind in kinds]
        print(f"| {name} |", " | ".join(f"{pcc:.4f} / {top:.4f}" for pcc, top in means), "|")
    print("| g |", " | ".join(f"{np.median(gates[kind]):.2f}" for kind in kinds), "|")


def _load(store: Path) -> Study:
    opened = open_store(store)
    return Study.load(opened, opened.slides())


def _halves(study: Study, side: int) -> Study:
    """Return a study of the left (0) or right (1) half of every slide."""
    slides, places = {}, {}
    for name, slide in study.slides.items():
        right = slide.xy[:, 0] > np.median(slide.xy[:, 0])
        rows = np.flatnonzero(right == bool(side))
        slides[name], places[name] = part_of(slide, rows, side + 1), study.places[name][rows]
    return replace(study, slides=slides, places=places)


def _train(study: Study, names: list[str], recipe: Any) -> tuple[registry.Trained, list[str]]:
    panel = choose_panel([study.slides[name] for name in names], recipe.targets, list(study.slides.values()))
    samples = study.samples(names, recipe, study.targets(names, panel, recipe))
    trained = registry.fit(recipe, samples, panel, {})
    patients = {part.name: study.slides[part.slide_id].patient for part in samples.parts}
    trained.model.weigh_by(learn_carry(recipe, samples, patients, panel, lambda words: None)[0])
    return trained, panel


if __name__ == "__main__":
    typer.run(main)
