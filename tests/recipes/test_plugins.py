"""Heads of others: in a file, in a module, in a package that registers them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nh2st_pipe
from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import NH2STError, RecipeError, RunError
from nh2st_pipe.recipes.train import TrainRecipe, load_train_recipe
from tests.conftest import Study

TEMPLATE = Path(__file__).parents[2] / "docs/templates/head.py"
FEW = ["targets.genes=6", "baselines=[mean]", "head.alpha=0.02"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is installed: a module, and what pip keeps of it."""
    site = tmp_path / "site"
    about = site / "their_heads-1.2.dist-info"
    about.mkdir(parents=True)
    shutil.copy(TEMPLATE, site / "their_heads.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-heads\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[nh2st_pipe.heads]\nelastic = their_heads:Elastic\n")
    monkeypatch.syspath_prepend(site)
    return about


def test_the_template_is_a_head(study: Study, tmp_path: Path) -> None:
    study.stored()
    head = f"{TEMPLATE}:Elastic"
    nh2st_pipe.train(study.folder / "store.zarr", recipe=head, settings=FEW, out=tmp_path / "run", jobs=2)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["head"] == "Elastic"
    assert metrics["summary"]["n_units"] == 3
    assert metrics["software"]["plug_in"].startswith("head.py, SHA-256 ")
    model: Any = nh2st_pipe.load_model(tmp_path / "run")
    assert (model.kind, model.alpha) == (head, 0.02)
    assert model.about["plug_in"] == metrics["software"]["plug_in"]
    done = nh2st_pipe.predict(tmp_path / "run", embeddings=study.folder / "store.zarr", out=tmp_path / "p")
    assert len(done.files) == 3
    assert len(TEMPLATE.read_text().splitlines()) <= 45


def test_a_package_registers_a_head(package: Path, study: Study, tmp_path: Path) -> None:
    study.stored()
    nh2st_pipe.train(study.folder / "store.zarr", recipe="elastic", settings=FEW, folds="none", out=tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["head"], metrics["software"]["plug_in"]) == ("elastic", "their-heads 1.2")
    listed = CliRunner().invoke(app, ["heads"]).output
    assert "elastic          Elastic net on a spot's own embedding: few of its values for each gene" in listed
    assert "ridge-context" in listed
    (package / "entry_points.txt").write_text("")
    with pytest.raises(
        RunError, match=r"a head of kind 'elastic'.*; it was trained with their-heads 1\.2: install that"
    ):
        nh2st_pipe.load_model(tmp_path / "run")


def test_a_recipe_names_a_head_of_others(package: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nhead: {kind: 'their_heads:Elastic', l1_ratio: 0.1}\n")
    recipe = load_train_recipe(tmp_path / "mine.yaml", ["head.alpha=3"])
    assert recipe.head.model_dump() == {"kind": "their_heads:Elastic", "alpha": 3.0, "l1_ratio": 0.1}
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    chosen = load_train_recipe(tmp_path / "mine.yaml", ["choose.head.alpha=[1,2]"])
    assert [chosen.chosen(choice).head.model_dump()["alpha"] for choice in chosen.choices()] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["head.alpha=-1"], "alpha: input should be greater than 0"),
        (["head.alhpa=1"], r"alhpa: there is no such key; did you mean 'alpha'\?"),
        (["fit.epochs=3"], "fit has no effect on a head of kind elastic"),
    ],
)
def test_its_fields_are_checked_as_ours_are(package: Path, settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_train_recipe("elastic", settings)


_HEAD = """from nh2st_pipe.recipes.train import PlugInHead
from nh2st_pipe.heads.base import HeadModel
class Head(HeadModel):
    recipe = PlugInHead
    def fit(self, train, plan): pass
"""
BROKEN = {
    "import nothing_of_that_name\n": "cannot be loaded: ModuleNotFoundError: No module named 'nothing_of_that_name'",
    "Head = 3\n": "has no `recipe`",
    "class Head:\n    recipe = dict\n": "has no `recipe`",
    "from nh2st_pipe.recipes.train import PlugInHead\nclass Head:\n    recipe = PlugInHead\n": "is no subclass of",
    _HEAD: "lacks build, forward_view",
    f"{_HEAD}    forward_view = 1\n    @classmethod\n    def build(cls, *a): return cls()\n": "take `kind`",
    "Other = 3\n": "there is no Head in it",
}


@pytest.mark.parametrize("code", BROKEN)
def test_code_that_is_no_head_is_named(study: Study, tmp_path: Path, code: str) -> None:
    study.stored()
    (tmp_path / "my.py").write_text(code)
    with pytest.raises(NH2STError, match=BROKEN[code]):
        nh2st_pipe.train(
            study.folder / "store.zarr", recipe=f"{tmp_path}/my.py:Head", out=tmp_path / "run", folds="none"
        )
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_or_shadows_ours_is_named(package: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file nothing\.py"):
        load_train_recipe("nothing.py:Head")
    with pytest.raises(RecipeError, match=r"no\.such\.module:Head cannot be loaded"):
        load_train_recipe("no.such.module:Head")
    (tmp_path / "mine.yaml").write_text("name: mine\nhead: {kind: elastik}\n")
    with pytest.raises(RecipeError, match=r"no head is called 'elastik'; did you mean 'elastic'\?"):
        load_train_recipe(tmp_path / "mine.yaml")
    (package / "entry_points.txt").write_text("[nh2st_pipe.heads]\nridge = their_heads:Elastic\n")
    with pytest.raises(RecipeError, match=r"their-heads 1\.2 registers 'ridge' .*, which is the name of one of ours"):
        load_train_recipe("elastic")


def test_a_model_from_a_hub_names_registered_code_alone(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.stored()
    nh2st_pipe.train(
        study.folder / "store.zarr", recipe=f"{TEMPLATE}:Elastic", settings=FEW, folds="none", out=tmp_path / "run"
    )
    monkeypatch.setattr("nh2st_pipe.runs.model._from_hub", lambda text: tmp_path / "run/model")
    with pytest.raises(RunError, match="from a hub, only heads that a package registers are loaded"):
        nh2st_pipe.load_model("hf-hub:them/head")
    with pytest.raises(RunError, match="from a hub, only heads that a package registers are loaded"):
        nh2st_pipe.predict("hf-hub:them/head", embeddings=study.folder / "store.zarr", out=tmp_path / "p")
    assert nh2st_pipe.load_model(tmp_path / "run").kind == f"{TEMPLATE}:Elastic"
