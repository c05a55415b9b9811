from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.evaluation.compare import compare
from nh2st_pipe.evaluation.statistics import verdict
from nh2st_pipe.training.run import train
from tests.cli.test_commands import call
from tests.conftest import GENES, Study


def run(study: Study, out: str, **options: Any) -> Path:
    if not (study.folder / "store.zarr").exists():
        study.stored(views=8)
    options = {"recipe": "ridge", "genes": GENES[:8], "settings": ("baselines=[mean, knn]",), **options}
    return train(study.folder / "store.zarr", out=study.folder / out, **options).path


def test_heads_are_paired_slide_by_slide_and_gene_by_gene(study: Study) -> None:
    path = run(study, "a")
    found = compare([path])
    assert (found.reference, found.unit, found.n_units, found.n_genes) == ("ridge", "patient", 3, 8)
    assert [row["head"] for row in found.rows] == ["ridge", "mean", "knn"]
    slides = pl.read_csv(path / "per_slide.csv")
    genes = pl.read_csv(path / "per_gene.csv")
    own, other = (slides.filter(pl.col("head") == name).sort("slide_id") for name in ("ridge", "knn"))
    row = found.rows[2]
    for key in ("pcc", "pcc_top50_train", "pcc_top50", "mse"):
        difference = (own[key] - other[key]).to_numpy()
        of = row["difference"][key]
        assert of["mean"] == pytest.approx(difference.mean())
        assert of == pytest.approx(verdict(difference).to_json())
        assert row[key] == pytest.approx(other[key].mean())
    assert row["units_won"] == int((own["pcc"] > other["pcc"]).sum())
    one, two = (
        dict(genes.filter(pl.col("head") == name).select("gene", "pcc").iter_rows()) for name in ("ridge", "knn")
    )
    assert (row["genes_won"], row["genes"]) == (sum(one[gene] > two[gene] for gene in one), 8)
    assert found.notes[0].startswith("3 patients are too few to rule out chance")
    assert found.notes[0].endswith("with 3 the smallest p is 0.25")  # of signs: 2 / 2³
    assert found.rows[1]["difference"]["pcc"]["mean"] == pytest.approx(own["pcc"].mean())  # the mean's PCC is 0


def test_a_run_is_not_distinguishable_from_itself(study: Study) -> None:
    path = run(study, "a")
    shutil.copytree(path, study.folder / "b")
    done = call("compare", path, study.folder / "b", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["head"]: row for row in json.loads(done.stdout)["rows"]}
    again = rows[f"ridge ({study.folder / 'b'})"]
    assert (again["difference"]["pcc"]["mean"], again["difference"]["pcc"]["p"]) == (0.0, 1.0)
    assert list(rows)[2:] == ["mean", "knn"]  # once, though both runs have them
    words = call("compare", path, study.folder / "b").stdout
    assert "ahead on 0 of 3 patients; too few to rule out chance" in words
    assert "over 3 patients and 8 genes" in words


def test_what_is_better_or_worse_beyond_chance_is_called_so_from_six_units_on(study: Study) -> None:
    path = run(study, "a")
    table = pl.read_csv(path / "per_slide.csv")
    (path / "SHA256SUMS").unlink()
    for change, many, few in ((0.5, "better", "ahead on 3 of 3"), (-2.0, "worse", "behind on 3 of 3")):
        moved = pl.when(pl.col("head") == "knn").then(pl.col("pcc") + change).otherwise(pl.col("pcc"))
        changed = table.with_columns(moved.alias("pcc"))
        changed.write_csv(path / "per_slide.csv")
        assert compare([path]).rows[2]["verdict"] == f"{few} patients; too few to rule out chance"
        names = (pl.col("slide_id") + "x").alias("slide_id"), (pl.col("patient") + "x").alias("patient")
        pl.concat([changed, changed.with_columns(*names)]).write_csv(path / "per_slide.csv")
        row = compare([path]).rows[2]
        assert row["verdict"] == many
        assert row["difference"]["pcc"]["p"] == pytest.approx(2 / 64)


def test_a_patients_slides_are_one_unit(make_study: Callable[..., Study]) -> None:
    study = make_study(4, patients=["P", "Q", "P", "R"])
    path = run(study, "a")
    found = compare([path])
    assert (found.unit, found.n_units) == ("patient", 3)
    slides = pl.read_csv(path / "per_slide.csv").filter(pl.col("head") == "ridge")
    by_patient = slides.group_by("patient").agg(pl.col("pcc").mean())["pcc"].mean()
    assert found.rows[0]["pcc"] == pytest.approx(by_patient)
    alone = make_study(2, patients=["P", "P"], name="alone")
    assert (compare([run(alone, "a", folds="slide")]).unit) == "slide"


def test_runs_that_answer_different_questions_are_refused(study: Study, make_study: Callable[..., Study]) -> None:
    a = run(study, "a")
    with pytest.raises(RunError, match=r"a predicts .*mean over a spot and its grid neighbours, and .*: their figures"):
        compare([a, run(study, "raw", settings=("targets.smooth=none",))])
    with pytest.raises(
        RunError, match=r"judged on different genes \(G06, G07\); train both with the same --genes FILE"
    ):
        compare([a, run(study, "few", genes=GENES[:6])])
    with pytest.raises(RunError, match="trained without folds"):
        compare([a, run(study, "none", folds="none")])
    with pytest.raises(RunError, match="is not a finished run"):
        compare([study.folder])
    other = run(study, "b")
    (other / "SHA256SUMS").unlink()
    table = pl.read_csv(other / "per_slide.csv")
    table.filter(pl.col("slide_id") != "s1").write_csv(other / "per_slide.csv")
    found = compare([a, other])
    assert found.n_units == 2
    assert found.notes[0] == "left out, for not every head was judged on them: s1"
    table.with_columns(pl.col("slide_id") + "x").write_csv(other / "per_slide.csv")
    with pytest.raises(RunError, match="no held-out slide in common"):
        compare([a, other])


def test_runs_of_the_first_version_can_be_compared() -> None:
    v0 = Path(__file__).parents[1] / "runs" / "v0"
    found = compare([v0 / "ridge-context"])
    assert (found.reference, found.unit) == ("ridge-context", "slide")  # it did not keep the patients
