"""HEST-Benchmark on a small folder of its layout: a split worked out by hand, and what is done with bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import anndata
import h5py
import numpy as np
import pytest
import scipy.stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from nh2st_pipe.benching import hest
from nh2st_pipe.benching.hest import PUBLISHED, Benchmarked, benchmark_hest
from nh2st_pipe.core.errors import ExpressionError, UsageError
from nh2st_pipe.datasets import import_dataset
from nh2st_pipe.datasets.generated import GENES, Tissue, hest_bench
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.training.fold import run_fold
from nh2st_pipe.training.on_ray import TrainingOnRay
from tests.cli.test_commands import call

SPLITS = [(["A", "B"], ["C", "D"]), (["C", "D"], ["A"])]
PANEL = GENES[:5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hest") / "bench"
    hest_bench(place, "IDC", SPLITS, PANEL)
    return hest_bench(place, "PRAD", [(["E"], ["F"])], GENES[3:7])


@pytest.fixture(scope="module")
def done(folder: Path) -> Benchmarked:
    return benchmark_hest(folder, encoder="fake", heads=["hest-ridge", "ridge"], out=folder.parent / "out", seed=3)


def test_hest_ridge_under_hests_protocol_is_the_benchmarks_own_figure(folder: Path, done: Benchmarked) -> None:
    """Their code, written out, from the published files and the embeddings that were kept."""
    store = open_store(done.out / "IDC/store.zarr")
    x, y = {}, {}
    for name in "ABCD":
        slide = store.read(name)
        with h5py.File(folder / f"IDC/patches/{name}.h5") as file:
            barcodes = [each.decode() for each in np.asarray(file["barcode"]).ravel()]
        assert sorted(slide.barcodes) == sorted(barcodes)  # read in another order, which is no matter
        data = anndata.read_h5ad(folder / f"IDC/adata/{name}.h5ad")[slide.barcodes]
        x[name] = slide.views[:, 0].astype(np.float64)
        y[name] = np.log1p(data[:, PANEL].X.toarray().astype(np.float64)).astype(np.float32)  # as targets are kept
    folds = []
    for train, test in SPLITS:
        first, last = ([np.concatenate([of[name] for name in names]) for of in (x, y)] for names in (train, test))
        scaler = StandardScaler().fit(first[0])
        pca = PCA(n_components=min(256, *first[0].shape), random_state=1)
        reduced = pca.fit_transform(scaler.transform(first[0]))
        penalty = 100 / (reduced.shape[1] * len(PANEL))
        ridge = Ridge(solver="lsqr", alpha=penalty, random_state=1, fit_intercept=False, max_iter=1000)
        said = ridge.fit(reduced, first[1]).predict(pca.transform(scaler.transform(last[0])))
        folds.append(np.mean([scipy.stats.pearsonr(last[1][:, g], said[:, g])[0] for g in range(len(PANEL))]))
    (row,) = [row for row in done.rows if row["task"] == "IDC" and row["head"] == "hest-ridge"]
    assert row["hest"] == pytest.approx(np.mean(folds), abs=1e-6)
    assert row["splits"] == 2
    assert row["ours"] > 0.1
    assert row["ours"] != pytest.approx(row["hest"], abs=1e-3)


def test_a_tile_is_a_patch_as_it_was_published_and_its_surroundings_are_what_they_were(
    folder: Path, tmp_path: Path
) -> None:
    said = list[str]()
    made = import_dataset("hest-bench", folder / "IDC", tmp_path / "m.csv", said.append)
    assert (made.failed, {row.extra["task"] for row in made.rows}) == ({}, {"IDC"})
    assert {row.slide_id: row.extra.get("fold") for row in made.rows} == {"A": "1", "B": None, "C": "0", "D": "0"}
    assert any("farther apart" in words for words in said)
    for number, row in enumerate(read_manifest(tmp_path / "m.csv")):
        assert row.mpp == 0.5
        assert row.expression is not None
        data = anndata.read_h5ad(row.expression)
        with h5py.File(folder / f"IDC/patches/{row.slide_id}.h5") as file:
            patches = np.asarray(file["img"])
        slide = open_slide(row.slide)
        for i in (0, 17, len(data) - 1):
            x, y = data.obsm["spatial"][i]
            assert np.array_equal(read_tile(slide, (x, y), 224.0, 224, "bicubic"), patches[i])
        at = [int(name.partition("x")[0]) for name in data.obs_names]
        true = Tissue(number).xy[at]
        ratio = np.ptp(data.obsm["spatial"], axis=0) / np.ptp(true, axis=0)
        assert ratio == pytest.approx(ratio.mean(), rel=0.01)
        assert np.abs(data.obsm["spatial"] - data.obsm["spatial"][0] - ratio.mean() * (true - true[0])).max() < 3


def test_nothing_is_done_twice(folder: Path, done: Benchmarked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("it is kept")

    monkeypatch.setattr(hest, "run_fold", refuse)
    again = benchmark_hest(folder, encoder="fake", heads=["hest-ridge", "ridge"], out=done.out, seed=3)
    assert again.rows == done.rows
    with pytest.raises(AssertionError, match="it is kept"):
        benchmark_hest(folder, encoder="fake", heads=["ridge"], out=done.out, seed=4)


class Actors:
    """Stands for a cluster's actors: does tasks here, last first, but for those that are to fail."""

    resources: ClassVar = {"num_cpus": 1}

    def __init__(self, failing: str = "") -> None:
        self._failing, self.closed, self.read = failing, 0, set[str]()

    def do(self, tasks: Sequence[Any], ended: Any, tell: Any, say: Any) -> dict[int, str]:
        failed = {}
        for number, (reading, task) in reversed(list(enumerate(tasks))):
            self.read.add(reading.recipe.features.views)
            words = f"{task.recipe.name} {task.recipe.targets.smooth} {task.fold.name}"
            if self._failing and self._failing in words:
                failed[number] = "odd counts"
            else:
                ended(number, run_fold(task))
        return failed

    def __exit__(self, *_: object) -> None:
        self.closed += 1


