from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nh2st_pipe.core.devices import pick_device
from nh2st_pipe.core.errors import EncoderError, RecipeError, UsageError
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.encoders.load import build_backbone, load_encoder
from nh2st_pipe.encoders.views import dihedral
from nh2st_pipe.encoders.weights import find_weights, known_weights
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.encoder import EncoderRecipe, load_encoder_recipe
from nh2st_pipe.store.format import Contract, WeightsOf

# What is published of each: width of a token or of the last map, blocks, tokens before the patches, values per tile.
# The last alone where the architecture is in its authors' code.
TABLE: dict[str, tuple[int, int, int, int] | int] = {
    "conch": 512,
    "conch-v1.5": 768,
    "ctranspath": (768, 4, 0, 768),
    "dinov2-vitb14": (768, 12, 1, 768),
    "dinov2-vits14": (384, 12, 1, 384),
    "efficientnet-lite0": (1280, 7, 0, 1280),
    "genbio-pathfm": 4608,
    "gpfm": (1024, 24, 1, 1024),
    "h-optimus-0": (1536, 40, 5, 1536),
    "h-optimus-1": (1536, 40, 5, 1536),
    "h0-mini": (768, 12, 5, 768),
    "h0-mini-cls-mean": (768, 12, 5, 1536),
    "hibou-b": 768,
    "hibou-l": 1024,
    "kaiko-vitb16": (768, 12, 1, 768),
    "kaiko-vitb8": (768, 12, 1, 768),
    "kaiko-vitl14": (1024, 24, 5, 1024),
    "kaiko-vits16": (384, 12, 1, 384),
    "kaiko-vits8": (384, 12, 1, 384),
    "keep": 768,
    "lunit-vits16": (384, 12, 1, 384),
    "lunit-vits8": (384, 12, 1, 384),
    "midnight-12k": (1536, 40, 1, 3072),
    "musk": 1024,
    "openmidnight": (1536, 40, 5, 1536),
    "phikon": (768, 12, 1, 768),
    "phikon-v2": (1024, 24, 1, 1024),
    "prov-gigapath": (1536, 40, 1, 1536),
    "resnet18": (512, 4, 0, 512),
    "resnet18-ssl": (512, 4, 0, 512),
    "resnet18-ssl-map": (512, 4, 0, 25088),
    "resnet50": (2048, 4, 0, 2048),
    "uni": (1024, 24, 1, 1024),
    "uni-cls-mean": (1024, 24, 1, 2048),
    "uni2-h": (1536, 24, 9, 1536),
    "virchow": (1280, 32, 1, 2560),
    "virchow2": (1280, 32, 5, 2560),
    "virchow2-cls": (1280, 32, 5, 1280),
}


