from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import anndata
import h5py
import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import yaml
from PIL import Image

from nh2st_pipe.core.errors import ManifestError, RunError, StoreError, TrainError, UsageError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data import study as data_study
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.evaluation.judge import evaluate
from nh2st_pipe.evaluation.metrics import mean_pcc
from nh2st_pipe.evaluation.statistics import mean_interval
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.store.format import SlideRecord, read_signed, signed
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.fold import FoldTask, fit_all, run_fold
from nh2st_pipe.training.run import Run, train
from tests.cli.test_commands import call
from tests.conftest import GENES, Study, picture, write_spots

SMALL = ("head.width=16", "head.hidden=12", "head.decoder_hidden=6", "head.heads=4", "fit.epochs=4", "fit.patience=2")


def yaml_recipe(path: Path) -> TrainRecipe:
    return load_train_recipe(path / "recipe.yaml")


def run(study: Study, out: str = "run", **options: Any) -> Run:
    if not (study.folder / "store.zarr").exists():
        study.stored(views=8)
    options = {"recipe": "nh2st", "genes": 10, "settings": SMALL, **options}
    return train(study.folder / "store.zarr", out=study.folder / out, **options)


def test_the_run_folder_holds_what_it_should(study: Study) -> None:
    result = run(study)
    metrics = result.metrics
    assert result.path == study.folder / "run"
    assert not (study.folder / "run.part").exists()
    assert json.loads((result.path / "metrics.json").read_text()) == metrics
    assert [row["head"] for row in result.rows()] == [
        "nh2st",
        "hest-ridge",
        "mean",
        "knn",
        "mlp",
        "ridge",
        "ridge-context",
    ]
    assert (metrics["protocol"], metrics["n_slides"], metrics["n_patients"]) == ("nested", 3, 3)
    assert [fold["fold"] for fold in metrics["folds"]] == ["P0", "P1", "P2"]
    for fold in metrics["folds"]:
        assert {"pcc", "pcc_top50", "mse", "mae", "n_spots", "n_genes", "train_seconds", "epochs"} <= set(fold)
        assert (fold["n_spots"], fold["n_genes"]) == (25, 10)
    assert metrics["baselines"]["mean"]["summary"]["pcc"] == 0.0  # it does not vary, and says nothing of any gene
    of_ridge = metrics["baselines"]["ridge"]
    ends = mean_interval([fold["pcc"] for fold in of_ridge["folds"]])
    assert ends is not None
    assert (of_ridge["summary"]["pcc_low"], of_ridge["summary"]["pcc_high"]) == pytest.approx(
        (max(-1, ends[0]), min(1, ends[1]))
    )
    assert (of_ridge["summary"]["unit"], of_ridge["summary"]["n_units"]) == ("patient", 3)
    assert {fold["chosen"]["head.alpha"] for fold in of_ridge["folds"]} <= {300, 1000, 3000, 10000, 30000}

    # What is in the predictions is what is in the metrics.
    data = anndata.read_h5ad(result.path / "predictions" / "s1.h5ad")
    assert mean_pcc(np.asarray(data.X), data.layers["target"], []) == pytest.approx(metrics["folds"][1]["pcc"])
    assert data.obsm["spatial"].shape == (25, 2)
    assert "hires" in data.uns["spatial"]["s1"]["images"]
    genes = pl.read_csv(result.path / "per_gene.csv").filter(pl.col("head") == "ridge")
    mean = np.mean([fold["pcc"] for fold in metrics["baselines"]["ridge"]["folds"]])
    assert np.average(genes["pcc"], weights=genes["n_folds"]) == pytest.approx(mean, abs=1e-6)
    slides = pl.read_csv(result.path / "per_slide.csv")
    assert slides.height == 7 * 3
    history = pl.read_csv(result.path / "history.csv")
    assert set(history["phase"]) == {"choose", "train"}
    assert set(history["fold"]) == {"P0", "P1", "P2", "all slides"}
    events = [json.loads(line)["event"] for line in (result.path / "log.jsonl").read_text().splitlines()]
    assert (events[0], events[-1], events.count("fold")) == ("start", "end", 21)
    model = load_model(result.path)
    assert len(model.genes) == 10
    assert model.about["store"]["encoder"]["name"] == "fake"


