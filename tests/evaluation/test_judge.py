from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import polars as pl
import pytest
from PIL import Image

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.evaluation.judge import evaluate
from nh2st_pipe.evaluation.statistics import headline
from nh2st_pipe.prediction import predict
from nh2st_pipe.training.run import train
from tests.cli.test_commands import call
from tests.conftest import GENES, Study, write_spots


@pytest.fixture
def predicted(study: Study) -> Path:
    """Predictions of the slides that were trained on, and the run beside them."""
    study.stored(views=8)
    run = train(
        study.folder / "store.zarr", recipe="ridge", genes=8, settings=["baselines=[]"], out=study.folder / "run"
    )
    return predict(run.path, embeddings=study.folder / "store.zarr", out=study.folder / "p").out


def change(file: Path, how: Callable[[anndata.AnnData], anndata.AnnData | None]) -> None:
    data = anndata.read_h5ad(file)
    changed = how(data)
    (data if changed is None else changed).write_h5ad(file)


def test_out_of_fold_predictions_are_judged_as_the_run_judged_them(study: Study, predicted: Path) -> None:
    run, store = study.folder / "run", study.folder / "store.zarr"
    figures = evaluate(run, store)
    table = pl.read_csv(run / "per_slide.csv")
    for slide_id, pcc, mse in table.select("slide_id", "pcc", "mse").iter_rows():
        assert figures["slides"][slide_id]["pcc"] == pytest.approx(pcc, abs=1e-6)
        assert figures["slides"][slide_id]["mse"] == pytest.approx(mse, abs=1e-6)
    assert figures["notes"] == []
    in_sample = evaluate(predicted, store)
    assert in_sample["summary"]["pcc"] > figures["summary"]["pcc"]
    assert [note.split(";")[0] for note in in_sample["notes"]] == [f"s{i}: trained on this slide" for i in range(3)]
    assert in_sample["slides"]["s1"]["in_sample"] == "trained on this slide"
    said = call("evaluate", "--predictions", predicted, "--embeddings", store)
    assert "note: s0: trained on this slide; its figures do not say" in said.stdout


def test_what_a_file_claims_to_be_true_is_not_looked_at(study: Study, predicted: Path) -> None:
    before = evaluate(predicted, study.folder / "store.zarr")

    def flatter(data: anndata.AnnData) -> None:
        data.layers["target"] = data.X.copy()

    def without(data: anndata.AnnData) -> None:
        del data.layers["target"]

    change(predicted / "s0.h5ad", flatter)
    change(predicted / "s1.h5ad", without)
    assert evaluate(predicted, study.folder / "store.zarr") == before


def test_what_is_left_out_is_said(study: Study, predicted: Path) -> None:
    store = study.folder / "store.zarr"
    whole = evaluate(predicted, store)

    def few(data: anndata.AnnData) -> anndata.AnnData:
        return data[[4, 2, 9, 17], ::-1].copy()  # in another order: joined by name

    def holes(data: anndata.AnnData) -> None:
        data.X[3, 2] = np.nan

    change(predicted / "s0.h5ad", few)
    change(predicted / "s1.h5ad", holes)
    (predicted / "s2.h5ad").unlink()
    figures = evaluate(predicted, store)
    assert "s0: 4 of its 25 spots are predicted; the figures are of those alone" in figures["notes"]
    assert (
        "s1: 1 predictions are not numbers: the PCC of 1 gene counts as 0, and errors are of the others"
        in figures["notes"]
    )
    assert "not predicted, and so not judged: s2" in figures["notes"]
    assert figures["slides"]["s0"]["n_spots"] == 4
    assert abs(figures["slides"]["s1"]["mse"] - whole["slides"]["s1"]["mse"]) < 0.05
    data = anndata.read_h5ad(predicted / "s0.h5ad")
    errors = (np.asarray(data.X) - np.asarray(data.layers["target"])) ** 2  # which predict made from the same counts
    assert figures["slides"]["s0"]["mse"] == pytest.approx(errors.mean(), rel=1e-5)


