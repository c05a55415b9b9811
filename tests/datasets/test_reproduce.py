"""From a dataset's files to a table, every step kept; and the datasets that are described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nh2st_pipe.core.errors import RecipeError, RunError, TrainError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.datasets import LAYOUTS
from nh2st_pipe.datasets.generated import hest
from nh2st_pipe.datasets.reproduce import reproduce
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.dataset import DatasetRecipe, Published, load_dataset_recipe


def small(**changes: object) -> DatasetRecipe:
    values = {
        "name": "small",
        "title": "t",
        "get": "g",
        "paper": "p",
        "importer": "hest",
        "where": {"id": "INT*"},
        "folds": "slide:2",
        "honest_folds": "patient",
        "seed": 42,
        "genes": 6,
        "tile_px": 40,
        "published": (Published(method="NH2ST", figure="mse", value=0.22, source="the paper"),),
    }
    return DatasetRecipe.model_validate({**values, **changes})


@pytest.mark.timeout(240)
def test_a_dataset_goes_from_its_files_to_a_table_and_every_step_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.training import run as runs

    hest(tmp_path / "data", ["INT1", "INT2", "INT3", "ZEN40"])
    (tmp_path / "data/wsis/INT2.tif").write_bytes(b"junk")
    (tmp_path / "data/st/INT4.h5ad").write_bytes(b"junk")
    monkeypatch.setattr("nh2st_pipe.datasets.reproduce._HEADS", ("nh2st", "ridge"))
    out = tmp_path / "out"
    trained = list[Path]()
    plain = runs.train

    def training(*arguments: object, **options: object) -> object:
        if len(trained) == cut:
            raise KeyboardInterrupt
        trained.append(options["out"])  # type: ignore[arg-type]
        changes = [*options.pop("settings"), "baselines=[]"]  # type: ignore[misc]
        changes += ["fit.epochs=1"] if "nh2st" in str(options["out"]) else []
        return plain(*arguments, **options, settings=changes)  # type: ignore[arg-type]

    monkeypatch.setattr("nh2st_pipe.datasets.reproduce.train", training)
    monkeypatch.setattr("nh2st_pipe.datasets.reproduce._other", lambda there, wanted: [])
    cut = 2
    with pytest.raises(KeyboardInterrupt):
        reproduce(small(), tmp_path / "data", out=out, encoder="fake")
    cut = 99
    done = reproduce(small(), tmp_path / "data", out=out, encoder="fake")
    assert [path.name for path in trained] == ["nh2st-paper", "nh2st-nested", "ridge-paper", "ridge-nested"]
    first, *rows = done.rows
    assert (first["head"], first["judged"], first["mse"]) == ("NH2ST, the paper", "as published", 0.22)
    assert [(row["head"], row["judged"]) for row in rows] == [
        ("nh2st", "paper, folds by slide:2"),
        ("nh2st", "nested, folds by patient"),
        ("ridge", "paper, folds by slide:2"),
        ("ridge", "nested, folds by patient"),
    ]
    assert all(row["mse"] > 0 for row in rows)
    assert set(done.failed) == {"INT2", "INT4"}
    assert (out / "spots.png").is_file()
    again = reproduce(small(), tmp_path / "data", out=out, encoder="fake")
    assert again.rows == done.rows
    assert again.failed == done.failed  # what the import left out is said every time
    assert any("to import again what was left out" in note for note in again.notes)
    assert len(trained) == 4


def test_runs_that_were_made_in_another_way_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hest(tmp_path / "data", ["INT1", "INT2", "INT3"])
    dataset = small(honest_folds=None, folds="slide")
    monkeypatch.setattr("nh2st_pipe.datasets.reproduce._HEADS", ("ridge",))
    same: dict[str, Any] = {"out": tmp_path / "out", "encoder": "fake", "views": 1, "settings": ("baselines=[mean]",)}
    done = reproduce(dataset, tmp_path / "data", **same)
    assert [row["head"] for row in done.rows][-1] == "mean"
    with pytest.raises(RunError, match=r"ridge-paper was made with other folds; give another --out"):
        reproduce(dataset, tmp_path / "data", **same, folds="slide:2")


def test_every_dataset_that_is_described_can_be_imported() -> None:
    known = [load_dataset_recipe(name) for name in files.names("manifests")]
    assert {dataset.name for dataset in known} >= {"her2st", "stnet", "skin", "mouse", "int", "zen"}
    assert all(dataset.importer in LAYOUTS for dataset in known)
    assert {(d.name, p.value) for d in known for p in d.published} == {
        ("stnet", 0.161),
        ("skin", 0.208),
        ("mouse", 0.039),
        ("pcw", 0.029),
        ("int", 0.22),
        ("zen", 0.108),
    }
    with pytest.raises(RecipeError, match="no dataset is called 'stnat'; did you mean 'stnet'"):
        load_dataset_recipe("stnat")


def test_a_single_patient_is_told_before_anything_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hest(tmp_path / "data", ["INT1", "INT2"])
    for file in (tmp_path / "data/metadata").glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "patient": "P1"}))
    said = list[str]()

    class Heard(Progress):
        def say(self, words: str) -> None:
            said.append(words)

    class EmbeddingError(Exception):
        pass

    def embed(*arguments: object, **options: object) -> None:
        raise EmbeddingError

    monkeypatch.setattr("nh2st_pipe.datasets.reproduce.embed", embed)
    of = small(folds="patient", honest_folds=None)
    with pytest.raises(EmbeddingError):
        reproduce(of, tmp_path / "data", out=tmp_path / "out", encoder="fake", progress=Heard())
    assert "all 2 slides are of one patient: folds leave out slides" in said[-1]
    with pytest.raises(TrainError, match="folds by patient need at least two patients"):
        reproduce(of, tmp_path / "data", out=tmp_path / "out", encoder="fake", folds="patient")