def test_the_resolved_recipe_repeats_the_run(study: Study) -> None:
    first = run(study)
    recipe = yaml.safe_load((first.path / "recipe.yaml").read_text())
    assert (recipe["targets"]["genes"], recipe["fit"]["epochs"], recipe["folds"]) == (10, 4, "patient")
    again = run(study, "again", recipe=first.path / "recipe.yaml", genes=None, settings=())
    for one, two in zip(first.metrics["folds"], again.metrics["folds"], strict=True):
        assert {k: v for k, v in one.items() if k != "train_seconds"} == {
            k: v for k, v in two.items() if k != "train_seconds"
        }


@pytest.mark.parametrize("recipe", ["nh2st", "ridge-context", "knn", "nh2st-context"])
def test_the_test_slides_choose_nothing(study: Study, recipe: str) -> None:
    """Other counts on the test slide: the same genes, epochs and predictions for it."""
    few = {
        "nh2st": (*SMALL, "baselines=[]"),
        "nh2st-context": ("head.network.epochs=3", "head.network.members=2", "baselines=[]"),
    }
    settings = few.get(recipe, ())
    first = run(study, recipe=recipe, settings=settings, genes=6)
    before = anndata.read_h5ad(first.path / "predictions" / "s0.h5ad")
    path = study.folder / "s0.h5ad"
    original = anndata.read_h5ad(path)
    rng = np.random.default_rng(5)

    def reverse(data: anndata.AnnData) -> None:
        data.X = sp.csr_matrix(rng.permutation(original.X.toarray()[:, ::-1]))

    write_spots(
        path, original.obsm["spatial"], grid=original.obs[["array_row", "array_col"]].to_numpy(), change=reverse
    )
    study.embed(views=8, redo_changed=True)
    second = run(study, "second", recipe=recipe, settings=settings, genes=6)
    after = anndata.read_h5ad(second.path / "predictions" / "s0.h5ad")
    assert list(before.var_names) == list(after.var_names)
    assert np.array_equal(before.X, after.X)
    assert not np.array_equal(before.layers["target"], after.layers["target"])
    for key in ("epochs", "chosen"):
        assert first.metrics["folds"][0].get(key) == second.metrics["folds"][0].get(key)