def test_genes_that_a_slide_does_not_have_are_left_out(study: Study, predicted: Path, make_study: Any) -> None:
    new = make_study(2, name="new")
    data = anndata.read_h5ad(new.folder / "s1.h5ad")
    places, grid = data.obsm["spatial"], data.obs[["array_row", "array_col"]].to_numpy()
    write_spots(new.folder / "s1.h5ad", places, grid=grid, genes=[*GENES[:5], "other"])
    lines = new.manifest.read_text().splitlines()
    new.manifest.write_text("\n".join([*lines[:1], lines[1].rsplit(",", 1)[0] + ",", lines[2]]) + "\n")
    (new.folder / "m.png").write_bytes((new.folder / "s0.png").read_bytes())
    new.manifest.write_text(
        new.manifest.read_text()
        .replace("expression\n", "expression,tissue\n")
        .replace("P0,\n", "P0,,m.png\n")
        .replace("s1.h5ad\n", "s1.h5ad,\n")
    )
    assert new.embed(views=8).failed == {}
    # A slide without spots says nothing of its resolution here, and the tiles are of px.
    done = predict(study.folder / "run", embeddings=new.folder / "store.zarr", out=new.folder / "p", any_mpp=True)
    assert done.failed == {}
    figures = evaluate(done.out, new.folder / "store.zarr")
    assert "s0: left out, the store has no expression of it" in figures["notes"]
    absent = 8 - len(set(GENES[:5]) & set(anndata.read_h5ad(done.files["s1"]).var_names))
    assert f"s1: {absent} of the 8 genes are not in its expression, and left out" in figures["notes"]
    assert figures["slides"]["s1"]["n_genes"] == 8 - absent
    assert any("s1: its counts are scaled over 6 genes, and those of the training slides were over 12" in note
               for note in figures["notes"])  # fmt: skip


def test_slides_that_measure_different_genes_are_judged_as_the_run_judged_them(
    make_study: Callable[..., Study],
) -> None:
    """Counts are scaled over what all slides have; one gene of one slide does not vary, which is said."""
    study = make_study(3)
    data = anndata.read_h5ad(study.folder / "s1.h5ad")
    counts = np.asarray(data.X.toarray())
    counts[:, 3] = 0
    places, grid = data.obsm["spatial"], data.obs[["array_row", "array_col"]].to_numpy()
    genes = [*GENES[:-1], "other"]
    write_spots(study.folder / "s1.h5ad", places, grid=grid, genes=genes, counts=counts, barcodes=list(data.obs_names))
    study.stored(views=8)
    store = study.folder / "store.zarr"
    run = train(store, recipe="ridge", genes=GENES[:6], out=study.folder / "run", settings=["baselines=[]"])
    kept = anndata.read_h5ad(run.path / "predictions" / "s0.h5ad").uns["nh2st_pipe"]
    assert list(kept["scale_genes"]) == GENES[:-1]
    found = evaluate(run.path, store)
    table = {row["slide_id"]: row for row in pl.read_csv(run.path / "per_slide.csv").iter_rows(named=True)}
    for slide_id, slide in found["slides"].items():
        assert slide["mse"] == pytest.approx(table[slide_id]["mse"], abs=1e-6)
        assert slide["pcc"] == pytest.approx(table[slide_id]["pcc"], abs=1e-6)
    assert any(note.startswith("s1: PCC ") and note.endswith("over 5 genes; 1 of 6 do not vary on these spots")
               for note in found["notes"])  # fmt: skip
    assert "over 5 to 6 genes a slide; 0 to 1 of 6 do not vary there" in headline(run.metrics["summary"])
    done = predict(run.path, embeddings=store, out=study.folder / "p")
    again = evaluate(done.out, store)["slides"]["s0"]["mse"]
    target, said = (np.asarray(values) for values in (anndata.read_h5ad(done.files["s0"]).layers["target"],
                                                      anndata.read_h5ad(done.files["s0"]).X))  # fmt: skip
    assert again == pytest.approx(np.square(target - said).mean(), rel=1e-5)


def test_files_that_cannot_be_judged_are_named(study: Study, predicted: Path) -> None:
    store = study.folder / "store.zarr"

    def twice(data: anndata.AnnData) -> anndata.AnnData:
        return data[[0, 1, 1]].copy()

    def stranger(data: anndata.AnnData) -> None:
        data.var_names = [*data.var_names[:-1], "OTHER"]

    def silent(data: anndata.AnnData) -> None:
        data.uns["nh2st_pipe"].pop("targets")

    def nameless(data: anndata.AnnData) -> None:
        del data.uns["nh2st_pipe"]

    def elsewhere(data: anndata.AnnData) -> None:
        data.obs_names = [f"other{i}" for i in range(data.n_obs)]

    kept = (predicted / "s1.h5ad").read_bytes()
    for how, message in (
        (stranger, "genes that are not of the panel it was predicted with: OTHER"),
        (silent, "by a version that did not keep how its values are made"),
        (nameless, "does not say what it is"),
        (elsewhere, "names spots that slide s1 of .* does not have: other0"),
    ):
        change(predicted / "s1.h5ad", how)
        with pytest.raises(RunError, match=message):
            evaluate(predicted, store)
        (predicted / "s1.h5ad").write_bytes(kept)
    with pytest.warns(UserWarning, match="not unique"):
        change(predicted / "s1.h5ad", twice)
    with pytest.raises(RunError, match="names spots twice: s"):
        evaluate(predicted, store)
    (predicted / "s1.h5ad").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(RunError, match=r"s1\.h5ad cannot be read"):
        evaluate(predicted, store)


