from __future__ import annotations

import base64
import io
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.evaluation.compare import compare
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads.base import Prediction
from nh2st_pipe.heads.carry import Carried, Strength
from nh2st_pipe.reporting import maps
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.read import SlideData
from nh2st_pipe.training.run import train
from tests.cli.test_commands import call
from tests.conftest import Study, grid_positions, picture

HOSTILE = "</script><script>alert(1)</script>"
COMMENT = "<!--<script>"
GENES = ["ACTB", "KRT19", HOSTILE]
SIDE = 4


def figures(pcc: float | None) -> dict[str, Any]:
    return {
        "pcc": pcc,
        "pcc_top50": pcc,
        "mse": 0.0421,
        "mae": 0.1632,
        "n_spots": 16,
        "n_genes": 3,
        "train_seconds": 1.5,
    }


def record(fold_names: list[str], pcc: float | None) -> dict[str, Any]:
    more = {"n_genes_pcc_undefined": 0, "epochs": 3}
    folds = [{"fold": name, "test_slides": [name], **figures(pcc), **more} for name in fold_names]
    return {"summary": figures(pcc) if folds else None, "folds": folds}


def slide_data(slide_id: str, *, thumbnail: bool = True) -> SlideData:
    xy, grid = grid_positions(SIDE, 40.0)
    scale = {"tissue_lowres_scalef": 0.5, "spot_diameter_fullres": 36.0}
    spatial = {slide_id: {"images": {"lowres": picture(100, 100, 1)}, "scalefactors": scale}}
    return SlideData(
        slide_id=slide_id,
        patient="P1",
        extra={},
        barcodes=[f"b{i}" for i in range(len(xy))],
        xy=xy,
        array_row=grid[:, 0],
        array_col=grid[:, 1],
        views=np.zeros((len(xy), 1, 2), np.float16),
        neighbours=np.zeros((len(xy), 1), np.int32),
        counts=None,
        genes=[],
        uns={"spatial": spatial} if thumbnail else {},
    )


def values(seed: int, genes: int = 3) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return predictions and targets, 16 × genes; the last gene was not measured."""
    rng = np.random.default_rng(seed)
    target = rng.normal(1, 0.5, (SIDE**2, genes)).astype(np.float32)
    predicted = (0.5 * target + rng.normal(0, 0.2, target.shape)).astype(np.float32)
    target[:, -1] = np.nan
    return predicted, target


def make_run(
    path: Path,
    *,
    own: float | None = 0.41,
    baselines: dict[str, float | None] | None = None,
    fold_names: tuple[str, ...] = ("s1", "s2"),
    protocol: str = "nested",
    slide_id: str = "s1",
    thumbnail: bool = True,
    **changes: Any,
) -> Path:
    folder = RunFolder(path)
    folds = list(fold_names)
    baselines = {"mean": None, "ridge": 0.37} if baselines is None else baselines
    metrics = {
        "head": "nh2st",
        "protocol": protocol,
        "protocol_in_words": "each test fold touched once",
        "folds_by": "patient" if folds else "none",
        "n_slides": 2,
        "n_patients": 2,
        "n_spots": 32,
        "views": 8,
        **record(folds, own),
        "baselines": {name: record(folds, pcc) for name, pcc in baselines.items()},
        "model": {"genes": 3, "epochs": 4, "slides": ["s1", "s2"]},
        "store": {
            "path": "store.zarr",
            "encoder": "fake",
            "weights_sha256": "ab" * 32,
            "weights_source": "fake.safetensors",
            "precision": "float32",
            "tile": {"size_um": 112.0, "size_level0_px": None},
            "views": 8,
            "dim": 16,
        },
        "software": {"nh2st_pipe": "0.1.0", "device": "cpu"},
        **changes,
    }
    folder.write_json("metrics.json", metrics)
    folder.write_yaml("recipe.yaml", {"name": "nh2st", "about": "as published", "seed": 77})
    heads = {"nh2st": own, **baselines} if folds else {}
    gene_rows = [
        {"head": head, "gene": gene, "n_folds": 2, "pcc": pcc, "mse": 0.1, "mae": 0.2, "target_mean": 1.25}
        for head, pcc in heads.items()
        for gene in GENES
    ]
    folder.write_table("per_gene.csv", gene_rows)
    curve = [
        {"fold": fold, "phase": phase, "epoch": float(epoch), "loss_total": 1 / epoch, "watched_pcc": watched}
        for fold in (*folds, "all slides")
        for phase, watched in (("choose", 0.3), ("train", None))
        for epoch in range(1, 4)
    ]
    folder.write_table("history.csv", curve)
    if folds:
        predicted, target = values(1)
        about = {"fold": folds[0], "recipe": "nh2st"}
        slide = slide_data(slide_id, thumbnail=thumbnail)
        write_prediction(
            folder.part / "predictions" / "s1.h5ad", slide, GENES, Prediction(predicted), target, None, about
        )
        predicted, target = values(2, 2)
        write_prediction(
            folder.part / "predictions" / "s2.h5ad",
            slide_data("s2"),
            ["KRT19", "ACTB"],
            Prediction(predicted),
            target,
            None,
            about,
        )
    (folder.part / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder.part / "model" / name).write_text("")
    folder.commit()
    return path


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpack(slide: dict[str, Any]) -> NDArray[np.float64]:
    """Return the planes, such as truth and prediction, planes × genes × spots, as the page's script reads them."""
    planes = slide["planes"]
    raw = np.frombuffer(unzipped(slide["values"]), np.uint8).reshape(len(planes), -1, slide["n"])
    low, high = (np.array([plane[key] for plane in planes])[:, :, None] for key in ("low", "high"))
    return np.asarray(np.where(raw == 255, np.nan, low + raw / slide["levels"] * (high - low)))