def tiny(**changes: Any) -> EncoderRecipe:
    """A ViT small enough to build in a test."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 3}
    values = {
        "name": "tiny",
        "architecture": "vit_tiny_patch16_224",
        "arguments": arguments,
        "dim": 24,
        "input_px": 32,
        "pooling": "cls",
        **changes,
    }
    return EncoderRecipe.model_validate(values)


def weights_of(recipe: EncoderRecipe, path: Path, seed: int = 0, prefix: str = "") -> Path:
    import timm

    torch.manual_seed(seed)
    model: Any = timm.create_model(recipe.architecture, num_classes=0, **recipe.arguments)
    save_file({prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def tiles(n: int, px: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8)


def test_the_eight_views_are_the_symmetries_of_the_square() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    views = [dihedral(image, v) for v in range(8)]
    assert torch.equal(views[0], image)
    assert len({tuple(v.flatten().tolist()) for v in views}) == 8
    assert views[1][0, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]  # a quarter turn counter-clockwise
    assert views[4][0, 0].tolist() == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]  # mirrored left to right
    for a in views:  # closed under composition: a group
        for v in range(8):
            assert any(torch.equal(dihedral(a, v), b) for b in views)


def test_embeddings_are_the_models_own_on_normalised_tiles(tmp_path: Path) -> None:
    import timm

    recipe = tiny(mean=[0.7, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    path = weights_of(recipe, tmp_path / "w.safetensors")
    encoder = load_encoder(recipe, path)
    batch = tiles(5, 32)
    torch.manual_seed(0)
    model: Any = timm.create_model(recipe.architecture, num_classes=0, **recipe.arguments).eval()
    x = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model.forward_features(x)
    got = encoder.encode(batch, 8)
    assert got.shape == (5, 8, 24)
    assert got.dtype == np.float16
    assert np.allclose(got[:, 0], tokens[:, 0], atol=4e-3)
    turned = np.ascontiguousarray(np.rot90(batch, 1, (1, 2)))
    assert np.allclose(encoder.encode(turned)[:, 0], got[:, 1], atol=4e-3)
    for pooling, expected in (
        ("mean", tokens[:, 4:].mean(1)),
        ("cls+mean", torch.cat((tokens[:, 0], tokens[:, 4:].mean(1)), 1)),
    ):
        other = load_encoder(tiny(pooling=pooling, dim=expected.shape[1], mean=recipe.mean, std=recipe.std), path)
        assert np.allclose(other.encode(batch)[:, 0], expected, atol=4e-3), pooling


def test_views_go_through_in_parts_with_the_same_result(tmp_path: Path) -> None:
    encoder = load_encoder(tiny(), weights_of(tiny(), tmp_path / "w.safetensors"))
    batch = tiles(7, 32)
    whole = encoder.encode(batch, 8)
    encoder.images_at_once = 3
    assert np.allclose(encoder.encode(batch, 8), whole, atol=2e-3)


def test_running_out_of_memory_halves_the_batch_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(load_encoder_recipe("fake"), None)
    whole = encoder.encode(tiles(9, 64), 8)
    plain, sizes, held = Encoder._encode, list[int](), list[weakref.ref[torch.Tensor]]()

    def small(self: Encoder, batch: Any, views: Sequence[int]) -> Any:
        assert not any(ref() is not None for ref in held)  # what a failed attempt held is free in the next
        sizes.append(len(batch))
        if len(batch) > most:
            activations = torch.empty(10)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError
        return plain(self, batch, views)

    most = 2
    monkeypatch.setattr(Encoder, "_encode", small)
    assert np.array_equal(encoder.encode(tiles(9, 64), 8), whole)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    sizes.clear()
    assert np.array_equal(encoder.encode(tiles(9, 64), 8), whole)
    assert sizes == [2, 2, 2, 2, 1]
    most = 0
    with pytest.raises(EncoderError, match="cpu runs out of memory with encoder fake and a single tile of 8"):
        encoder.encode(tiles(3, 64), 8)


def test_views_are_made_of_as_many_tiles_as_go_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(load_encoder_recipe("fake"), None)
    seen, turned = list[int](), list[int]()
    pool = encoder._pool

    def pooled(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return pool(images)

    def turning(images: torch.Tensor, view: int) -> torch.Tensor:
        turned.append(len(images))
        return dihedral(images, view)

    monkeypatch.setattr(encoder, "_embed", pooled)
    monkeypatch.setattr("nh2st_pipe.encoders.encoder.dihedral", turning)
    encoder.encode(tiles(5, 64), 8)
    assert seen == [16, 16, 8]  # two tiles of eight views, and so on
    assert set(turned) == {1, 2}


def test_autocast_keeps_the_weights_and_computes_in_half_precision(tmp_path: Path) -> None:
    path = weights_of(tiny(), tmp_path / "w.safetensors")
    seen = set[torch.dtype]()
    encoder = load_encoder(tiny(autocast=True), path, precision="bfloat16")
    assert {tensor.dtype for tensor in encoder.backbone.parameters()} == {torch.float32}
    encoder.backbone.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: seen.add(out.dtype))  # type: ignore[index, union-attr]
    half, whole = encoder.encode(tiles(3, 32)), load_encoder(tiny(), path).encode(tiles(3, 32))
    assert seen == {torch.bfloat16}
    assert np.allclose(half, whole, atol=0.05)
    assert not np.array_equal(half, whole)
    exact = load_encoder(tiny(autocast=True), path)  # there is nothing to cast to in float32
    assert np.array_equal(exact.encode(tiles(3, 32)), whole)


def test_a_compiled_encoder_gives_the_same_for_batches_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights_of(tiny(), tmp_path / "w.safetensors")
    compiled = list[dict[str, Any]]()
    plain = torch.compile

    def compiling(what: Any, **options: Any) -> Any:
        compiled.append(options)
        return plain(what, backend="eager", **options)  # all of it but the C++ compiler, which takes a minute

    monkeypatch.setattr(torch, "compile", compiling)
    encoder, whole = load_encoder(tiny(), path, compiled=True), load_encoder(tiny(), path)
    assert compiled == [{"dynamic": True}]
    for n in (5, 2, 1):
        assert np.allclose(encoder.encode(tiles(n, 32), 8), whole.encode(tiles(n, 32), 8), atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_bring_each_batch_its_own_embeddings(tmp_path: Path) -> None:
    encoder = load_encoder(
        tiny(), weights_of(tiny(), tmp_path / "w.safetensors"), device=torch.device("cuda"), precision="float32"
    )
    whole = load_encoder(tiny(), tmp_path / "w.safetensors")
    batches = [tiles(64, 32) + np.uint8(i) for i in range(12)]
    underway = []
    for batch in batches:
        own = encoder.blank(batch.shape)
        own[:] = batch
        underway.append(encoder.start(own, 8))
    for batch, one in zip(batches, underway, strict=True):
        assert np.allclose(one.result(), whole.encode(batch, 8), atol=4e-3)


def test_prefixes_are_stripped_and_foreign_heads_dropped(tmp_path: Path) -> None:
    recipe = tiny(strip_prefixes=["module.", "backbone."], drop=["head."])
    path = weights_of(recipe, tmp_path / "w.safetensors", prefix="module.backbone.")
    from safetensors.torch import load_file

    save_file({**load_file(path), "head.weight": torch.zeros(3, 24)}, path)
    plain = load_encoder(tiny(), weights_of(tiny(), tmp_path / "p.safetensors"))
    assert np.array_equal(load_encoder(recipe, path).encode(tiles(2, 32)), plain.encode(tiles(2, 32)))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = weights_of(tiny(), tmp_path / "w.safetensors")
    deeper = tiny(arguments={**tiny().arguments, "depth": 3})
    with pytest.raises(EncoderError, match=r"does not fit encoder tiny .*missing: blocks\.2"):
        load_encoder(deeper, path)
    wider = tiny(arguments={**tiny().arguments, "embed_dim": 48}, dim=48)
    with pytest.raises(EncoderError, match=r"of another shape: .*should be"):
        load_encoder(wider, path)
    with pytest.raises(EncoderError, match=r"unknown: blocks\.1"):
        load_encoder(tiny(arguments={**tiny().arguments, "depth": 1}), path)
    with pytest.raises(EncoderError, match="its recipe says 25"):
        load_encoder(tiny(dim=25), path).encode(tiles(1, 32))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'run'}",)

    torch.save({"state_dict": Evil()}, tmp_path / "w.ckpt")
    with pytest.raises(EncoderError, match="code in a pickle is never run"):
        load_encoder(tiny(), tmp_path / "w.ckpt")
    assert not (tmp_path / "run").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    with pytest.raises(EncoderError, match="cannot be read as weights"):
        load_encoder(tiny(), tmp_path / "cut.safetensors")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = weights_of(tiny(), tmp_path / "w.safetensors")
    state = load_file(path)
    state["norm.weight"] = torch.full((24,), 1e6)
    save_file(state, path)
    with pytest.raises(EncoderError, match="not finite in float16"):
        load_encoder(tiny(), path).encode(tiles(1, 32))


@pytest.mark.parametrize("name", sorted(set(files.names("stages/embed")) - {"fake"}))
def test_recipes_build_what_the_table_says(name: str) -> None:
    recipe, of = load_encoder_recipe(name), TABLE[name]
    if isinstance(of, int):
        assert recipe.kind in ("remote", "package")
        assert recipe.dim == of
        with pytest.raises(EncoderError, match="in its authors' code alone"):
            build_backbone(recipe)
        return
    width, depth, prefix, dim = of
    with torch.device("meta"):
        model: Any = build_backbone(recipe).eval()
        out = model.forward_features(torch.empty(1, 3, recipe.input_px, recipe.input_px))
    if recipe.kind == "transformers":
        config = model.model.config
        assert (config.hidden_size, config.num_hidden_layers) == (width, depth)
    else:
        assert model.num_features == width
        parts = [model.blocks] if hasattr(model, "blocks") else [model.layers] if hasattr(model, "layers") else []
        assert len(parts[0] if parts else [model.layer1, model.layer2, model.layer3, model.layer4]) == depth
    tokens = out.ndim == 3 or (out.ndim == 4 and out.shape[1] == out.shape[2])  # Swin has its channels last
    assert out.shape[-1 if tokens else 1] == width
    assert getattr(model, "num_prefix_tokens", 0) == prefix
    assert recipe.dim == dim == {"cls+mean": 2 * width, "flatten": 49 * width}.get(recipe.pooling, width)
    assert recipe.parameters == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.06)


def test_there_is_a_recipe_for_every_encoder_of_the_list() -> None:
    assert set(TABLE) | {"fake"} == set(files.names("stages/embed"))
    assert len(TABLE) >= 30


def test_every_recipe_is_valid_and_called_as_its_file() -> None:
    for name in files.names("stages/embed"):
        assert load_encoder_recipe(name).name == name


def test_recipe_faults_name_the_key_and_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndim: 0\npoling: cls\n")
    with pytest.raises(
        RecipeError, match=r"mine\.yaml: .*dim: .*greater than 0.*poling: .*did you mean 'pooling'"
    ) as error:
        load_encoder_recipe(path)
    assert error.value.exit_status == 2
    with pytest.raises(RecipeError, match="no encoder is called 'efficientnet'; did you mean 'efficientnet-lite0'"):
        load_encoder_recipe("efficientnet")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache, laid out as the hub's client leaves it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_weights_come_from_the_hubs_cache(hub: Path) -> None:
    recipe = tiny(repo="lab/tiny", revision="main")
    snapshot = hub / "models--lab--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    weights_of(recipe, snapshot / "model.safetensors")
    refs = hub / "models--lab--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    found = find_weights(recipe, None)
    assert found.path is not None
    assert found.source == "hf-hub:lab/tiny@main/model.safetensors"
    assert len(found.sha256) == 64
    assert load_encoder(recipe, found.path).encode(tiles(1, 32)).shape == (1, 1, 24)


def test_what_a_store_says_of_its_weights_is_enough_for_that_encoder_alone(tmp_path: Path) -> None:
    recipe, other = tiny(), tiny(mpp=0.25)
    contract = Contract(
        encoder=recipe.model_dump(mode="json"),
        identity=recipe.identity(),
        weights=WeightsOf(sha256="ab" * 32, source="w"),
        precision="float32",
        tile={"size_um": 112.0, "size_level0_px": None},
        views=1,
    )
    found = known_weights(recipe, None, contract)
    assert found is not None
    assert (found.path, found.sha256, found.source) == (None, "ab" * 32, "w")
    for asked in ((recipe, tmp_path / "w.bin", contract), (recipe, None, None), (other, None, contract)):
        assert known_weights(*asked) is None


def test_without_network_or_cache_the_message_says_that(hub: Path) -> None:
    with pytest.raises(EncoderError, match="not in the local cache, and the hub cannot be reached"):
        find_weights(tiny(repo="lab/tiny"), None)


def test_other_reasons_for_missing_weights_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    response = mock.MagicMock(headers={}, status_code=403)
    for kind, message in (
        (errors.GatedRepoError, "is gated, and no token was given: agree to its terms"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.RepositoryNotFoundError, "the hub knows no lab/tiny"),
        (errors.RemoteEntryNotFoundError, r"holds no file model\.safetensors"),
        (errors.HfHubHTTPError, "could not be downloaded: boom"),
    ):

        def fail(*_: object, kind: Any = kind, **__: object) -> None:
            raise kind("boom", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        monkeypatch.setattr("nh2st_pipe.core.hub.reachable", lambda: True)
        with pytest.raises(EncoderError, match=message):
            find_weights(tiny(repo="lab/tiny", revision="v9"), None)
    with pytest.raises(EncoderError, match="on no hub; get them from a page and give their file with --weights"):
        find_weights(tiny(url="a page"), None)
    with pytest.raises(UsageError, match="there is no weight file at"):
        find_weights(tiny(), tmp_path / "gone.bin")
    with pytest.raises(UsageError, match="has no weights; leave --weights out"):
        find_weights(load_encoder_recipe("fake"), tmp_path)


def test_a_device_that_is_not_here() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(EncoderError, match="--device nonsense cannot be used here"):
        pick_device("nonsense")


def test_the_real_lite0_encodes_as_timm_does(lite0_weights: Path) -> None:
    import timm
    from safetensors.torch import load_file

    encoder = load_encoder(load_encoder_recipe("efficientnet-lite0"), lite0_weights)
    batch = tiles(2, 224)
    model: Any = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(lite0_weights))
    model.reset_classifier(0)
    with torch.no_grad():
        expected = model(torch.from_numpy(batch).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.allclose(encoder.encode(batch)[:, 0], expected, atol=5e-3)
