from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import polars as pl
import pytest
import torch

from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.train import ContextHead, load_train_recipe
from nh2st_pipe.reporting.page import report
from nh2st_pipe.training.halves import half_pcc
from nh2st_pipe.training.run import train
from tests.conftest import Study
from tests.training.test_choosing import GENES, one_patient, quiet, slides


def test_halves_are_judged_by_the_other_halves_of_the_other_slides() -> None:
    data, recipe = slides([30, 24, 40]), load_train_recipe("ridge")
    assert data.target is not None
    right = torch.zeros(len(data), dtype=torch.bool)
    for part in data.parts:
        right[part.rows] = torch.from_numpy(part.xy[:, 0] > np.median(part.xy[:, 0]))
    found: dict[str, list[float]] = {gene: [] for gene in GENES}
    for held in data.parts:
        for side in (right, ~right):
            learnt, judged = side.clone(), ~side
            learnt[held.rows] = False
            judged[: held.start] = judged[held.stop :] = False
            model = registry.fit(recipe, data.subset(learnt), GENES, {}).model
            truth = data.target[judged].numpy()
            for gene, value in zip(GENES, gene_metrics(model.predict(data.subset(judged)), truth)["pcc"], strict=True):
                found[gene].append(float(value))
    got = half_pcc(recipe, data, one_patient(data), GENES, quiet)
    assert got == {gene: pytest.approx(np.mean(values), abs=1e-6) for gene, values in found.items()}
    assert got["a"] > got["b"]  # type: ignore[operator]  # only the first gene follows the embedding


def test_a_single_slides_halves_are_judged_by_each_other_and_tiny_ones_not() -> None:
    recipe = load_train_recipe("ridge")
    single = slides([60])
    assert half_pcc(recipe, single, one_patient(single), GENES, quiet)["a"] is not None
    tiny = slides([60, 15])
    assert half_pcc(recipe, tiny, one_patient(tiny), GENES, quiet) == {}
    flat = slides([60, 60])
    assert flat.target is not None
    constant = torch.column_stack((flat.target[:, 0], torch.ones(120)))
    flat = replace(flat, target=constant, raw=constant)
    assert half_pcc(recipe, flat, one_patient(flat), GENES, quiet)["b"] is None


def test_heads_are_trained_in_brief_for_it() -> None:
    assert load_train_recipe("nh2st").head.in_brief() is None
    assert half_pcc(load_train_recipe("nh2st"), slides([30, 30]), {}, GENES, quiet) == {}
    brief = load_train_recipe("nh2st-context").head.in_brief()
    assert isinstance(brief, ContextHead)
    assert brief.network is None
    alone = load_train_recipe("nh2st-context", ["head.kernel=null"]).head.in_brief()
    assert isinstance(alone, ContextHead)
    assert alone.network is not None
    assert alone.network.members == 1


def test_it_stands_in_the_table_the_predictions_and_the_report(study: Study) -> None:
    study.stored(views=8)
    run = train(
        study.folder / "store.zarr", recipe="ridge", genes=6, out=study.folder / "run", settings=["baselines=[mean]"]
    )
    table = pl.read_csv(run.path / "per_gene.csv")
    own = dict(table.filter(pl.col("head") == "ridge").select("gene", "half_pcc").iter_rows())
    assert table.filter(pl.col("head") == "mean")["half_pcc"].null_count() == 6
    done = predict(run.path, embeddings=study.folder / "store.zarr", out=study.folder / "p")
    var = anndata.read_h5ad(done.files["s0"]).var
    assert set(var.columns) == {"cv_pcc", "cv_low", "cv_high", "trusted", "judged", "half_pcc", "half_width"}
    for gene in own:
        assert var["half_pcc"][gene] == pytest.approx(own[gene])
    assert not np.allclose(var["half_pcc"], var["cv_pcc"])
    assert '"key":"half"' in report(run.path).read_text()
