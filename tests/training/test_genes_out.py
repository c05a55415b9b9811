"""Genes left out beside slides: nothing of them is read, the table is of what it says, and a model keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import polars as pl
import pytest
import torch

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.data.gene_vectors import GeneVectors
from nh2st_pipe.data.study import Study as Slides
from nh2st_pipe.data.targets import Targets
from nh2st_pipe.evaluation.judge import evaluate
from nh2st_pipe.evaluation.unseen import ALL, NEAREST, QUERY, SEEN
from nh2st_pipe.heads.query import Query
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training import genes_out
from nh2st_pipe.training.genes_out import leave_genes_out, nearest_genes
from nh2st_pipe.training.run import Run, resolve, train
from tests.cli.test_commands import call
from tests.conftest import GENES, Study
from tests.heads.test_context import TRAIN
from tests.heads.test_query import MIX, UNSEEN, made, trained
from tests.heads.test_query import SEEN as NAMES

SMALL = [
    "baselines=[]", "head.network.components=4", "head.network.width=8", "head.network.epochs=2",
    "head.network.members=1", "head.network.attention=null",
]  # fmt: skip


def vectors(folder: Path, genes: list[str] = GENES) -> Path:
    """Vectors that follow what `write_spots` draws, for these genes and three that no slide has."""
    names = [*genes, "new1", "new2", "new3"]
    level = np.linspace(0.2, 4, len(names))
    path = folder / "vectors.csv"
    pl.DataFrame({"gene": names, "a": level, "b": level**2}).write_csv(path)
    return path


def ran(study: Study, **options: Any) -> Run:
    if not (study.folder / "store.zarr").exists():
        study.stored()
    return train(study.folder / "store.zarr", recipe="nh2st-query", out=study.folder / "run", settings=SMALL, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.heads.query.FEWEST_GENES", 3)


@pytest.mark.usefixtures("few")
def test_a_run_tells_what_is_reached_on_genes_it_never_saw_and_its_model_predicts_others(study: Study) -> None:
    study.stored()
    run = ran(study, gene_vectors=vectors(study.folder), leave_genes_out=3)
    figures = run.metrics["unseen_genes"]
    assert [row["by"] for row in figures["rows"]] == [SEEN, QUERY, NEAREST, ALL]
    assert (figures["genes"], figures["folds"], figures["units"]) == (len(GENES), 3, 3)
    assert figures["vectors"] == "vectors.csv, no count of them read"
    own = run.metrics["summary"]["pcc"]
    assert figures["rows"][0]["pcc"] == pytest.approx(own)  # every gene was left out once
    table = pl.read_csv(run.path / "unseen_genes.csv")
    assert set(table["gene"]) == set(GENES)
    done = predict(
        run.path,
        embeddings=study.folder / "store.zarr",
        out=study.folder / "p",
        query=["new2", GENES[0]],
        genes=GENES[:2],
    )
    data = anndata.read_h5ad(done.files["s0"])
    assert list(data.var_names) == [*GENES[:2], "new2"]
    assert data.var["seen"].tolist() == [True, True, False]
    assert not data.var["trusted"]["new2"]
    assert not data.var["judged"]["new2"]
    assert np.isnan(data.var["cv_pcc"]["new2"])
    assert np.isfinite(data.X).all()
    assert data.uns["nh2st_pipe"]["unseen"].startswith("1 gene predicted from vectors alone, and not trusted: ")
    assert f"{figures['rows'][1]['pcc']:.3f}" in data.uns["nh2st_pipe"]["unseen"]
    assert data.uns["nh2st_pipe"]["unseen"] in done.notices
    plain = predict(run.path, embeddings=study.folder / "store.zarr", out=study.folder / "q", genes=GENES[:2])
    assert np.array_equal(anndata.read_h5ad(plain.files["s0"]).X, data.X[:, :2])
    both = predict(
        run.path,
        embeddings=study.folder / "store.zarr",
        out=study.folder / "r",
        query=[GENES[3], "new1"],
        genes=GENES[:1],
    )
    assert list(anndata.read_h5ad(both.files["s0"]).var_names) == [GENES[0], GENES[3], "new1"]  # known or not
    evaluate(study.folder / "p", study.folder / "store.zarr")
    with pytest.raises(UsageError, match="none of which is trusted"):
        predict(run.path, embeddings=study.folder / "store.zarr", query=["new1"], trusted_only=True)
    with pytest.raises(UsageError, match="not trained on nwe1; did you mean 'new1'"):
        predict(run.path, embeddings=study.folder / "store.zarr", query=["nwe1"])


@pytest.mark.usefixtures("few")
def test_the_command_prints_the_table(study: Study) -> None:
    study.stored()
    said = call(
        "train", "--embeddings", str(study.folder / "store.zarr"), "--recipe", "nh2st-query", "--out",
        str(study.folder / "run"), "--gene-vectors", str(vectors(study.folder)), "--leave-genes-out", "2",
        *(part for each in SMALL for part in ("--set", each)),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert (
        f"{len(GENES)} genes left out in 2 folds, on slides that were left out too; their vectors: vec" in said.stdout
    )
    for name in (SEEN, QUERY, NEAREST, ALL):
        assert any(line.startswith(name) for line in said.stdout.splitlines())
    again = call(
        "predict", "--model", str(study.folder / "run"), "--embeddings", str(study.folder / "store.zarr"), "--out",
        str(study.folder / "p"), "--query", "new1,new3",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "2 genes predicted from vectors alone" in again.stdout + again.stderr


def fold_of(study: Study, **changes: Any) -> tuple[Slides, TrainRecipe, Fold, dict[str, Targets]]:
    recipe = resolve("nh2st-query", [*SMALL, "leave_genes_out=2"], None, None, None, **changes)
    slides = Slides.load(open_store(study.folder / "store.zarr"), ["s0", "s1", "s2"])
    fold = Fold("P2", ("s0", "s1"), ("s2",))
    return slides, recipe, fold, dict(slides.targets(["s0", "s1", "s2"], GENES, recipe))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("by_file", [True, False])
def test_no_count_of_a_gene_that_is_left_out_moves_its_prediction_where_vectors_are_given(
    study: Study, by_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.stored()
    changes = {"gene_vectors": vectors(study.folder)} if by_file else {}
    slides, recipe, fold, truth = fold_of(study, **changes)
    told = list[str]()
    before = leave_genes_out(slides, recipe, fold, GENES, truth, told.append)
    assert [words for words in told if "genes left out" in words][-1] == "P2, genes left out 2 of 2"
    assert sorted(before[QUERY][0].genes) == sorted(GENES)
    plain = Slides.targets
    moved = GENES[1]

    def targets(self: Slides, names: Any, panel: list[str], of: TrainRecipe) -> dict[str, Targets]:
        """What is asked of training slides, with another's values for one gene."""
        found = dict(plain(self, names, panel, of))
        for each in found.values():
            if moved in panel:
                for values in (each.values, each.raw):
                    values[:, list(panel).index(moved)] = np.random.default_rng(0).random(len(values))
        return found

    monkeypatch.setattr(Slides, "targets", targets)
    after = leave_genes_out(slides, recipe, fold, GENES, truth, told.append)
    at = before[QUERY][0].genes.index(moved)
    for of in (QUERY, NEAREST, ALL):
        same = before[of][0].pcc[at] == after[of][0].pcc[at]
        assert same == (by_file or of == ALL), of
    other = [i for i, gene in enumerate(before[QUERY][0].genes) if gene != moved]
    assert not np.array_equal(before[QUERY][0].pcc[other], after[QUERY][0].pcc[other])  # those that learnt from it