@pytest.mark.parametrize("recipe", ["nh2st", "ridge-context", "knn", "mlp", "nh2st-context"])
def test_what_a_test_slide_looks_like_moves_no_prediction_of_another(study: Study, recipe: str) -> None:
    """Features are scaled, centred and compared over the training slides: other test slides are not looked at."""
    settings = {"nh2st": SMALL, "mlp": ("head.network.epochs=2",), "nh2st-context": ("head.network.epochs=2",)}
    resolved = load_train_recipe(recipe, (*settings.get(recipe, ()), "targets.genes=6"))
    fold = Fold("of two", train=("s2",), test=("s0", "s1"))
    study.stored(views=8)
    first = run_fold(FoldTask(str(study.folder / "store.zarr"), resolved, fold)).predicted
    Image.fromarray(255 - picture(240, 240, 77) // 3).save(study.folder / "s1.png")
    study.embed(views=8, redo_changed=True)
    second = run_fold(FoldTask(str(study.folder / "store.zarr"), resolved, fold)).predicted
    assert np.array_equal(first["s0"].values, second["s0"].values)
    assert not np.array_equal(first["s1"].values, second["s1"].values)


def test_paper_protocol_says_what_it_does(study: Study) -> None:
    result = run(study, settings=(*SMALL, "protocol=paper"))
    assert "ON THE TEST FOLD" in result.metrics["protocol_in_words"]
    for fold, group in zip(result.metrics["folds"], ("P0", "P1", "P2"), strict=True):
        history = pl.read_csv(result.path / "history.csv").filter(pl.col("fold") == group)
        assert fold["pcc"] == pytest.approx(history["watched_pcc"].max())
    panels = {tuple(anndata.read_h5ad(p).var_names) for p in (result.path / "predictions").glob("*.h5ad")}
    assert len(panels) == 1


def test_what_is_asked_for_changes_a_recipe_that_is_a_value_too(study: Study) -> None:
    study.stored()
    recipe = load_train_recipe("ridge")
    made = run(study, recipe=recipe, settings=["head.alpha=7", "choose={}"], genes=["G01", "G03"], folds=2, seed=5)
    used = yaml_recipe(made.path)
    assert (used.head.alpha, used.folds, used.seed) == (7, "2", 5)  # type: ignore[union-attr]
    assert used.targets.genes == ("G01", "G03")
    assert recipe.seed == 2021


@pytest.mark.parametrize(("of_folds", "expected"), [([1, 2, 4], 2), ([1, 3], 2), ([4, 4, 1, 1], 2)])
def test_the_kept_model_is_trained_for_the_median_of_the_folds_epochs(
    study: Study, of_folds: list[int], expected: int
) -> None:
    study.stored()
    recipe = load_train_recipe("nh2st", (*SMALL, "targets.genes=6"))
    kept = data_study.Study.load(open_store(study.folder / "store.zarr"), ["s0", "s1"])
    final = fit_all(kept, recipe, of_folds, {})
    assert final.best_epoch == expected
    assert [row["epoch"] for row in final.history] == list(range(1, expected + 1))


def test_training_without_folds_gives_a_model_and_no_figures(study: Study) -> None:
    result = run(study, folds="none")
    assert result.metrics["summary"] is None
    assert result.metrics["folds"] == []
    assert result.metrics["model"]["epochs"] >= 1
    assert load_model(result.path).genes
    history = pl.read_csv(result.path / "history.csv")
    assert history["phase"].unique().sort().to_list() == ["choose", "train"]
    chosen = history.filter(pl.col("phase") == "choose").sort("watched_pcc")["epoch"].last()
    assert chosen == result.metrics["model"]["epochs"]


def test_a_single_slide_can_be_trained_on(make_study: Callable[..., Study]) -> None:
    study = make_study(1)
    assert run(study, folds="none").metrics["model"]["slides"] == ["s0"]
    with pytest.raises(TrainError, match="need at least two slides, and there is one"):
        run(study, "two", folds="slide")


def test_a_gene_file_and_genes_that_a_test_slide_lacks(study: Study) -> None:
    whole = anndata.read_h5ad(study.folder / "s2.h5ad")
    grid = whole.obs[["array_row", "array_col"]].to_numpy()

    def with_genes(genes: list[str]) -> None:
        write_spots(study.folder / "s2.h5ad", whole.obsm["spatial"], grid=grid, genes=genes)
        study.stored(views=8)

    with_genes(GENES[:8])
    (study.folder / "genes.txt").write_text("\n".join(GENES[4:10]))
    given = run(study, "given", genes=study.folder / "genes.txt", recipe="ridge", settings=())
    assert "slide s2 lacks 2 genes of the panel" in given.metrics["notes"][0]
    assert [fold["n_genes"] for fold in given.metrics["folds"]] == [6, 6, 4]
    data = anndata.read_h5ad(given.path / "predictions" / "s2.h5ad")
    assert np.isfinite(data.X).all()  # predicted though it was not measured
    assert np.isnan(data.layers["target"]).all(axis=0).sum() == 2
    with pytest.raises(TrainError, match="1 genes of the panel are in no slide: G1; did you mean 'G1"):
        run(study, "no", genes=["G01", "G1"], recipe="ridge", settings=())
    # A gene of the held-out slide alone cannot be learnt: it is no gene of that fold.
    with_genes([*GENES[:7], "own"])
    own = run(study, "own", genes=[*GENES[:4], "own"], recipe="ridge", settings=())
    assert [fold["n_genes"] for fold in own.metrics["folds"]] == [4, 4, 4]
    assert anndata.read_h5ad(own.path / "predictions" / "s2.h5ad").n_vars == 4
    with pytest.raises(TrainError, match=r"slide s[01] has none of the 1 genes of the panel"):
        run(study, "alone", genes=["own"], recipe="ridge", settings=())
    with_genes(GENES[:8])
    result = run(study, genes=12, recipe="ridge", settings=())  # s2 is left out once: its own fold has all 12 genes
    by_fold = {fold["fold"]: fold["n_genes"] for fold in result.metrics["folds"]}
    assert by_fold == {"P0": 8, "P1": 8, "P2": 8}
    assert "12 genes were asked for, and the slides have 8 in common" in result.metrics["notes"]
    data = anndata.read_h5ad(result.path / "predictions" / "s2.h5ad")
    assert data.n_vars == 12
    assert np.isnan(data.layers["target"]).all(axis=0).sum() == 4
    assert np.isfinite(data.X).all()


def test_what_cannot_be_trained_on(make_study: Callable[..., Study]) -> None:
    bare = make_study(2, expression=False)
    bare.manifest.write_text(bare.manifest.read_text())
    for i in range(2):
        (bare.folder / f"m{i}.geojson").write_text(
            '{"type": "Polygon", "coordinates": [[[0, 0], [240, 0], [240, 240], [0, 240]]]}'
        )
    lines = bare.manifest.read_text().splitlines()
    bare.manifest.write_text("\n".join([lines[0] + ",tissue"] + [f"{x},m{i}.geojson" for i, x in enumerate(lines[1:])]))
    bare.stored(views=8)
    with pytest.raises(TrainError, match="holds no expression, so there is nothing to learn from"):
        run(bare)
    with pytest.raises(StoreError, match="there is no store"):
        train(bare.folder / "gone.zarr", out=bare.folder / "x")
    study = make_study(2, name="other", patients=["P", "P"])
    with pytest.raises(
        TrainError, match="there is one \\(P\\); its 2 slides can be left out in turn with --folds slide"
    ):
        run(study, folds="patient")  # asked for; what is left to the program is another matter
    with pytest.raises(UsageError, match=r"did you mean 'head\.dropout'"):
        run(study, settings=("head.dropuot=0.1",))
    with pytest.raises(UsageError, match="--set takes key=value"):
        run(study, settings=("dropout",))
    with pytest.raises(TrainError, match=r"features\.neighbours is 20, and .* keeps 9 per spot"):
        run(study, settings=("features.neighbours=20",), folds="slide")
    (study.folder / "run").mkdir()
    with pytest.raises(RunError, match="exists already; give another --out"):
        run(study, folds="slide")
    assert sorted(p.name for p in study.folder.iterdir() if "run" in p.name) == ["run"]


def test_predictions_for_a_store_equal_the_models(study: Study) -> None:
    result = run(study, recipe="ridge-context", settings=())
    summary = predict(result.path, embeddings=study.folder / "store.zarr", out=study.folder / "pred")
    assert set(summary.files) == {"s0", "s1", "s2"}
    from nh2st_pipe.data.samples import Samples
    from nh2st_pipe.store.read import open_store

    slide = open_store(study.folder / "store.zarr").read("s2")
    data = anndata.read_h5ad(summary.files["s2"])
    expected = load_model(result.path).predict(Samples.of([slide], neighbours=9, smoothed=True))
    assert np.array_equal(data.X, expected)
    assert list(data.obs_names) == slide.barcodes
    figures = evaluate(study.folder / "pred", study.folder / "store.zarr", study.folder / "m.json")
    assert figures["slides"]["s2"]["pcc"] == pytest.approx(mean_pcc(data.X, data.layers["target"], []))
    assert json.loads((study.folder / "m.json").read_text()) == figures


def test_slides_of_a_store_that_are_not_whole_are_named_by_predict(study: Study, tmp_path: Path) -> None:
    done = run(study, recipe="ridge", settings=["baselines=[]", "choose={}"])
    store = study.folder / "store.zarr"
    (store / "slides/s2/zarr.json").write_text("{}")
    record = store / "slides/s1/zarr.json"
    values = json.loads(record.read_text())
    slide = read_signed(SlideRecord, values["attributes"]["nh2st_pipe"])
    begun = signed(slide.with_state(complete=False).model_dump(mode="json"))
    record.write_text(json.dumps({**values, "attributes": {**values["attributes"], "nh2st_pipe": begun}}))
    made = predict(done.path, embeddings=store, out=tmp_path / "p")
    assert list(made.files) == ["s0"]
    assert made.failed.keys() == {"s1", "s2"}
    assert "unfinished; nh2st-pipe embed" in made.failed["s1"]
    assert "damaged; nh2st-pipe verify" in made.failed["s2"]
    said = call("predict", "--model", done.path, "--embeddings", store, "--out", tmp_path / "q")
    assert said.returncode == 1
    assert "s2" in said.stderr


def test_predictions_of_a_run_that_have_changed_are_not_judged(study: Study) -> None:
    done = run(study, recipe="ridge", settings=["baselines=[]", "choose={}"])
    store = study.folder / "store.zarr"
    assert evaluate(done.path, store)["summary"]["pcc"] is not None
    file = done.path / "predictions/s1.h5ad"
    with h5py.File(file, "r+") as opened:
        opened["X"][0, 0] += 1
    with pytest.raises(RunError, match=r"s1\.h5ad has changed since it was written"):
        evaluate(done.path, store)


def test_predictions_for_a_manifest_embed_it_as_the_model_needs(study: Study, make_study: Callable[..., Study]) -> None:
    result = run(study, recipe="ridge", settings=())
    new = make_study(2, name="new", expression=True)
    (new.folder / "s0.png").write_text("broken")
    summary = predict(result.path, slides=new.manifest, out=new.folder / "pred")
    assert set(summary.files) == {"s1"}
    assert "not an image" in summary.failed["s0"]
    stored = predict(result.path, embeddings=study.folder / "store.zarr", out=study.folder / "pred")
    same = anndata.read_h5ad(summary.files["s1"]).X, anndata.read_h5ad(stored.files["s1"]).X
    assert np.array_equal(*same)  # the same slide, through the same encoder, tile and views
    lines = new.manifest.read_text().splitlines()
    new.manifest.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ManifestError, match="s0"), mock.patch("nh2st_pipe.encoders.weights.known_weights") as weights:
        predict(result.path, slides=new.manifest, out=new.folder / "pred2")
    weights.assert_not_called()