def on_actors(monkeypatch: pytest.MonkeyPatch, actors: Actors) -> list[tuple[Any, ...]]:
    asked = list[tuple[Any, ...]]()

    @contextmanager
    def given(*of: Any) -> Iterator[TrainingOnRay]:
        asked.append(of)
        cluster = TrainingOnRay(SimpleNamespace(kind="cpu"))  # type: ignore[arg-type]
        monkeypatch.setattr(cluster, "_actors", lambda tasks, say: actors)
        monkeypatch.setattr(cluster, "close", lambda: actors.__exit__())
        yield cluster

    def embedded(manifest: Path, **options: Any) -> Any:
        on = tuple(options.pop(name) for name in ("engine", "address", "actors"))
        asked.append(on)
        return embed(manifest, **options)

    monkeypatch.setattr(hest, "training_engine", given)
    monkeypatch.setattr(hest, "embed", embedded)
    return asked


def test_on_a_cluster_figures_are_those_of_a_local_run(
    folder: Path, done: Benchmarked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = Actors()
    asked = on_actors(monkeypatch, actors)
    options: dict[str, Any] = {"heads": ["hest-ridge", "ridge"], "seed": 3, "engine": "ray", "address": "x:1"}
    there = benchmark_hest(folder, encoder="fake", out=tmp_path, actors=3, **options)
    assert there.rows == done.rows
    assert asked == [("ray", "auto", "x:1", 3, None), ("ray", "x:1", 3), ("ray", "x:1", 3)]
    assert actors.closed == 2  # before another task's slides are embedded
    assert actors.read == {"all"}


def test_what_fails_on_a_cluster_is_told_and_the_rest_is_kept(
    folder: Path, done: Benchmarked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_actors(monkeypatch, Actors("ridge grid8 split 1"))
    options: dict[str, Any] = {"encoder": "fake", "heads": ["hest-ridge", "ridge"], "seed": 3, "tasks": ["IDC"]}
    some = benchmark_hest(folder, out=tmp_path, engine="ray", **options)
    assert "2 of 8 fits failed; the others are kept" in some.failed["IDC"]
    assert "ridge, split 1: odd counts" in some.failed["IDC"]
    assert {file.name for file in (tmp_path / "IDC/results").iterdir()} == {"hest-ridge-hest.json", "ridge-hest.json"}
    actors = Actors(" none ")  # those that are kept are not done again
    on_actors(monkeypatch, actors)
    again = benchmark_hest(folder, out=tmp_path, engine="ray", **options)
    assert again.rows == [row for row in done.rows if row["task"] == "IDC"]


def test_tasks_count_the_same_and_the_published_row_is_named(done: Benchmarked) -> None:
    assert [row["task"] for row in done.rows] == ["IDC", "IDC", "PRAD", "PRAD"]
    means = {row["head"]: row for row in done.means()}
    assert means["ridge"]["hest"] == pytest.approx(np.mean([done.rows[1]["hest"], done.rows[3]["hest"]]))
    assert means["ridge"]["task"] == "mean of 2"
    assert done.published() == "no published row of HEST-Benchmark is known for fake"
    known = Benchmarked(done.out, "uni", [{**row, "task": task} for task in hest.TASKS for row in done.rows[:1]])
    assert known.published().endswith("mean over 9 tasks: the mean above should equal it")
    assert f"{PUBLISHED['uni'][1]:.3f}" in known.published()
    some = Benchmarked(done.out, "uni", done.rows)
    assert "not here: PAAD, SKCM" in some.published()


def test_a_task_that_cannot_be_run_is_named_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    data = hest_bench(tmp_path / "bench", "IDC", [(["B"], ["C"])], PANEL)
    shutil.copytree(folder / "PRAD", data / "PRAD")
    whole = (data / "IDC/adata/C.h5ad").read_bytes()
    (data / "IDC/adata/C.h5ad").write_bytes(b"nothing")
    arguments = ["benchmark", "hest", str(data), "--encoder", "fake", "--heads", "hest-ridge", "--out", str(tmp_path)]
    failed = call(*arguments)
    assert failed.returncode == 1
    assert "IDC" in failed.stderr
    assert "1 of its samples cannot be used; C: " in failed.stderr
    assert "mean of 1" in failed.stdout
    (data / "IDC/adata/C.h5ad").write_bytes(whole)
    mended = call(*arguments, "--json")
    assert mended.returncode == 0
    assert [row["task"] for row in json.loads(mended.stdout)["rows"]] == ["IDC", "PRAD"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "IDC/splits/train_1.csv").unlink(), "train_1.csv is missing: test_1.csv does not say"),
        (lambda d: (d / "IDC/splits/train_1.csv").write_text("sample_id\nA\nC\n"), "A stand both in .*test_1.csv"),
        (lambda d: (d / "IDC/splits/test_0.csv").write_text("sample\nA\n"), "sample_id"),
        (lambda d: (d / "IDC/var_50genes.json").unlink(), "the genes of the task IDC are not known"),
        (lambda d: shutil.rmtree(d / "IDC/splits"), "there is no task of HEST-Benchmark"),
    ],
)
def test_a_folder_that_is_no_task_is_told_so(folder: Path, tmp_path: Path, change: object, message: str) -> None:
    shutil.copytree(folder / "IDC", tmp_path / "b/IDC")
    change(tmp_path / "b")  # type: ignore[operator]
    with pytest.raises(ExpressionError, match=message):
        benchmark_hest(tmp_path / "b", encoder="fake", out=tmp_path / "out")