def unzipped(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def column(data: dict[str, Any], key: str) -> list[float | None]:
    values: list[float | None] = next(each["values"] for each in data["genes"]["columns"] if each["key"] == key)
    return values


def test_the_page_holds_the_figures(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert page == tmp_path / "run" / "report.html"
    assert not list(page.parent.glob("*.part"))
    data = page_data(page)
    assert data["heads"][0]["summary"] == {
        "pcc": 0.41,
        "pcc_low": None,  # as in runs of before
        "pcc_high": None,
        "pcc_top50_train": None,
        "pcc_top50": 0.41,
        "pcc_top50_null": None,
        "mse": 0.0421,
        "mae": 0.1632,
        "train_seconds": 1.5,
    }
    assert [head["name"] for head in data["heads"]] == ["nh2st", "mean", "ridge"]
    assert data["heads"][1]["summary"]["pcc"] is None
    assert [fold["fold"] for fold in data["heads"][2]["folds"]] == ["s1", "s2"]
    assert data["genes"]["names"] == GENES
    assert column(data, "cv_pcc") == [0.41] * 3
    assert column(data, "head ridge") == [0.37] * 3
    assert column(data, "mean") == [1.25] * 3
    assert column(data, "folds") == [2] * 3
    assert "head mean" not in [each["key"] for each in data["genes"]["columns"]], "its predictions do not vary"
    words = json.dumps([data["facts"], data["provenance"]])
    for expected in ("2 slides", "each test fold touched once", "fake", "ab" * 32, "112", "77", "8 views"):
        assert expected in words
    assert "seed: 77" in data["recipe"]
    assert len(data["history"]) == 6
    assert data["history"][0]["loss"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert data["history"][1]["pcc"] == [None] * 3
    assert [curve["chosen"] for curve in data["history"]] == [3, None, 3, None, None, None]


def test_maps_are_the_predictions_to_a_255th_of_their_range(tmp_path: Path) -> None:
    first, second = page_data(report(make_run(tmp_path / "run")))["slides"]
    predicted, target = values(1)
    found = unpack(first)
    assert np.array_equal(np.isnan(found[0]), np.isnan(target.T))
    for mine, theirs in zip(found, (target.T, predicted.T), strict=True):
        width = np.subtract(first["planes"][0]["high"], first["planes"][0]["low"])
        assert np.nanmax(np.abs(mine - theirs)) < 0.51 * width.max() / 254
    expected = gene_metrics(predicted, target)["pcc"]
    assert first["pcc"][:2] == pytest.approx(expected[:2], abs=1e-4)
    assert first["pcc"][2] is None
    assert first["measured"] == [True, True, False]
    assert json.loads(unzipped(first["barcodes"])) == [f"b{i}" for i in range(SIDE**2)]
    assert (first["label"], first["in_sample"]) == ("out of fold (s1)", False)
    # The second slide's panel is another, in another order: joined by name.
    assert second["panel"] == [1, 0]
    assert second["genes"] == [0, 1]
    truth = values(2, 2)[1]
    assert np.isnan(unpack(second)[0, 0]).all(), "ACTB stands last on the second slide"
    assert unpack(second)[0, 1] == pytest.approx(truth[:, 0], abs=0.02)


def test_spots_lie_on_the_thumbnail(tmp_path: Path) -> None:
    slide = page_data(report(make_run(tmp_path / "run")))["slides"][0]
    assert slide["image"].startswith("data:image/jpeg;base64,")
    assert (slide["width"], slide["height"]) == (100, 100)
    assert slide["x"][:2] == [20, 40]
    assert slide["radius"] == pytest.approx(0.48 * 36 * 0.5, abs=0.01)


@pytest.mark.parametrize("kind", ["u1", "f4"])
def test_a_thumbnail_is_as_bright_as_it_is_whether_in_255ths_or_in_shares_of_one(kind: str) -> None:
    """scanpy's own thumbnails are of 0 to 1."""
    grey = np.full((60, 80, 3), 180, np.uint8)
    picture = grey if kind == "u1" else (grey / 255).astype(np.float32)
    uns = {"spatial": {"s": {"images": {"hires": picture}, "scalefactors": {"tissue_hires_scalef": 1.0}}}}
    xy = np.column_stack([axis.ravel() for axis in np.mgrid[20:60:10, 15:45:10]]).astype(float)
    image = maps._background(uns, "s", xy)["image"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))))
    assert abs(shown.astype(int) - 180).max() <= 2