def test_a_model_refuses_embeddings_of_another_encoder(study: Study, tmp_path: Path) -> None:
    result = run(study, recipe="ridge", settings=())
    study.embed(store=study.folder / "other.zarr", tile_px=40)
    with pytest.raises(StoreError, match="was trained on embeddings of tiles of 48 px, not 40 px"):
        predict(result.path, embeddings=study.folder / "other.zarr", out=tmp_path / "p")
    with pytest.raises(UsageError, match="either --embeddings"):
        predict(result.path, out=tmp_path / "p")
    with pytest.raises(RunError, match="there are no predictions"):
        evaluate(tmp_path / "p", study.folder / "store.zarr")


def test_a_patients_two_slides_are_left_out_together(make_study: Callable[..., Study]) -> None:
    study = make_study(4, patients=["P", "Q", "P", "R"])
    result = run(study, recipe="ridge", settings=())
    assert [(f["fold"], f["test_slides"]) for f in result.metrics["folds"]] == [
        ("P", ["s0", "s2"]),
        ("Q", ["s1"]),
        ("R", ["s3"]),
    ]
    two = run(study, "two", recipe="ridge", settings=(), folds="2")
    assert sum(len(f["test_slides"]) for f in two.metrics["folds"]) == 4


def test_slides_without_a_stain_shift_are_named(study: Study) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    study.embed(views=8, stain_shift="off")
    small = ("head.network.epochs=1", "baselines=[]")
    run(study, recipe="nh2st-context", settings=small, folds="none", progress=Heard())
    assert any("no stain shift of s0, s1, s2" in line and "nh2st-pipe embed" in line for line in said)
    said.clear()
    run(
        study,
        "off",
        recipe="nh2st-context",
        settings=(*small, "head.kernel.stain_directions=0"),
        folds="none",
        progress=Heard(),
    )
    study.stored(views=8)
    with_shift = run(study, "on", recipe="nh2st-context", settings=small, folds="none", progress=Heard())
    assert said == []
    assert load_model(with_shift.path).state_dict()["basis"].shape == (96, 16)