def test_more_figures_and_gene_sets_are_given_by_name(study: Study, predicted: Path) -> None:
    store, sets = study.folder / "store.zarr", study.folder / "sets.gmt"
    genes = list(anndata.read_h5ad(predicted / "s0.h5ad").var_names)
    sets.write_text(f"ALL\t-\t{chr(9).join(genes)}\nSTRANGE\t-\tnone\tsuch\n")
    found = evaluate(study.folder / "run", store, figures=["spearman", "pcc_spot"], gene_sets=sets)
    assert set(found["definitions"]) == {"spearman", "pcc_spot"}
    for name in ("spearman", "pcc_spot"):
        values = [slide[name] for slide in found["slides"].values()]
        assert found["summary"][name] == pytest.approx(np.mean(values))
    assert set(found["gene_sets"]) == {"ALL"}
    assert "1 of 2 gene sets have fewer than two predicted genes" in found["notes"]
    plain = evaluate(study.folder / "run", store)
    assert set(plain["summary"]) == {"pcc", "pcc_top50", "pcc_top50_null", "mse", "mae"}
    words = ("--metric", "spearman", "--gene-sets", sets)
    said = call("evaluate", "--predictions", study.folder / "run", "--embeddings", store, *words)
    assert said.returncode == 0
    assert "Spearman's rank correlation over spots" in said.stdout
    assert "gene set ALL: PCC" in said.stdout
    wrong = call("evaluate", "--predictions", predicted, "--embeddings", store, "--metric", "pearson")
    assert wrong.returncode == 2
    assert "no figure is called 'pearson'" in wrong.stderr


def test_what_was_trained_on_is_found_whatever_it_is_called(
    study: Study, predicted: Path, make_study: Callable[..., Study]
) -> None:
    """A training slide under another name, another slide of a training patient, and a new one."""
    new = make_study(3, name="again", patients=["X", "P1", "NEW"])
    for name in ("s1", "s2"):
        image = Image.open(new.folder / f"{name}.png")
        image.transpose(Image.Transpose.ROTATE_180).save(new.folder / f"{name}.png")
    new.stored(views=8)
    done = predict(study.folder / "run", embeddings=new.folder / "store.zarr", out=new.folder / "p")
    for file in done.files.values():

        def forget(data: anndata.AnnData) -> None:
            data.uns["nh2st_pipe"].pop("in_sample", None)

        change(file, forget)
    figures = evaluate(done.out, new.folder / "store.zarr")
    said = {name: slide["in_sample"] for name, slide in figures["slides"].items()}
    assert said == {"s0": "trained on this slide", "s1": "trained on other slides of patient P1", "s2": None}
    assert figures["in_sample"] == 2
    assert figures["summary_new"]["pcc"] == figures["slides"]["s2"]["pcc"]
    table = call("evaluate", "--predictions", done.out, "--embeddings", new.folder / "store.zarr").stdout
    for label in ("s0 (in-sample)", "s1 (in-sample)", "mean (2 of 3 in-sample)", "mean of the new ones"):
        assert label in table
    assert "s2 (in-sample)" not in table


def test_folds_that_split_a_patient_or_a_slide_are_labelled(make_study: Callable[..., Study]) -> None:
    study = make_study(3, patients=["A", "A", "B"])
    study.stored(views=8)
    store = study.folder / "store.zarr"
    for folds, expected in (
        ("slide", ["trained on other slides of patient A"] * 2 + [None]),
        ("block", ["trained on other blocks of this slide"] * 3),
    ):
        settings = ["baselines=[]", f"folds={folds}"]
        run = train(store, recipe="ridge", genes=GENES[:4], settings=settings, out=study.folder / folds)
        judged = evaluate(run.path, store)["slides"]
        assert [judged[f"s{i}"]["in_sample"] for i in range(3)] == expected