def test_a_prediction_without_a_thumbnail_is_drawn_on_an_empty_ground(tmp_path: Path) -> None:
    slide = page_data(report(make_run(tmp_path / "run", thumbnail=False)))["slides"][0]
    assert slide["image"] is None
    assert 0 < min(slide["x"]) < max(slide["x"]) < slide["width"] == 640


@pytest.mark.parametrize("name", [HOSTILE, COMMENT, '"><img src=x onerror=alert(1)>'])
def test_names_never_become_markup(tmp_path: Path, name: str) -> None:
    slide_id = name.replace("/", "\\")  # a slash would be a folder inside an .h5ad
    page = report(make_run(tmp_path / "run", fold_names=(name, "s2"), slide_id=slide_id, head=name))
    text = page.read_text("utf-8")
    assert name not in text
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
    assert "innerHTML" not in text
    data = page_data(page)
    assert data["head"] == name
    assert data["slides"][0]["id"] == slide_id
    assert data["genes"]["names"][2] == HOSTILE


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run")).read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', text)
    assert "fetch(" not in text


def test_the_best_head_is_named_whoever_it_is(tmp_path: Path) -> None:
    ahead = page_data(report(make_run(tmp_path / "ahead")))["verdict"]["sentences"]
    assert ahead[0] == "Best by mean PCC is nh2st (0.410); the best baseline is ridge (0.370)."
    behind = make_run(tmp_path / "behind", baselines={"mean": None, "ridge": 0.47, "ridge-context": 0.5})
    verdict = page_data(report(behind))["verdict"]["sentences"][0]
    assert "the baseline ridge-context (0.500)" in verdict
    assert "nh2st (0.410), is beaten by 2 of the 3 baselines: ridge-context, ridge" in verdict
    flat = page_data(report(make_run(tmp_path / "flat", own=None)))["verdict"]["sentences"][0]
    assert "nh2st, is undefined" in flat
    alone = page_data(report(make_run(tmp_path / "alone", baselines={})))["verdict"]["sentences"][0]
    assert "no baseline" in alone


