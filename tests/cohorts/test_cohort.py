"""A cohort: means of the tiles that may be believed, the slide that is made to stand apart first, patients weighed."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.cohorts.run import write_cohort
from nh2st_pipe.cohorts.table import cohort_of
from nh2st_pipe.core.errors import RunError, UsageError
from nh2st_pipe.exporting import view
from tests.exporting.made import genes_of, prediction

GENES = genes_of(6)


def patient_of(path: Path, patient: str, *, shift: float = 0.0, unit: str | None = None) -> None:
    """Say whose a prediction is, and move all of its values."""
    data = anndata.read_h5ad(path)
    data.uns["nh2st_pipe"]["patient"] = patient
    data.X = data.X + np.float32(shift)
    if unit is not None:
        data.uns["nh2st_pipe"]["unit"] = unit
    data.write_h5ad(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six slides of five patients; a quarter of the tiles of s3 are unlike, s5 is far from the others, G5 untrusted."""
    (tmp_path / "p").mkdir()
    trusted = {gene: gene != "G5" for gene in GENES}
    for number in range(6):
        path = tmp_path / f"p/s{number}.h5ad"
        unlike = (0, 5, 10, 15) if number == 3 else ()
        prediction(path, slide_id=f"s{number}", genes=GENES, trusted=trusted, unlike=unlike, seed=number)
        patient_of(path, f"P{max(number, 1)}", shift=9.0 if number == 5 else 0.0)
    return tmp_path / "p"


def test_means_are_of_tiles_that_may_be_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_BLOCK_VALUES", 16 * 2)  # two genes at a time
    cohort = cohort_of(folder)
    assert cohort.trusted == GENES[:5]
    of = {slide.slide_id: slide for slide in cohort.slides}
    values = anndata.read_h5ad(folder / "s3.h5ad").X
    kept = [row for row in range(16) if row not in (0, 5, 10, 15)]
    assert of["s3"].unlike_share == 0.25
    for column, gene in enumerate(GENES):
        assert of["s3"].means[gene] == pytest.approx(values[kept, column].mean(), rel=1e-5)
        measured = anndata.read_h5ad(folder / "s3.h5ad").layers["target"]
        assert of["s3"].measured[gene] == pytest.approx(measured[kept, column].mean(), rel=1e-5)


def test_slides_that_are_unlike_or_apart_stand_first(folder: Path) -> None:
    frame = cohort_of(folder).frame()
    assert frame["slide_id"].to_list()[:2] == ["s3", "s5"]
    apart = dict(zip(frame["slide_id"], frame["apart"], strict=True))
    means = np.array([[slide.means[gene] for gene in GENES[:5]] for slide in cohort_of(folder).slides])
    middle = np.median(means, axis=0)
    away = np.abs(means - middle) / (1.4826 * np.median(np.abs(means - middle), axis=0))
    assert [apart[f"s{i}"] for i in range(6)] == pytest.approx(np.median(away, axis=1), rel=1e-4)
    assert apart["s5"] > 10 > 3 > max(apart[f"s{i}"] for i in range(5))


def test_patients_are_means_of_their_slides(folder: Path) -> None:
    cohort = cohort_of(folder)
    data = cohort.by_patient()
    assert list(data.obs_names) == ["P1", "P2", "P3", "P4", "P5"]
    assert data.obs["slides"].tolist() == [2, 1, 1, 1, 1]
    assert data.obs["tiles"].tolist() == [32, 16, 12, 16, 16]
    of = {slide.slide_id: slide for slide in cohort.slides}
    expected = [(of["s0"].means[gene] + of["s1"].means[gene]) / 2 for gene in GENES]
    np.testing.assert_allclose(data["P1"].X[0], expected, rtol=1e-5)
    np.testing.assert_allclose(data["P2"].layers["measured"][0], data["P2"].X[0] + 1, rtol=1e-5)
    assert data.var["trusted"].tolist() == [True] * 5 + [False]
    assert data.uns["nh2st_pipe"]["unit"].startswith("log1p(counts per 10,000), mean; mean over")


def test_a_set_is_scored_by_the_genes_that_may_be_believed(folder: Path) -> None:
    (folder.parent / "sets.gmt").write_text("UP\tx\tG0\tG2\tG5\nFEW\tx\tG1\tG5\n")
    cohort, paths = write_cohort(folder, folder.parent / "out", folder.parent / "sets.gmt")
    assert cohort.sets == {"set: UP": ["G0", "G2"]}
    assert any("set: UP is of 2 of its 3 genes, 1 left out" in each for each in cohort.notices)
    assert any("no score of FEW" in each for each in cohort.notices)
    means = cohort.matrix(["G0", "G2"])
    middle = np.median(means, axis=0)
    expected = ((means - middle) / (1.4826 * np.median(np.abs(means - middle), axis=0))).mean(axis=1)
    table = pl.read_csv(paths[0])
    found = dict(zip(table["slide_id"], table["set: UP"], strict=True))
    assert [found[f"s{i}"] for i in range(6)] == pytest.approx(expected, rel=1e-4)
    page = paths[2].read_text()
    assert '<td class="far">25.0%</td>' in page
    assert page.index("<td>s3</td>") < page.index("<td>s5</td>") < page.index("<td>s0</td>")
    assert "5 of 6 genes are trusted" in page


