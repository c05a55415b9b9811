"""Encoders that timm alone does not build: of transformers, with code of their own, of packages, with foreign names."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nh2st_pipe.core.errors import EncoderError, RecipeError, StoreError, UsageError
from nh2st_pipe.encoders.check import check_encoder
from nh2st_pipe.encoders.load import build_backbone, load_encoder
from nh2st_pipe.encoders.transformers import _CLASSES
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.recipes.encoder import _KNOWN_TO_TRANSFORMERS, EncoderRecipe, load_encoder_recipe
from nh2st_pipe.recipes.values import validate
from tests.conftest import Study
from tests.encoders.test_encoders import tiles

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def recipe(**changes: Any) -> EncoderRecipe:
    values = {"name": "small", "kind": "transformers", "architecture": "dinov2", "arguments": SIZES, "dim": 24}
    return validate(EncoderRecipe, {**values, "input_px": 32, "pooling": "cls", **changes}, "small.yaml")


ARCHITECTURES = [
    ("vit", {"intermediate_size": 48}, 1),
    ("dinov2", {}, 1),
    ("dinov2", {"use_swiglu_ffn": True}, 1),
    ("dinov2_with_registers", {"num_register_tokens": 3}, 4),
]


def saved(of: EncoderRecipe, path: Path) -> tuple[Any, Path]:
    """A model of transformers with random weights, and its file with the names that the hub's files have."""
    torch.manual_seed(0)
    model: Any = build_backbone(of).model
    model.save_pretrained(path)
    return model.eval(), path / "model.safetensors"


@pytest.mark.parametrize(("architecture", "more", "prefix"), ARCHITECTURES)
def test_embeddings_are_those_of_transformers(
    tmp_path: Path, architecture: str, more: dict[str, Any], prefix: int
) -> None:
    of = recipe(architecture=architecture, arguments={**SIZES, **more})
    model, path = saved(of, tmp_path)
    names = list(load_file(path))
    assert any("attention.attention.query" in name for name in names)  # as older versions named them
    batch = tiles(3, 32)
    x = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(of.mean).view(3, 1, 1)) / torch.tensor(of.std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model(pixel_values=x).last_hidden_state
    for pooling, expected in (
        ("cls", tokens[:, 0]),
        ("mean", tokens[:, prefix:].mean(1)),
        ("cls+mean", torch.cat((tokens[:, 0], tokens[:, prefix:].mean(1)), 1)),
    ):
        arguments = {**SIZES, **more}
        each = recipe(architecture=architecture, arguments=arguments, pooling=pooling, dim=expected.shape[1])
        assert np.allclose(load_encoder(each, path).encode(batch)[:, 0], expected, atol=4e-3), pooling


def test_weights_of_another_encoder_are_named(tmp_path: Path) -> None:
    _, path = saved(recipe(), tmp_path / "a")
    state = load_file(path)
    first = next(name for name in state if name.endswith("query.weight"))
    save_file({name: tensor for name, tensor in state.items() if name != first}, tmp_path / "less.safetensors")
    with pytest.raises(EncoderError, match=r"does not fit encoder small \(dinov2\); tensors missing: .*weight"):
        load_encoder(recipe(), tmp_path / "less.safetensors")
    save_file({**state, "head.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(EncoderError, match=r"tensors unknown: head\.weight"):
        load_encoder(recipe(), tmp_path / "more.safetensors")
    assert load_encoder(recipe(drop=["head."]), tmp_path / "more.safetensors").encode(tiles(1, 32)).shape == (1, 1, 24)
    without = {name: tensor for name, tensor in state.items() if "mask_token" not in name}
    save_file(without, tmp_path / "unmasked.safetensors")
    load_encoder(recipe(), tmp_path / "unmasked.safetensors")
    wider = recipe(arguments={**SIZES, "hidden_size": 48}, dim=48)
    with pytest.raises(EncoderError, match="does not fit encoder small"):
        load_encoder(wider, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "bert"}, "architecture: of transformers it is one of vit, dinov2"),
        ({"arguments": {"_name_or_path": "lab/x"}}, "'_name_or_path' is no argument that a recipe may give"),
        ({"arguments": {"img_size": 32}}, "'img_size' is no argument .*did you mean 'image_size'"),
        ({"kind": "remote"}, "repo: a recipe of the kind remote names the repository"),
        ({"kind": "package"}, "package: a recipe of the kind package names it"),
        ({"kind": "package", "package": "os"}, "package"),
    ],
)
def test_a_recipe_names_only_what_is_known(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**({"arguments": {}} if "kind" in changes else {}), **changes)


def test_what_a_recipe_may_name_is_what_can_be_built() -> None:
    assert set(_KNOWN_TO_TRANSFORMERS) == set(_CLASSES)


def test_the_library_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EncoderError, match="encoder small needs the library transformers: pip install"):
        build_backbone(recipe())