def test_the_headline_says_over_how_many_genes_it_is(tmp_path: Path) -> None:
    figure = page_data(report(make_run(tmp_path / "all")))["verdict"]["figure"]
    assert figure["genes"] == "over 3 genes"
    few = {**figures(0.41), "n_genes": 250, "n_genes_pcc_undefined": 222}
    figure = page_data(report(make_run(tmp_path / "few", summary=few)))["verdict"]["figure"]
    assert figure["genes"] == "over 28 genes; 222 of 250 do not vary on these spots"


def test_a_gene_is_trusted_on_a_page_that_is_so_on_all_of_its_slides(tmp_path: Path) -> None:
    verdicts: dict[str, dict[str, float | None]] = {
        "cv_pcc": dict.fromkeys(GENES, 0.5),
        "trusted": dict.fromkeys(GENES, True),
    }
    for name, share in (("s1", (0.1, 0.9, 0.2)), ("s2", (0.3, 0.1, 0.2))):
        none, lives, cut = np.zeros(0, np.float32), np.zeros((len(GENES), 0), np.float32), np.array(share, np.float32)
        said = Prediction(values(1)[0], carried=Carried(Strength(2, 1, 0.25, 0), none, none, none, lives, cut))
        write_prediction(
            tmp_path / f"{name}.h5ad", slide_data(name), GENES, said, None, None, {"recipe": "r"}, verdicts
        )
    data = page_data(report(tmp_path))
    assert dict(zip(data["genes"]["names"], data["genes"]["trusted"], strict=True)) == {
        GENES[0]: True,
        GENES[1]: False,
        GENES[2]: True,
    }
    assert dict(zip(data["genes"]["names"], column(data, "cut"), strict=True)) == pytest.approx(
        dict(zip(GENES, (0.3, 0.9, 0.2), strict=True)), abs=1e-5
    )


def test_optimistic_figures_carry_a_warning(tmp_path: Path) -> None:
    assert page_data(report(make_run(tmp_path / "nested")))["warnings"] == []
    paper = page_data(report(make_run(tmp_path / "paper", protocol="paper")))
    assert "optimistic" in paper["warnings"][0]
    assert paper["watched"] == "the test fold"
    one = page_data(report(make_run(tmp_path / "one", n_patients=1)))
    assert "one patient" in one["warnings"][0]
    for by in ("slide", "slide:3"):
        leaky = page_data(report(make_run(tmp_path / f"leaky-{len(by)}", folds_by=by, n_slides=4)))
        assert "both sides" in leaky["warnings"][0]


def test_a_run_without_folds_says_that_nothing_was_judged(tmp_path: Path) -> None:
    data = page_data(report(make_run(tmp_path / "run", fold_names=())))
    assert "Nothing was judged" in data["verdict"]["sentences"][0]
    assert data["verdict"]["figure"] is None
    assert data["slides"] == []
    assert data["genes"]["names"] == []
    assert [curve["fold"] for curve in data["history"]] == ["all slides"] * 2