def test_a_slide_unlike_the_training_slides_is_named_wherever_it_is_met(study: Study) -> None:
    settings = ("head.network.epochs=1", "baselines=[]", "head.gate_from=0.998", "head.gate_to=0.999")
    result = run(study, recipe="nh2st-context", settings=settings)
    notes = [note for note in result.metrics["notes"] if "unlike the training slides" in note]
    assert [note.split(",")[0] for note in notes] == ["s0", "s1", "s2"]
    held_out = anndata.read_h5ad(result.path / "predictions" / "s1.h5ad").uns["nh2st_pipe"]
    assert "unlike the training slides" in held_out["caution"]
    assert "s1, held out: unlike the training slides" in report(result.path).read_text()
    about = load_model(result.path).about
    assert about["likeness"]["s1"] == pytest.approx(held_out["likeness"])
    low, high = min(about["likeness"].values()), max(about["likeness"].values())
    summary = predict(result.path, embeddings=study.folder / "store.zarr", out=study.folder / "p")
    assert not any("unlike" in notice for notice in summary.notices)  # each is its own nearest spot
    (study.folder / "s0.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (240, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(study.folder / "s0.png")
    study.embed(store=study.folder / "new.zarr", views=8)
    summary = predict(result.path, embeddings=study.folder / "new.zarr", out=study.folder / "q")
    words = next(notice for notice in summary.notices if notice.startswith("s0: unlike"))
    assert f"each held out, had a likeness of {low:.2f} to {high:.2f}" in words


def test_a_single_slide_is_judged_by_blocks(make_study: Callable[..., Study]) -> None:
    study = make_study(1, side=6)
    options: dict[str, Any] = {"recipe": "nh2st-context", "folds": "block", "genes": GENES[:8]}
    result = run(study, settings=("head.network.epochs=2", "baselines=[mean]"), **options)
    assert [fold["fold"] for fold in result.metrics["folds"]] == [f"block {n}" for n in (1, 2, 3, 4)]
    assert [fold["n_spots"] for fold in result.metrics["folds"]] == [9, 9, 9, 9]
    assert "blocks of slides" in result.metrics["notes"][0]
    data = anndata.read_h5ad(result.path / "predictions" / "s0.h5ad")
    assert (data.n_obs, data.obs_names[7]) == (36, "s7")
    assert np.isfinite(data.obs["likeness"]).all()
    figures = result.metrics["folds"][2]
    from nh2st_pipe.data.blocks import cut
    from nh2st_pipe.data.folds import Fold
    from nh2st_pipe.store.read import open_store
    from nh2st_pipe.training.fold import FoldTask

    rows = cut(open_store(study.folder / "store.zarr")["s0"])[2]
    judged = mean_pcc(np.asarray(data.X)[rows], np.asarray(data.layers["target"])[rows], [])
    assert judged == pytest.approx(figures["pcc"])
    assert load_model(result.path).about["trained_on"][0]["slide_id"] == "s0"
    assert report(result.path).is_file()
    # Other counts in the block that is judged: the same predictions for it, though their smoothing reached across.
    path = study.folder / "s0.h5ad"
    changed = anndata.read_h5ad(path)
    names = set(data.obs_names[rows])
    inside = np.array([name in names for name in changed.obs_names])
    counts = changed.X.toarray()
    counts[inside] = counts[inside][:, ::-1] + 3
    changed.X = sp.csr_matrix(counts)
    changed.write_h5ad(path)
    study.stored(views=8)
    again = run(study, "again", settings=("head.network.epochs=2", "baselines=[]"), **options)
    after = anndata.read_h5ad(again.path / "predictions" / "s0.h5ad")
    assert np.array_equal(np.asarray(after.X)[rows], np.asarray(data.X)[rows])
    assert not np.array_equal(np.asarray(after.X), np.asarray(data.X))
    fold = Fold("block 1", ("s0, block 2",), ("s0, block 1",))
    task = FoldTask(str(study.folder / "store.zarr"), yaml_recipe(again.path), fold, slides=("s0",))
    assert sorted(task.load().slides) == [f"s0, block {n}" for n in (1, 2, 3, 4)]
    table = pl.read_csv(again.path / "per_slide.csv").filter(pl.col("head") == "nh2st-context")
    assert table.select("slide_id", "block").rows() == [("s0", n) for n in (1, 2, 3, 4)]
    assert (again.metrics["summary"]["unit"], again.metrics["summary"]["n_units"]) == ("block", 4)


def test_of_one_patient_slides_are_left_out_and_that_is_said_before_anything_is_read(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(2, patients=["P", "P"])
    result = run(study, recipe="ridge", settings=("baselines=[]",))
    assert (result.metrics["folds_by"], result.metrics["summary"]["unit"]) == ("slide", "slide")
    assert "all 2 slides are of one patient: folds leave out slides" in result.metrics["notes"][0]
    card = (result.path / "model" / "README.md").read_text()
    assert "- Note: all 2 slides are of one patient" in card

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something was read")

    monkeypatch.setattr("nh2st_pipe.data.study.Study.load", load)
    said: list[str] = []
    monkeypatch.setattr("nh2st_pipe.core.progress.Progress.say", lambda self, words: said.append(words))
    with pytest.raises(AssertionError, match="something was read"):
        run(study, "again", recipe="ridge", settings=())
    assert "of one patient" in said[0]
    for folds, message in (("patient", "need at least two patients"), ("slide:3", "need at least 3 slides")):
        with pytest.raises(TrainError, match=message):
            run(study, "other", recipe="ridge", settings=(), folds=folds)


def test_folds_by_a_column_name_patients_on_both_sides(study: Study) -> None:
    lines = study.manifest.read_text().splitlines()
    sites = ("site", "X", "Y", "Y")
    study.manifest.write_text("\n".join(f"{line},{site}" for line, site in zip(lines, sites, strict=True)) + "\n")
    result = run(study, recipe="ridge", settings=("baselines=[]",), folds="site")
    assert [fold["test_slides"] for fold in result.metrics["folds"]] == [["s0"], ["s1", "s2"]]
    assert [note for note in result.metrics["notes"] if "tiles were cut" not in note] == []
    study.manifest.write_text(study.manifest.read_text().replace("P1", "P0"))
    study.stored(views=8)
    both = run(study, "both", recipe="ridge", settings=("baselines=[]",), folds="site")
    assert "patients on both sides of a fold by site: P0" in both.metrics["notes"][0]


def test_a_slide_without_a_single_count_is_left_out_and_named(study: Study) -> None:
    path = study.folder / "s1.h5ad"
    data = anndata.read_h5ad(path)
    data.X = sp.csr_matrix(data.X.shape, dtype=np.float32)
    data.write_h5ad(path)
    result = run(study, recipe="ridge", settings=("baselines=[]",))
    assert result.metrics["notes"][:-1] == ["not in this training: s1, all counts zero"]
    assert result.metrics["notes"][-1].startswith(
        "tiles were cut as 48 px: the model fits slides of the same resolution"
    )
    assert [fold["fold"] for fold in result.metrics["folds"]] == ["P0", "P2"]
    assert result.metrics["model"]["slides"] == ["s0", "s2"]
    for name in ("s0", "s2"):
        shutil.copy(path, study.folder / f"{name}.h5ad")
    study.stored(views=8)
    with pytest.raises(TrainError, match=r"all counts in .* are zero"):
        run(study, "none", recipe="ridge", settings=())


def test_how_training_ended_early_stands_in_the_run(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.heads import members

    plain = members.fit_members

    def ended(*arguments: Any, **options: Any) -> Any:
        return replace(plain(*arguments, **options), notice="the loss is not a number from epoch 2 on")

    monkeypatch.setattr("nh2st_pipe.heads.mlp.fit_members", ended)
    result = run(study, recipe="mlp", settings=("baselines=[]", "head.network.epochs=2"))
    assert [note.split(":")[0] for note in result.metrics["notes"][:-1]] == [
        "mlp, P0",
        "mlp, P1",
        "mlp, P2",
        "mlp, all slides",
    ]


def test_genes_named_twice_or_not_at_all_are_refused_before_anything_is_read(study: Study) -> None:
    study.stored()
    with pytest.raises(UsageError, match="genes names genes twice: G01"):
        run(study, genes=["G01", "G02", "G01"], recipe="ridge", settings=())
    with pytest.raises(UsageError, match="genes names no genes"):
        run(study, genes=[], recipe="ridge", settings=())