@pytest.mark.usefixtures("few")
def test_test_slides_are_not_trained_on_and_genes_without_a_vector_not_judged(study: Study) -> None:
    study.stored()
    slides, recipe, fold, truth = fold_of(study, gene_vectors=vectors(study.folder, GENES[1:]))
    asked = list[tuple[str, ...]]()
    plain = slides.samples

    class Watched(Slides):
        def samples(self, names: Any, of: TrainRecipe, target: Any) -> Any:
            if target is not None:
                asked.append(tuple(names))
            return plain(names, of, target)

    watched = Watched(slides.path, slides.contract, slides.slides, slides.places, slides.cache)
    found = leave_genes_out(watched, recipe, fold, GENES, truth, lambda words: None)
    assert set(asked) == {("s0", "s1")}
    assert sorted(found[QUERY][0].genes) == sorted(GENES[1:])
    with pytest.raises(TrainError, match="2 genes cannot be left out in 2 folds"):
        leave_genes_out(watched, recipe, fold, GENES[:2], truth, lambda words: None)


def test_the_nearest_genes_are_those_of_the_highest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genes_out, "N_NEAREST", 2)
    of = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [2, 0.1], [0.1, -3]], np.float32)
    known = GeneVectors(("a", "b", "c", "d", "x", "y"), of)
    model = Query(2, ["a", "none", "b", "c", "d"], {"kind": "nh2st-query"})
    near = nearest_genes(model, model.genes, ["x", "y"], known)
    assert [rows.tolist() for rows in near] == [[0, 2], [4, 0]]  # places among all that were trained on
    taught = trained().taught(made(TRAIN, NAMES), made(TRAIN, UNSEEN), UNSEEN)
    near = nearest_genes(taught, NAMES, UNSEEN, None)
    profile = taught.profiles()
    like = torch.nn.functional.cosine_similarity(torch.from_numpy(profile[30]), torch.from_numpy(profile[:30]))
    assert near[0].tolist() == like.argsort(descending=True)[:2].tolist()
    assert len(MIX) == len(profile)


def test_gene_vectors_are_of_heads_that_take_them_and_known_by_their_hash(study: Study) -> None:
    path = vectors(study.folder)
    with pytest.raises(UsageError, match="--gene-vectors is of heads that take genes by query; ridge predicts"):
        resolve("ridge", [], None, None, None, gene_vectors=path)
    recipe = resolve("nh2st-query", [], None, None, None, gene_vectors=path)
    again = resolve("nh2st-query", [f"head.vectors={path}"], None, None, None)
    assert recipe == again
    path.write_text(path.read_text().replace("new1", "new9"))
    assert resolve("nh2st-query", [], None, None, None, gene_vectors=path) != recipe
    with pytest.raises(UsageError, match=r"none\.csv cannot be read"):
        resolve("nh2st-query", [], None, None, None, gene_vectors=study.folder / "none.csv")