def test_a_large_run_keeps_its_best_genes_in_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    whole = page_data(report(run))["slides"]
    size = sum(len(base64.b64decode(slide["values"])) for slide in whole)
    monkeypatch.setattr(maps, "_MOST_BYTES", size - 1)
    coarser = page_data(report(run))["slides"]
    assert coarser[0]["levels"] == 127
    assert coarser[0]["genes"] == [0, 1, 2]
    assert np.nanmax(np.abs(unpack(coarser[0]) - unpack(whole[0]))) < 0.03
    assert np.array_equal(np.isnan(unpack(coarser[0])), np.isnan(unpack(whole[0])))
    monkeypatch.setattr(maps, "_MOST_BYTES", size * 2 // 3)
    fewer = page_data(report(run))["slides"]
    assert sum(len(base64.b64decode(slide["values"])) for slide in fewer) <= size * 2 // 3
    assert 1 <= len(fewer[0]["genes"]) < 3
    monkeypatch.setattr(maps, "_MOST_VALUES", 10)
    monkeypatch.setattr(maps, "_FEWEST_GENES", 1)
    first, second = page_data(report(run))["slides"]
    assert first["genes"] == second["genes"] == [0], "ACTB stands first in per_gene.csv"
    assert first["panel"] == [0, 1, 2]
    assert unpack(first).shape == (2, 1, SIDE**2)


def test_out_may_be_any_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report(str(run), str(tmp_path / "new" / "page.html")) == tmp_path / "new" / "page.html"
    assert not (run / "report.html").exists()
    with pytest.raises(RunError, match=r"is a folder; give the report a file name"):
        report(run, tmp_path)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a finished run"):
        report(tmp_path / "nothing")
    with RunFolder(tmp_path / "begun") as begun:
        begun.log("start")
        with pytest.raises(RunError, match="not a finished run"):
            report(begun.part)
    (tmp_path / "begun").mkdir()
    with pytest.raises(RunError, match=r"nor a folder of predictions; did you mean 'begun'\?"):
        report(tmp_path / "begunn")
    run = make_run(tmp_path / "run")
    (run / "predictions" / "s2.h5ad").write_bytes(b"not hdf5")
    with pytest.raises(RunError, match=r"s2\.h5ad has changed since it was written"):
        report(run)
    (run / "SHA256SUMS").unlink()  # as in runs of earlier versions
    with pytest.raises(RunError, match=r"s2\.h5ad cannot be read"):
        report(run)
    shutil.copy(run / "predictions" / "s1.h5ad", run / "predictions" / "s2.h5ad")
    with pytest.raises(RunError, match=r"s1\.h5ad and .*s2\.h5ad are both of slide s1; leave one out"):
        report(run)
    (run / "metrics.json").write_text('{"head": "nh2st"}')
    with pytest.raises(RunError, match="lacks 'baselines'"):
        report(run)
    (run / "metrics.json").write_text("[]")
    with pytest.raises(RunError, match=r"metrics\.json is damaged"):
        report(run)
    assert not (run / "report.html").exists()


def test_without_folds_no_protocol_is_spoken_of(tmp_path: Path) -> None:
    labels = [label for label, _ in page_data(report(make_run(tmp_path / "run", fold_names=())))["facts"]]
    assert "Protocol" not in labels
    assert "Folds" in labels


def test_a_run_that_was_interrupted_is_shown_as_far_as_it_went(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.stored(views=8)
    seen: dict[str, Any] = {}
    path, kept = study.folder / "run", study.folder / "kept.0a1b2c3d.part"

    def killed(*arguments: Any, **options: Any) -> None:
        seen["at work"] = page_data(report(path))
        shutil.copytree(next(study.folder.glob("run.*.part")), kept)
        raise KeyboardInterrupt

    monkeypatch.setattr("nh2st_pipe.training.run.fit_all", killed)
    with pytest.raises(KeyboardInterrupt):
        train(study.folder / "store.zarr", recipe="ridge", genes=6, out=path, settings=["baselines=[mean]"])
    assert "This run is still being trained" in seen["at work"]["warnings"][0]
    lines = (kept / "log.jsonl").read_text().splitlines()
    folds = [line for line in lines if '"fold"' in line]
    # One fold of the baseline is still to be trained, and the log was cut off while it was written.
    (kept / "log.jsonl").write_text("\n".join([lines[0], *folds[:-1], folds[-1][:40]]))
    page = report(study.folder / "kept")
    assert page == study.folder / "kept.report.html"
    data = page_data(page)
    assert data["warnings"][0] == (
        "This run was interrupted: the page shows what there is of it. There is no model, and no figures by gene of "
        "the baselines; the same command goes on with it. Of 3 folds there are still to be trained: mean 1; means are "
        "over the others."
    )
    assert [len(head["folds"]) for head in data["heads"]] == [3, 2]
    assert data["heads"][0]["summary"]["pcc"] == pytest.approx(
        np.mean([fold["pcc"] for fold in data["heads"][0]["folds"]])
    )
    assert data["run"] == "kept"
    assert len(data["slides"]) == 3
    assert all(value is not None for value in column(data, "cv_pcc"))
    assert page_data(report(kept))["heads"] == data["heads"]
    (kept / "log.jsonl").write_text(lines[0])
    assert page_data(report(kept))["verdict"]["sentences"] == ["Nothing has been judged yet: no fold of ridge is done."]


def test_a_run_without_folds_shows_its_maps_as_in_sample(study: Study) -> None:
    study.stored(views=8)
    run = train(study.folder / "store.zarr", recipe="ridge", genes=6, out=study.folder / "run", folds="none")
    data = page_data(report(run.path))
    assert "Nothing was judged" in data["verdict"]["sentences"][0]
    assert [slide["label"] for slide in data["slides"]] == ["in-sample: trained on this slide"] * 3
    assert all(slide["in_sample"] for slide in data["slides"])
    words = [each["words"] for each in data["genes"]["columns"] if each["key"] == "cv_pcc"]
    assert words == ["PCC in-sample, of ridge"]
    assert data["genes"]["trusted"] == []


def test_predictions_are_reported_with_what_to_trust(study: Study, tmp_path: Path) -> None:
    study.stored(views=8)
    store = study.folder / "store.zarr"
    run = train(store, recipe="ridge", genes=6, out=study.folder / "run", settings=["baselines=[ridge-context]"])
    out = tmp_path / "p"
    said = call("predict", "--model", run.path, "--embeddings", store, "--out", out, "--report").stdout
    assert f"report: {out / 'report.html'}" in said
    data = page_data(out / "report.html")
    var = anndata.read_h5ad(out / "s0.h5ad").var
    assert data["heads"] == []
    assert dict(zip(data["genes"]["names"], data["genes"]["trusted"], strict=True)) == var["trusted"].to_dict()
    assert (
        f"{int(var['trusted'].sum())} of 6 genes are to be trusted: on 3 patients held out"
        in data["verdict"]["sentences"][1]
    )
    assert "s0: trained on this slide" in data["warnings"]
    cv_pcc = dict(zip(data["genes"]["names"], column(data, "cv_pcc"), strict=True))
    assert cv_pcc == pytest.approx(var["cv_pcc"].to_dict(), abs=1e-5)
    slide = data["slides"][0]
    assert [plane["key"] for plane in slide["planes"]] == ["target", "predicted"]
    predicted = anndata.read_h5ad(out / "s0.h5ad")
    half = dict(zip(var.index, (predicted.layers["high"] - predicted.X)[0].tolist(), strict=True))
    assert slide["half_width"] == pytest.approx([half[data["genes"]["names"][g]] for g in slide["genes"]], abs=1e-4)
    assert len(unzipped(slide["percentile"])) == slide["n"]
    assert call("report", out).stdout.strip() == str(out / "report.html")


@pytest.mark.parametrize(
    ("side", "mean", "said"),
    [
        ("few", 0.1, "ahead on 2 of 3 patients of"),
        ("few", None, ""),
        ("more", 0.1, "better than"),
        ("less", -0.1, "worse than"),
        ("unclear", 0.1, "not distinguishable from"),
    ],
)
def test_how_heads_stand_to_each_other_is_said_as_far_as_it_can_be(side: str, mean: float | None, said: str) -> None:
    from nh2st_pipe.evaluation.compare import Comparison
    from nh2st_pipe.reporting.words import _standing

    difference = {"side": side, "mean": mean, "ahead": 2, "behind": 1, "units": 3}
    assert _standing(difference, True, Comparison("ridge", "patient", 3, 5, [])) == said


@pytest.mark.parametrize(("diameter", "square", "radius"), [(None, True, 5.0), (6.0, False, 2.88), (30.0, True, 5.0)])
def test_spots_are_drawn_as_wide_as_they_are_and_never_overlap(
    diameter: float | None, square: bool, radius: float
) -> None:
    from nh2st_pipe.reporting.maps import _background

    xy = np.array([[x, y] for x in (100.0, 110.0, 120.0) for y in (100.0, 110.0)])
    factors = {"tissue_lowres_scalef": 1.0} | ({} if diameter is None else {"spot_diameter_fullres": diameter})
    uns = {"spatial": {"s": {"images": {"lowres": np.zeros((200, 200, 3), np.uint8)}, "scalefactors": factors}}}
    drawn = _background(uns, "s", xy)
    assert (drawn["square"], drawn["radius"]) == (square, radius)


def test_a_judged_run_says_which_differences_are_more_than_chance(study: Study) -> None:
    study.stored(views=8)
    settings = ["baselines=[mean, ridge-context]"]
    run = train(study.folder / "store.zarr", recipe="ridge", genes=6, out=study.folder / "run", settings=settings)
    data = page_data(report(run.path))
    compared = compare([run.path])
    assert data["verdict"]["figure"]["interval"] == pytest.approx(compared.rows[0]["interval"])
    assert data["verdict"]["figure"]["over"] == "3 patients"
    sentences = data["verdict"]["sentences"]
    assert sentences[1].startswith("By PCC, with differences paired over 3 patients, ridge is ")
    assert sentences[2].startswith("By MSE, with differences paired over 3 patients, ridge is ")
    assert sentences[1].endswith("3 patients are too few to rule out chance.")
    for row in compared.rows[1:]:
        of = row["difference"]["pcc"]
        word, won = ("ahead", of["ahead"]) if of["ahead"] >= of["behind"] else ("behind", of["behind"])
        standing = f"{word} on {won} of 3 patients of"
        place = sentences[1].index(f" {row['head']}")
        assert sentences[1].rindex(standing, 0, place) == max(
            sentences[1].rfind(each, 0, place) for each in ("ahead on", "behind on")
        )
    about = About.of(load_model(run.path).about, run.path)
    assert dict(zip(data["genes"]["names"], data["genes"]["trusted"], strict=True)) == about.trusted
    assert data["level"] == 0.9
    for slide in data["slides"]:
        expected = [about.intervals.levels["0.9"].half_width[data["genes"]["names"][g]] for g in slide["genes"]]
        assert slide["half_width"] == expected
    assert data["calibration"]["groups"] == 3
    assert [level["level"] for level in data["calibration"]["levels"]] == [0.5, 0.8, 0.9, 0.95]


def test_thumbnails_of_many_slides_are_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a page weighs does not grow with the slides."""

    def widths(budget: int) -> list[int]:
        monkeypatch.setattr(maps, "_PICTURE_BYTES", budget)
        slides = maps.read_slides(sorted(tmp_path.glob("*.h5ad")), {})
        assert sum(len(slide.shown["image"]) for slide in slides) < 1.6 * budget
        return [max(slide.shown["width"], slide.shown["height"]) for slide in slides]

    for number in range(6):
        slide = slide_data(f"s{number}")
        slide.uns["spatial"][f"s{number}"]["images"]["lowres"] = picture(1200, 1200, number)
        slide.uns["spatial"][f"s{number}"]["scalefactors"]["tissue_lowres_scalef"] = 6.0
        predicted, _ = values(number)
        write_prediction(tmp_path / f"s{number}.h5ad", slide, GENES, Prediction(predicted), None, None, {})
    assert widths(24_000_000) == [640] * 6
    few = widths(60_000)
    assert len(set(few)) == 1
    assert 96 < few[0] < 200
