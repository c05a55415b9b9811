"""Runs of every format so far are read; what was changed, is too new, or half written is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import anndata
import numpy as np
import polars as pl
import pytest
import yaml

from nh2st_pipe import NH2ST
from nh2st_pipe.core.errors import RecipeError, RunError, StoreError, UsageError
from nh2st_pipe.evaluation.judge import evaluate
from nh2st_pipe.evaluation.reference import REFERENCE, Reference
from nh2st_pipe.evaluation.statistics import headline
from nh2st_pipe.exporting.view import read_view
from nh2st_pipe.heads.base import Blocked, Prediction
from nh2st_pipe.prediction import predict
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.card import model_card
from nh2st_pipe.runs.checksums import write_sums
from nh2st_pipe.runs.folder import RunFolder
from nh2st_pipe.runs.model import load_model, load_reference
from nh2st_pipe.training.run import train
from tests.conftest import Study
from tests.hub import standing_in

V0 = Path(__file__).parent / "v0"
V1_STORE = Path(__file__).parents[1] / "stores" / "v1" / "whole"


@pytest.fixture
def finished(study: Study) -> Path:
    study.stored(views=8)
    return train(study.folder / "store.zarr", recipe="ridge", genes=6, out=study.folder / "run").path


@pytest.mark.parametrize("name", ["nh2st", "ridge-context"])
def test_a_run_of_the_first_version_predicts_as_it_did(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(V0 / name, tmp_path / "run"))
    model = load_model(run)
    about = About.of(model.about, run)
    assert (about.format, about.recipe, about.trained_on) == (0, name, ())
    summary = predict(run, embeddings=V1_STORE, out=tmp_path / "pred")
    with np.load(V0 / f"expected-{name}.npz") as by_that_version:
        expected = dict(by_that_version)
    assert set(summary.files) == set(expected)
    for slide_id, path in summary.files.items():
        data = anndata.read_h5ad(path)
        assert np.allclose(data.X, expected[slide_id], atol=1e-6)
        assert str(data.uns["nh2st_pipe"]["unit"]).startswith(
            "log10(counts scaled to 10,000 per spot over the panel + 1), mean over"
        )
    assert report(run).is_file()


def test_a_model_says_what_it_was_made_from(finished: Path, study: Study) -> None:
    about = About.of(load_model(finished).about, finished)
    assert about.format == 1
    assert [slide.slide_id for slide in about.trained_on] == ["s0", "s1", "s2"]
    assert [slide.patient for slide in about.trained_on] == ["P0", "P1", "P2"]
    assert len({slide.image for slide in about.trained_on}) == 3
    assert set(about.cv_pcc) >= set(load_model(finished).genes)
    data = anndata.read_h5ad(
        predict(finished, embeddings=study.folder / "store.zarr", out=study.folder / "p").files["s1"]
    )
    said = data.uns["nh2st_pipe"]
    assert said["in_sample"] == "trained on this slide"
    assert (said["encoder"], len(said["model_sha256"])) == ("fake", 64)
    assert data.var["cv_pcc"].tolist() == [about.cv_pcc[gene] for gene in data.var_names]


def test_slides_and_patients_that_were_trained_on_are_named(finished: Path, make_study: Callable[..., Study]) -> None:
    new = make_study(2, patients=["P1", "NEW"], name="new")
    for i in range(2):  # other pictures than the training slides'
        shutil.copy(new.folder / f"s{1 - i}.png", new.folder / f"t{i}.png")
    from PIL import Image

    for i in range(2):
        Image.open(new.folder / f"t{i}.png").rotate(90).save(new.folder / f"s{i}.png")
    new.stored(views=8)
    summary = predict(finished, embeddings=new.folder / "store.zarr", out=new.folder / "p")
    assert summary.notices[:-1] == ["s0: trained on other slides of patient P1"]


def test_predictions_have_intervals_and_genes_a_verdict(finished: Path, study: Study) -> None:
    about, store = About.of(load_model(finished).about, finished), study.folder / "store.zarr"
    assert (about.intervals.by, about.intervals.groups) == ("patient", 3)
    fold = {row["gene"]: row for row in pl.read_csv(finished / "per_gene.csv").iter_rows(named=True)}
    for level, promised in (("0.5", True), ("0.9", False)):
        summary = predict(finished, embeddings=store, out=study.folder / level, level=float(level))
        data = anndata.read_h5ad(summary.files["s0"])
        reach = about.intervals.levels[level]
        width = np.array([reach.half_width[gene] for gene in data.var_names])
        assert np.allclose(data.layers["high"] - data.X, width, atol=1e-5)
        assert np.allclose(data.X - data.layers["low"], width, atol=1e-5)
        words = f"intervals at {float(level):.0%} are from 3 patients held out, and cover"
        assert summary.notices[-1].startswith(words)
        assert ("is not promised (3 patients)" in summary.notices[-1]) is not promised
        assert data.uns["nh2st_pipe"]["interval_level"] == float(level)
    low, high, pcc = data.var["cv_low"], data.var["cv_high"], data.var["cv_pcc"]
    assert ((low < pcc) & (pcc < high)).all()
    assert data.var["trusted"].dtype == data.var["judged"].dtype == bool
    assert data.var["trusted"].tolist() == [about.trusted[gene] for gene in data.var_names]
    assert data.var["judged"].all()
    assert "no baseline was there to hold them against" in about.trusted_in_words
    assert set(fold) >= set(data.var_names)
    with pytest.raises(UsageError, match=r"--level takes 0\.5, 0\.8, 0\.9, 0\.95, not 0\.7"):
        predict(finished, embeddings=store, level=0.7)


def test_tiles_say_how_far_they_are_from_the_training_tiles(finished: Path, study: Study, tmp_path: Path) -> None:
    store = study.folder / "store.zarr"
    data = anndata.read_h5ad(predict(finished, embeddings=store, out=tmp_path / "p").files["s0"])
    assert data.obs["train_percentile"].median() < 60, "it was trained on this slide"
    assert data.obs["unlike"].cat.categories.tolist() == ["no", "yes"]
    reference = load_reference(finished)
    assert reference is not None
    Reference(reference.keys + 9, reference.mean, reference.scale, reference.own).save(finished / "model")
    with pytest.raises(RunError, match=rf"{REFERENCE} has changed since it was written"):
        predict(finished, embeddings=store, out=tmp_path / "p")
    write_sums(finished / "model")
    summary = predict(finished, embeddings=store, out=tmp_path / "p")
    assert any("s0: 100% of its tiles lie farther from the training tiles" in words for words in summary.notices)
    assert summary.notices[-1].endswith("they say little of s0, s1, s2")
    far = anndata.read_h5ad(summary.files["s0"])
    assert (far.obs["unlike"] == "yes").all()
    assert far.uns["nh2st_pipe"]["unlike_share"] == 1.0
    (finished / "model" / REFERENCE).unlink()  # as in models of before
    write_sums(finished / "model")
    assert "unlike" not in anndata.read_h5ad(predict(finished, embeddings=store, out=tmp_path / "p").files["s0"]).obs


def test_chosen_genes_are_written_alone_and_others_are_refused_by_name(
    finished: Path, study: Study, tmp_path: Path
) -> None:
    store = study.folder / "store.zarr"
    whole = anndata.read_h5ad(predict(finished, embeddings=store, out=tmp_path / "p").files["s0"])
    one, two = str(whole.var_names[4]), str(whole.var_names[1])
    (tmp_path / "genes.txt").write_text(f"{one}\n{two}\n")
    for genes in (f"{one}, {two}", [one, two], tmp_path / "genes.txt", str(tmp_path / "genes.txt")):
        some = anndata.read_h5ad(predict(finished, embeddings=store, out=tmp_path / "q", genes=genes).files["s0"])
        assert some.var_names.tolist() == [one, two]
        for layer in (None, "low", "high", "target"):
            of = [data.X if layer is None else data.layers[layer] for data in (some, whole)]
            assert np.array_equal(of[0], of[1][:, [4, 1]])
    judged = evaluate(tmp_path / "q", store)["slides"]["s0"]
    assert judged["n_genes"] == 2
    words = rf"does not predict {one}x \(nearest: {one}.*; ZZZZZ \(none is called nearly so"
    with pytest.raises(UsageError, match=words):
        predict(finished, embeddings=store, out=tmp_path / "q", genes=f"{one}x,ZZZZZ")
    with pytest.raises(UsageError, match=r"there is no gene file gene\.txt"):
        predict(finished, embeddings=store, out=tmp_path / "q", genes="gene.txt")
    turned = list(whole.var_names[::-1])
    every = anndata.read_h5ad(predict(finished, embeddings=store, out=tmp_path / "q", genes=turned).files["s0"])
    assert every.var_names.tolist() == turned
    assert np.array_equal(every.X, whole.X[:, ::-1])
    with pytest.raises(UsageError, match="--genes names no gene"):
        predict(finished, embeddings=store, out=tmp_path / "q", genes=",")


def test_what_is_predicted_by_blocks_is_what_is_predicted_at_once(
    finished: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = study.folder / "store.zarr"
    train(
        store,
        recipe="nh2st-context",
        genes=6,
        out=tmp_path / "run",
        folds="none",
        settings=["head.network.epochs=1", "head.network.members=2", "head.rank=3"],
    )
    for model in (finished, tmp_path / "run"):
        whole = anndata.read_h5ad(predict(model, embeddings=store, out=tmp_path / "p").files["s0"])
        with monkeypatch.context() as patch:
            patch.setattr("nh2st_pipe.heads.blocked._AT_ONCE", 60)  # two genes of 25 spots
            patch.setattr("nh2st_pipe.heads.carry._AT_ONCE", 80)
            patch.setattr("nh2st_pipe.runs.predictions._LARGE", 10)
            done = predict(model, embeddings=store, out=tmp_path / "q")
            view = read_view(done.files["s0"])
            some = [str(whole.var_names[i]) for i in (4, 1, 2)]
            few = predict(model, embeddings=store, out=tmp_path / "r", genes=some, float16=True).files["s0"]
            patch.setattr("nh2st_pipe.runs.predictions._BETWEEN", 0)
            runs = anndata.read_h5ad(predict(model, embeddings=store, out=tmp_path / "t", genes=some).files["s0"])
        blocked = anndata.read_h5ad(done.files["s0"])
        assert np.allclose(blocked.X, whole.X, atol=1e-5)
        assert np.array_equal(blocked.layers["target"], whole.layers["target"])
        if "spread" in whole.layers:
            assert np.allclose(blocked.layers["spread"], whole.layers["spread"], atol=1e-6)
        assert "low" not in blocked.layers  # its width tells
        if "low" in whole.layers:
            assert "low" in view.layers
            for end in ("low", "high"):
                assert np.allclose(view.values(end), whole.layers[end], atol=1e-5)
        halved = anndata.read_h5ad(few)
        assert np.allclose(runs.X, whole.X[:, [4, 1, 2]], atol=1e-5)
        assert halved.X.dtype == np.float16
        assert halved.var_names.tolist() == some
        assert np.allclose(halved.X, whole.X[:, [4, 1, 2]], rtol=2e-3)


def test_trusted_genes_are_written_alone(finished: Path, study: Study, tmp_path: Path) -> None:
    store = study.folder / "store.zarr"
    about = About.of(load_model(finished).about, finished)
    one, two, *others = about.trusted
    config = json.loads((finished / "model" / "config.json").read_text())
    for trusted, match in (
        ({one: True, two: True, others[0]: False}, ""),
        ({one: False}, r"trusts none of 6 genes \(1"),
    ):
        config["about"]["trusted"] = trusted
        (finished / "model" / "config.json").write_text(json.dumps(config))
        write_sums(finished / "model")
        if match:
            with pytest.raises(UsageError, match=match):
                predict(finished, embeddings=store, out=tmp_path / "p", trusted_only=True)
        else:
            done = predict(finished, embeddings=store, out=tmp_path / "p", trusted_only=True)
            assert set(anndata.read_h5ad(done.files["s0"]).var_names) == {one, two}


@pytest.mark.parametrize(("recipe", "several"), [("mlp", True), ("nh2st-context", True), ("ridge", False)])
def test_members_that_differ_say_by_how_much(study: Study, recipe: str, several: bool) -> None:
    study.stored(views=8)
    store, small = study.folder / "store.zarr", ["head.network.epochs=2", "head.network.members=3"] if several else []
    run = train(store, recipe=recipe, genes=6, out=study.folder / "run", folds="none", settings=small)
    data = anndata.read_h5ad(predict(run.path, embeddings=store, out=study.folder / "p").files["s0"])
    assert ("spread" in data.layers) is several
    if several:
        assert data.layers["spread"].shape == data.shape
        assert (data.layers["spread"] > 0).all()


def test_a_slide_of_another_resolution_is_not_predicted_with_tiles_of_as_many_px(
    study: Study, make_study: Callable[..., Study]
) -> None:
    def with_mpp(folder: Study, mpp: float) -> None:
        lines = folder.manifest.read_text().splitlines()
        folder.manifest.write_text("\n".join([lines[0] + ",mpp", *(f"{line},{mpp}" for line in lines[1:])]) + "\n")

    with_mpp(study, 0.5)
    study.stored()
    run = train(study.folder / "store.zarr", recipe="ridge", genes=6, out=study.folder / "run").path
    new = make_study(1, name="new")
    with_mpp(new, 0.25)
    new.stored()
    there = {"embeddings": new.folder / "store.zarr", "out": new.folder / "p"}
    failed = predict(run, **there).failed  # type: ignore[arg-type]
    assert "s0 is of 0.25 µm per px, and the model was trained with tiles of 48 px at 0.5" in failed["s0"]
    assert not predict(run, **there, any_mpp=True).failed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "model/config.json", "metrics.json", "predictions/s0.h5ad"]
)
def test_a_changed_file_is_named(finished: Path, name: str) -> None:
    path = finished / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    read = load_model if name.startswith("model") else report
    with pytest.raises(RunError, match=f"{path.name} has changed since it was written"):
        read(finished)
    path.unlink()
    with pytest.raises(RunError):
        read(finished)


def test_the_list_of_files_is_sha256sums(finished: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not on this machine")
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=finished, check=True)


def test_newer_runs_and_models_are_refused(finished: Path) -> None:
    (finished / "SHA256SUMS").unlink()
    (finished / "model" / "SHA256SUMS").unlink()
    for path, read, what in (
        (finished / "metrics.json", lambda: report(finished), "run format 9"),
        (finished / "model" / "config.json", lambda: About.of(load_model(finished).about, finished), "has format 9"),
    ):
        values = json.loads(path.read_text())
        (values if path.name == "metrics.json" else values["about"])["format"] = 9
        path.write_text(json.dumps(values))
        with pytest.raises(RunError, match=what):
            read()


def test_weights_come_from_safetensors_alone_and_from_a_run_or_its_model(finished: Path) -> None:
    run = V0 / "nh2st"
    head = NH2ST.from_pretrained(run)
    assert head.genes == NH2ST.from_pretrained(run / "model").genes == load_model(run / "model").genes
    weights = finished / "model" / "model.safetensors"
    (finished / "model" / "SHA256SUMS").unlink()
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(RunError, match=r"holds no model\.safetensors"):
        load_model(finished)


def test_only_hf_hub_goes_to_the_network(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(repo: str, **options: object) -> str:
        asked.append(repo)
        return str(finished / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RunError, match=r"there is no run at .*runn; did you mean 'run'\?"):
        load_model(finished.with_name("runn"))
    with pytest.raises(RunError, match="there is no run at owner/name"):
        load_model("owner/name")
    assert asked == []
    assert load_model("hf-hub:owner/name@v1").genes == load_model(finished).genes
    assert asked == ["owner/name"]
    with pytest.raises(RunError, match="hf-hub:owner/name is expected"):
        load_model("hf-hub:name")


def test_other_weights_than_the_models_are_refused_before_anything_is_embedded(finished: Path, study: Study) -> None:
    (finished / "model" / "SHA256SUMS").unlink()
    config = finished / "model" / "config.json"
    values = json.loads(config.read_text())
    values["about"]["store"]["weights"] = {"sha256": "f" * 64, "source": "w.safetensors"}
    config.write_text(json.dumps(values))
    out = study.folder / "predicted"
    with pytest.raises(StoreError, match=r"of w\.safetensors \(SHA-256 ffffffffffff…\), and built in is another"):
        predict(finished, slides=study.manifest, out=out)
    assert not (out / "store.zarr").exists()


def test_a_head_comes_from_the_hub_whole_or_not_at_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        hub.repos = {
            "lab/head": files,
            "lab/cut": {**files, "model.safetensors": files["model.safetensors"][:-1] + b"x"},
            "lab/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"code"},
            "lab/other": {"README.md": b""},
        }
        assert load_model("hf-hub:lab/head").genes == load_model(finished).genes
        for name, message in (
            ("lab/cut", "has changed since it was written"),
            ("lab/pickled", r"holds no model\.safetensors"),
            ("lab/other", "holds no trained head"),
            ("lab/none", "the hub knows no lab/none"),
        ):
            with pytest.raises(RunError, match=message):
                load_model(f"hf-hub:{name}")
        assert not any(path.endswith("pytorch_model.bin") for path in hub.asked)


def test_two_runs_of_one_name_do_not_touch_each_others_work(tmp_path: Path) -> None:
    def fill(folder: RunFolder) -> None:
        (folder.part / "model").mkdir()
        for name in ("recipe.yaml", "metrics.json", "per_gene.csv", "model/config.json", "model/model.safetensors"):
            (folder.part / name).write_text("{}")

    for question in ("", "one", "another"):
        with RunFolder(tmp_path / f"run{question}", "one") as first:
            with pytest.raises(RunError, match="is being trained by another process"):
                RunFolder(tmp_path / f"run{question}", question)
            assert [path.name for path in tmp_path.glob(f"run{question}.*")] == [first.part.name]
            assert first.part.is_dir()
            fill(first)
            first.commit()
        with pytest.raises(RunError, match="exists already"):
            RunFolder(tmp_path / f"run{question}", question)
    with RunFolder(tmp_path / "other") as second:
        fill(second)
        shutil.copytree(tmp_path / "run", tmp_path / "other")  # by hand
        with pytest.raises(RunError, match=r"appeared while training; the finished run is at .*other-"):
            second.commit()
    names = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert sorted(names) == ["other", "other", "run", "runanother", "runone"]
    assert not list(tmp_path.rglob(".lock"))
    with RunFolder(tmp_path / "half") as half:
        fill(half)
        (half.part / "metrics.json").unlink()
        with pytest.raises(RunError, match=r"the run lacks metrics\.json"):
            half.commit()
    shutil.rmtree(half.part)
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "failed"):
        _ = 1 / 0
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from nh2st_pipe.runs.folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert len(list(tmp_path.glob("run.*.part"))) == 1
    with RunFolder(tmp_path / "run") as folder:
        assert list(tmp_path.glob("run.*.part")) == [folder.part]


def test_names_that_would_collide_or_escape_are_refused(study: Study) -> None:
    study.stored()
    store = study.folder / "store.zarr"
    with pytest.raises(RecipeError, match="ridge would stand twice in one table"):
        train(store, recipe="ridge", settings=["baselines=[ridge]"])
    with pytest.raises(RecipeError, match="name: string should match pattern"):
        train(store, recipe="ridge", settings=["name=../../escaped"])


def test_a_models_card_says_what_it_is_and_what_it_reached(finished: Path) -> None:
    card = (finished / "model" / "README.md").read_text()
    metrics = json.loads((finished / "metrics.json").read_text())
    about = About.of(load_model(finished).about, finished)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["license"]) == ("nh2st-pipe", "apache-2.0")
    assert f"Predicts {len(load_model(finished).genes)} genes a spot, as {about.unit}." in card
    assert "Embeddings: fake (96 values" in card
    assert "Trained on 3 slides of 3 patients, 75 spots" in card
    own = metrics["summary"]
    figures = (own[key] for key in ("pcc", "pcc_top50_train", "pcc_top50", "pcc_top50_null"))
    assert f"| {metrics['head']} | {' | '.join(f'{value:.3f}' for value in figures)} | {own['mse']:.4f} |" in card
    assert f"On 3 patients held out (3 folds by patient; {metrics['protocol']}" in card
    assert headline(own) in card
    assert about.trusted_in_words in card
    for name in metrics["baselines"]:
        assert f"\n| {name} | " in card
    assert "Nothing was judged" in model_card({**metrics, "summary": None, "folds": []}, about)
    assert "- Note: odd" in model_card({**metrics, "notes": ["odd"]}, about)


def test_slides_that_are_embedded_already_are_predicted_without_the_encoders_weights(
    finished: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predict(finished, slides=study.manifest, out=tmp_path / "p")
    asked = mock.Mock(side_effect=AssertionError("weights were asked for"))
    monkeypatch.setattr("nh2st_pipe.encoders.weights.find_weights", asked)
    monkeypatch.setattr("nh2st_pipe.embedding.run.find_weights", asked)
    assert predict(finished, slides=study.manifest, out=tmp_path / "p").files == first.files
    with pytest.raises(AssertionError, match="weights were asked for"):
        predict(finished, slides=study.manifest, out=tmp_path / "q")


def test_values_that_several_layers_have_are_made_once(finished: Path, study: Study, tmp_path: Path) -> None:
    made, plain = list[int](), Blocked.dense

    def dense(self: Blocked) -> Prediction:
        made.append(self.shape[1])
        return plain(self)

    with mock.patch.object(Blocked, "dense", dense):
        done = predict(finished, embeddings=study.folder / "store.zarr", out=tmp_path / "p")
    assert made == [6] * 3
    assert {"low", "high"} <= set(anndata.read_h5ad(done.files["s0"]).layers)