def test_what_cannot_be_put_together_is_said(folder: Path) -> None:
    (folder / "broken.h5ad").write_bytes(b"\x89HDF\r\n\x1a\nand so on")
    done = CliRunner().invoke(app, ["cohort", str(folder), "--out", str(folder.parent / "out"), "--json"])
    assert done.exit_code == 1
    assert "cannot be read" in json.loads(done.stdout)["failed"]["broken"]
    assert (folder.parent / "out/patients.h5ad").exists()
    patient_of(folder / "s1.h5ad", "P1", unit="counts")
    with pytest.raises(RunError, match=r"s0 is predicted as log1p.*, and s1 as counts"):
        cohort_of(folder)
    with pytest.raises(RunError, match="neither a prediction"):
        cohort_of(folder / "nothing")
    (folder.parent / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        write_cohort(folder, folder.parent / "file")


def test_few_slides_and_genes_that_nobody_judged_tell_nothing_apart(tmp_path: Path) -> None:
    prediction(tmp_path / "a<b>.h5ad", slide_id="<script>", genes=GENES, trusted={})
    cohort, paths = write_cohort(tmp_path / "a<b>.h5ad", tmp_path / "out")
    assert cohort.frame()["apart"].to_list() == [None]
    assert any("no gene was judged" in each for each in cohort.notices)
    assert any("too few to tell what stands apart" in each for each in cohort.notices)
    assert "<script" not in paths[2].read_text()


def test_a_slide_all_of_whose_tiles_are_unlike_has_no_means(folder: Path) -> None:
    prediction(folder / "s6.h5ad", slide_id="s6", genes=GENES, unlike=tuple(range(16)))
    cohort = cohort_of(folder)
    last = next(slide for slide in cohort.slides if slide.slide_id == "s6")
    assert (last.means, last.unlike_share) == ({}, 1.0)
    assert cohort.frame()["slide_id"][0] == "s6"
    assert cohort.frame()["apart"][0] is None


def square(name: str, low: float, high: float) -> dict[str, object]:
    ring = [[low, low], [high, low], [high, high], [low, high], [low, low]]
    of = {"objectType": "annotation", "classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": of}


def test_regions_have_means_and_scores_against_the_cohorts_slides(folder: Path) -> None:
    data = anndata.read_h5ad(folder / "s3.h5ad")
    xy = np.asarray(data.obsm["spatial"])
    (folder.parent / "sets.gmt").write_text("UP\tx\tG0\tG2\n")
    outlined = folder.parent / "regions"
    outlined.mkdir()
    middle = float(np.median(xy))
    features = [square("all", -1e6, 1e6), square("corner", -1e6, middle)]
    (outlined / "s3.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (outlined / "s5.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [square("x", 1e7, 2e7)]}))
    cohort, paths = write_cohort(folder, folder.parent / "out", folder.parent / "sets.gmt", outlined)
    assert [path.name for path in paths[3:]] == ["regions.csv", "regions.h5ad"]
    assert "none of the slide's 16 spots lies in its regions" in cohort.failed["s5, its regions"]
    table = pl.read_csv(paths[3])
    assert table["region"].to_list() == ["all", "corner"]
    score = dict(zip(cohort.frame()["slide_id"], cohort.frame()["set: UP"], strict=True))
    assert table["set: UP"][0] == pytest.approx(score["s3"], rel=1e-4)  # of all of it, as the slide
    inside = [row for row in np.flatnonzero((xy < middle).all(axis=1)) if row not in (0, 5, 10, 15)]
    means = anndata.read_h5ad(paths[4])
    assert means.obs_names.tolist() == ["s3, all", "s3, corner"]
    assert means.obs["tiles"].tolist() == [12, len(inside)]
    assert means.X[1] == pytest.approx(np.asarray(data.X)[inside].mean(axis=0), rel=1e-5)
    assert "<h2>Regions</h2>" in paths[2].read_text()
    (outlined / "s9.geojson").write_text("{}")
    with pytest.raises(UsageError, match=r"regions of no slide here: s9\.geojson"):
        cohort_of(folder, regions=outlined)