CODE = """
import pathlib
import torch
from transformers import PretrainedConfig, PreTrainedModel

pathlib.Path({mark!r}).touch()


class OwnConfig(PretrainedConfig):
    model_type = "own"


class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.zeros(3))
        self.post_init()

    def forward(self, pixel_values):
        out = pixel_values.mean((2, 3)) * self.scale
        return type("Out", (), dict(pooler_output=out, last_hidden_state=out[:, None]))

    def encode_image(self, images):
        return self.forward(images).pooler_output + 1

    def return_conch(self):
        part = torch.nn.Module()
        part.forward = lambda images: images.mean((2, 3)) - 1
        return part, None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's folder with code in it, which leaves a mark when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_code.py").write_text(CODE.format(mark=str(tmp_path / "was-run")))
    (folder / "config.json").write_text(
        '{"model_type": "own", "architectures": ["Own"], '
        '"auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.Own"}}'
    )
    save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, folder / "model.safetensors", {"format": "pt"})
    return folder


def remote(**changes: Any) -> EncoderRecipe:
    values = {"kind": "remote", "architecture": "", "arguments": {}, "repo": "lab/own", "pooling": "model", "dim": 3}
    return recipe(**{**values, "mean": (0, 0, 0), "std": (1, 1, 1), **changes})


def test_code_of_a_repository_is_not_run_unless_that_is_allowed(own: Path, tmp_path: Path, study: Study) -> None:
    weights = own / "model.safetensors"
    for refused in (
        lambda: load_encoder(remote(), weights),
        lambda: find_weights(remote(), weights),
        lambda: find_weights(remote(), None),
        lambda: study.embed(encoder=remote(), weights=weights),
    ):
        with pytest.raises(UsageError, match=r"runs the code in its repository lab/own: read it .*--trust-remote-code"):
            refused()
    architecture, found = check_encoder(remote(), weights)
    assert architecture.good
    assert not found.good
    assert "--trust-remote-code" in found.words
    assert not (tmp_path / "was-run").exists()
    assert not (study.folder / "store.zarr").exists()


def test_code_is_fetched_of_a_commit_alone_and_is_a_part_of_the_identity(
    own: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[Any]()

    def fetch_folder(repo: str, patterns: list[str], revision: str | None) -> Path:
        fetched.append(revision)
        return own

    monkeypatch.setattr("nh2st_pipe.core.hub.fetch_folder", fetch_folder)
    for revision in (None, "main", "v1.0", "a" * 39, "A" * 40):
        with pytest.raises(UsageError, match=r"may be another tomorrow: read it at .*lab/own/commits/main.*@<commit>"):
            find_weights(remote(revision=revision), None, trust_remote_code=True)
    assert fetched == []
    one, two = "a" * 40, "b" * 40
    first = study.embed(encoder=remote(revision=one), trust_remote_code=True)
    assert (first.failed, fetched) == ({}, [one])
    with pytest.raises(StoreError, match=f"with revision '{one}', not '{two}'"):
        study.embed(encoder=remote(revision=two), trust_remote_code=True)
    (own / "own_code.py").write_text((own / "own_code.py").read_text() + "# changed\n")
    with pytest.raises(StoreError, match="weights with SHA-256"):  # of a folder that says no commit, its code says it
        study.embed(encoder=remote(revision=one), weights=own / "model.safetensors", trust_remote_code=True)
    assert load_encoder_recipe(f"conch-v1.5@{one}").revision == one
    assert load_encoder_recipe("conch-v1.5").revision is None


def test_code_of_a_repository_is_run_where_it_is_allowed(own: Path, tmp_path: Path, study: Study) -> None:
    weights = own / "model.safetensors"
    batch = tiles(2, 32)
    means = batch.mean((1, 2)) / 255
    for method, expected in (("forward", means * [1, 2, 3]), ("encode_image", means * [1, 2, 3] + 1)):
        encoder = load_encoder(remote(method=method), weights, trust_remote_code=True)
        assert np.allclose(encoder.encode(batch)[:, 0], expected, atol=2e-3), method
    conch = load_encoder(remote(method="return_conch"), weights, trust_remote_code=True)
    assert np.allclose(conch.encode(batch)[:, 0], means - 1, atol=2e-3)
    assert (tmp_path / "was-run").exists()
    assert all(each.good for each in check_encoder(remote(), weights, trust_remote_code=True))
    assert study.embed(encoder=remote(), weights=weights, trust_remote_code=True).done == ["s0", "s1", "s2"]
    (own / "own_code.py").write_text((own / "own_code.py").read_text().replace("pooler_output=out", "pooled=out"))
    with pytest.raises(EncoderError, match="returned NoneType where a tensor is expected"):
        load_encoder(remote(), weights, trust_remote_code=True).encode(batch)
    (own / "own_code.py").write_text((own / "own_code.py").read_text().replace("pooled=out", "pooler_output=out"))
    wrong = check_encoder(remote(dim=4), weights, trust_remote_code=True)[1]
    assert "returned (3,) values per tile and its recipe says 4" in wrong.words
    (own / "own_code.py").write_text("raise ValueError('not on this machine')")
    with pytest.raises(EncoderError, match="the code of lab/own failed: ValueError: not on this machine"):
        load_encoder(remote(), weights, trust_remote_code=True)
    (own / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"has no config\.json beside it; fetch lab/own whole"):
        load_encoder(remote(), weights, trust_remote_code=True)


class Asked(torch.nn.Module):
    """Stands in for a package's model, and keeps how it was asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.options = name, dict[str, Any]()

    def encode_image(self, images: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options = options
        return images.mean((2, 3))

    def forward(self, image: torch.Tensor, **options: Any) -> Any:
        self.options = options
        return (image.mean((2, 3)), None) if self.name == "musk" else image.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "module", "options"),
    [
        ("conch", "conch.open_clip_custom", {"proj_contrast": False, "normalize": False}),
        ("musk", "musk.utils", {"with_head": False, "out_norm": False, "ms_aug": False, "return_global": True}),
        ("genbio_pathfm", "genbio_pathfm.model", {}),
    ],
)
def test_packages_are_asked_for_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, options: dict[str, Any]
) -> None:
    of = recipe(kind="package", architecture="", arguments={}, package=name, url="a page", pooling="model", dim=3)
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"weights")
    with pytest.raises(EncoderError, match=f"needs its authors' package {name}: a page says how to install it"):
        load_encoder(of, weights)
    assert f"package {name}: a page says" in check_encoder(of, weights)[0].words
    model, loaded = Asked(name), list[str]()

    def keep(path: str) -> Asked:
        loaded.append(path)
        return model

    parts: dict[str, Any] = {
        "create_model_from_pretrained": lambda architecture, path: (model, keep(path)),
        "load_model_and_may_interpolate": lambda path, *_: keep(path),
        "GenBio_PathFM_Inference": lambda path, device: keep(path),
    }
    stand_in: Any = types.ModuleType(module)
    vars(stand_in).update(parts)
    monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setitem(sys.modules, "musk.modeling", types.ModuleType("musk.modeling"))
    if name == "musk":
        monkeypatch.setattr("timm.create_model", lambda architecture: model)
    got = load_encoder(of, weights).encode(tiles(2, 32))
    assert got.shape == (2, 1, 3)
    assert loaded == [str(weights)]
    assert model.options == options
    vars(stand_in).clear()
    with pytest.raises(EncoderError, match=f"the package {name} failed: AttributeError"):
        load_encoder(of, weights)


