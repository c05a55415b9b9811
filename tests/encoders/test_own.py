"""Encoders of somebody's own: code and a recipe beside it, or a package that registers both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import EncoderError, NH2STError, RecipeError, UsageError
from nh2st_pipe.recipes.encoder import load_encoder_recipe
from nh2st_pipe.store.read import open_store
from tests.conftest import Study

CODE = """import torch

class Means(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, images):
        return self.gain * torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

def build(recipe, weights):
    return Means(1.0 if weights is None else torch.load(weights, weights_only=True)["gain"])
"""
RECIPE = "name: means\ndim: 12\ninput_px: 32\nmpp: 0.5\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "means.py").write_text(CODE)
    (folder / "means.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def package(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is installed, with an encoder."""
    about = own / "their_encoder-0.3.dist-info"
    about.mkdir()
    text = (
        CODE
        + '\ndef recipe():\n    return {"name": "theirs", "dim": 12, "input_px": 32, "builder": "their_code:build"}\n'
    )
    (own / "their_code.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-encoder\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text("[nh2st_pipe.encoders]\ntheirs = their_code:recipe\n")
    monkeypatch.syspath_prepend(own)
    return about


def test_code_with_its_recipe_beside_it_encodes(own: Path, study: Study) -> None:
    summary = study.embed(encoder=f"{own}/means.py:build", tile_px=32)
    assert summary.failed == {}
    store = open_store(study.folder / "store.zarr")
    assert store.contract.identity["builder"] == "means.py:build"
    assert str(own) not in (study.folder / "store.zarr/zarr.json").read_text()  # no folder of any machine
    assert store.read("s0").views.shape[1:] == (1, 12)
    assert study.embed(encoder=f"{own}/means.py:build", tile_px=None).kept == ["s0", "s1", "s2"]
    two = study.embed(
        encoder=f"{own}/means.py:build", tile_px=32, device="cpu,cpu", store=study.folder / "two.zarr"
    )  # in processes of their own
    assert two.failed == {}
    assert np.array_equal(open_store(study.folder / "two.zarr").read("s1").views, store.read("s1").views)


def test_a_store_runs_no_code_by_itself(own: Path, study: Study) -> None:
    study.embed(encoder=f"{own}/means.py:build", tile_px=32)
    lines = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join([*lines, lines[1].replace("s0,", "new,", 1)]) + "\n")
    with pytest.raises(UsageError, match="no code runs because a store or a model names it"):
        study.embed(encoder=None, tile_px=None)
    (own / "means.py").write_text(CODE + "\n# another\n")
    with pytest.raises(NH2STError, match="SHA-256"):
        study.embed(encoder=f"{own}/means.py:build", tile_px=None)


def test_weights_are_handed_to_it(own: Path, study: Study) -> None:
    import torch

    torch.save({"gain": 2.0}, own / "w.pt")
    study.embed(encoder=f"{own}/means.py:build", tile_px=32)
    study.embed(encoder=f"{own}/means.py:build", tile_px=32, weights=own / "w.pt", store=study.folder / "two.zarr")
    one, two = (open_store(study.folder / name) for name in ("store.zarr", "two.zarr"))
    assert np.allclose(2 * one.read("s0").views.astype(float), two.read("s0").views, rtol=2e-3)
    assert one.contract.weights.sha256 != two.contract.weights.sha256
    assert two.contract.weights.source == "w.pt"


def test_a_package_registers_an_encoder(package: Path, study: Study) -> None:
    assert study.embed(encoder="theirs", tile_px=32).failed == {}
    listed = CliRunner().invoke(app, ["encoders"]).output
    assert "theirs" in listed
    checked = CliRunner().invoke(app, ["encoders", "theirs", "--check"])
    assert checked.exit_code == 0, checked.output
    assert "the code their_code:build, SHA-256" in checked.output
    (package / "entry_points.txt").write_text("[nh2st_pipe.encoders]\nuni = their_code:recipe\n")
    with pytest.raises(RecipeError, match=r"their-encoder 0\.3 registers 'uni' .*, which is the name of one of ours"):
        load_encoder_recipe("theirs")
    (package / "entry_points.txt").write_text("[nh2st_pipe.encoders]\nother = their_code:recipe\n")
    with pytest.raises(RecipeError, match="registers encoder 'other', and its recipe is called 'theirs'"):
        load_encoder_recipe("other")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def build(recipe, weights):\n    return 3\n", r"means\.py:build returned int; a torch module is expected"),
        ("def build(recipe):\n    pass\n", r"means\.py:build failed"),
        ("build = 3\n", r"means\.py:build is no function"),
        ("import nothing_so_called\n", "cannot be loaded: ModuleNotFoundError"),
        ("def other():\n    pass\n", "there is no build in it"),
        (CODE.replace("adaptive_avg_pool2d(images, 2)", "adaptive_avg_pool2d(images, 1)"), "its recipe says 12"),
    ],
)
def test_code_that_is_no_encoder_is_named(own: Path, study: Study, code: str, words: str) -> None:
    (own / "means.py").write_text(code)
    with pytest.raises(EncoderError, match=words):
        study.embed(encoder=f"{own}/means.py:build", tile_px=32)


def test_what_is_missing_is_named(own: Path) -> None:
    (own / "means.yaml").unlink()
    with pytest.raises(RecipeError, match=r"there is no file .*means\.yaml: an encoder of your own is means\.py and"):
        load_encoder_recipe(f"{own}/means.py:build")
    with pytest.raises(RecipeError, match=r"there is no file .*nothing\.py"):
        load_encoder_recipe(f"{own}/nothing.py:build")
    (own / "bad.yaml").write_text(RECIPE + "kind: python\n")
    with pytest.raises(RecipeError, match="builder: a recipe of the kind python names it"):
        load_encoder_recipe(own / "bad.yaml")
    with pytest.raises(RecipeError, match="no encoder is called 'unii'"):
        load_encoder_recipe("unii")