def test_a_task_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no task IDD; did you mean 'IDC'\?"):
        benchmark_hest(folder, encoder="fake", tasks=["IDD"], out=tmp_path)
    assert call("benchmark", "hemi", str(folder), "--encoder", "fake").returncode == 2


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"img": np.zeros((60, 200, 200, 3), np.uint8)}, "n × 224 × 224 × 3 uint8 is expected"),
        ({"coords": np.zeros((58, 2), int)}, "two patches are 0 px apart"),
        ({"coords": np.zeros((5, 2), int)}, "58 patches, 5 places and 58 barcodes"),
        ({"barcode": np.full(58, b"no")}, "have no spot in common"),
        ({"barcode": None}, "cannot be read as img, coords, barcode"),
    ],
)
def test_patches_that_cannot_be_are_named(
    folder: Path, tmp_path: Path, change: dict[str, np.ndarray | None], cause: str
) -> None:
    shutil.copytree(folder / "PRAD", tmp_path / "PRAD")
    with h5py.File(tmp_path / "PRAD/patches/E.h5", "r+") as file:
        for key, values in change.items():
            about = dict(file[key].attrs)
            del file[key]
            if values is not None:
                file[key] = values
                file[key].attrs.update(about)
    made = import_dataset("hest-bench", tmp_path, tmp_path / "m.csv", lambda words: None, look=False)
    assert cause in made.failed["E"]
    assert [row.slide_id for row in made.rows] == ["F"]