def test_names_of_dinov2s_own_code_are_converted(tmp_path: Path) -> None:
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
    of = validate(
        EncoderRecipe,
        {
            "name": "own-names",
            "architecture": "vit_giant_patch14_reg4_dinov2",
            "arguments": sizes,
            "layout": "original",
            "dim": 24,
            "input_px": 28,
            "pooling": "cls",
        },
        "own-names.yaml",
    )
    torch.manual_seed(0)
    model: Any = build_backbone(of).eval()
    state = dict(model.state_dict())
    theirs = {"mask_token": torch.zeros(1, 24), "register_tokens": state.pop("reg_token")}
    cls = state.pop("cls_token")
    theirs["cls_token"] = cls - 0.5
    theirs["pos_embed"] = torch.cat((torch.full((1, 1, 24), 0.5), state.pop("pos_embed")), 1)
    for name, tensor in state.items():
        theirs[name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = tensor
    torch.save(theirs, tmp_path / "w.pt")
    assert any("w12" in name for name in theirs)
    batch = tiles(2, 28)
    x = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(of.mean).view(3, 1, 1)) / torch.tensor(of.std).view(3, 1, 1)
    with torch.no_grad():
        expected = model.forward_features(x)[:, 0]
    assert np.allclose(load_encoder(of, tmp_path / "w.pt").encode(batch)[:, 0], expected, atol=4e-3)


def test_names_of_ctranspaths_file_are_converted(tmp_path: Path) -> None:
    of = load_encoder_recipe("ctranspath")
    torch.manual_seed(0)
    model: Any = build_backbone(of).eval()
    theirs = {}
    for name, tensor in model.state_dict().items():
        stage, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("downsample"):
            name = f"layers.{int(stage) - 1}.{rest}"  # at the end of the stage before
        theirs[name] = tensor
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    theirs["head.weight"] = torch.zeros(10, 768)
    torch.save({"model": theirs}, tmp_path / "ctranspath.pth")
    batch = tiles(1, 224)
    x = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(of.mean).view(3, 1, 1)) / torch.tensor(of.std).view(3, 1, 1)
    with torch.no_grad():
        expected = model(x)
    got = load_encoder(of, tmp_path / "ctranspath.pth").encode(batch)
    assert got.shape == (1, 1, 768)
    assert np.allclose(got[:, 0], expected, atol=4e-3)
