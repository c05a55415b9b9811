"""What a recipe may say, and how its faults are put."""

from __future__ import annotations

from typing import Any

import pytest

from nh2st_pipe.core.errors import EncoderError, RecipeError, UsageError
from nh2st_pipe.encoders.load import load_encoder
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.encoder import EncoderRecipe, load_encoder_recipe
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.recipes.values import validate


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("nh2st", "epochs=3", "epochs: there is no such key; did you mean 'fit.epochs'?"),
        ("nh2st-context", "epochs=3", "epochs: there is no such key; did you mean 'head.network.epochs'?"),
        ("nh2st-context", "genes=[]", "genes: there is no such key; did you mean 'targets.genes'?"),
        ("nh2st-context", "head.network.dropuot=0.1", "did you mean 'head.network.dropout'?"),
        ("nh2st", "head.dropuot=0.1", "did you mean 'head.dropout'?"),
        ("ridge", "zzz=3", "zzz: there is no such key$"),
        ("nh2st-context", "heads=7", "heads: there is no such key"),
        ("nh2st-context", "head=7", r"head: should be a group of keys \(got 7\)"),
        ("nh2st-context", "targets=3", r"targets: should be a group of keys \(got 3\)"),
        ("ridge", "head.alpha=.inf", "head.alpha: .*finite number"),
        ("ridge", "head.alpha=.nan", "head.alpha: "),
        ("ridge", "choose.head.alpha=[.inf]", "head.alpha: .*finite number"),
        ("nh2st-context", "head.gate_from=-.inf", "head.gate_from: .*finite number"),
        ("ridge", "seed=-1", "seed: "),
        ("ridge", "seed=18446744073709551616", "seed: "),
        ("ridge", "targets.genes=[]", "targets: genes names no genes"),
        ("ridge", "name=../../escaped", "name: "),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words(recipe: str, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load_train_recipe(recipe, [setting])
    assert error.value.exit_status == 2
    assert isinstance(error.value, UsageError)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", "hf-hub:owner/name", "architecture: "),
        ("architecture", "local-dir:/home", "architecture: "),
        ("architecture", "../resnet", "architecture: "),
        (
            "arguments",
            {"pretrained_cfg_overlay": {"url": "u"}},
            "'pretrained_cfg_overlay' is no argument",
        ),
        ("arguments", {"checkpoint_path": "w.bin"}, "'checkpoint_path' is no argument"),
        ("arguments", {"pretrained": True}, "'pretrained' is no argument"),
        ("arguments", {"img_sise": 224}, "did you mean 'img_size'"),
    ],
)
def test_an_encoder_recipe_reaches_neither_files_nor_the_network(key: str, value: Any, message: str) -> None:
    values = {"name": "mine", "architecture": "resnet18", "dim": 512, key: value}
    with pytest.raises(RecipeError, match=message):
        validate(EncoderRecipe, values, "mine.yaml")


def test_every_encoder_that_is_shipped_is_within_the_list() -> None:
    for name in files.names("stages/embed"):
        assert load_encoder_recipe(name).name == name


def test_an_architecture_that_timm_does_not_know_is_named() -> None:
    recipe = validate(EncoderRecipe, {"name": "mine", "architecture": "resnet81", "dim": 512}, "mine.yaml")
    with pytest.raises(EncoderError, match=r"knows no architecture 'resnet81' \(encoder mine\); did you mean 'resnet"):
        load_encoder(recipe, None)


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("deepspot", "targets.scale_to", 0),
        ("deepspot", "features.clip", 0),
        ("deepspot", "features.neighbours", 0),
        ("deepspot", "head.width", 0),
        ("deepspot", "head.networks", 0),
        ("deepspot", "head.dropout", -1),
        ("deepspot", "head.output_dropout", -1),
        ("deepspot", "fit.epochs", 0),
        ("deepspot", "fit.patience", 0),
        ("deepspot", "fit.lr", 0),
        ("deepspot", "fit.lr_step", 0),
        ("deepspot", "fit.lr_gamma", 0),
        ("deepspot", "fit.weight_decay", -1),
        ("deepspot", "trust_from", -1),
        ("deepspot", "seed", -1),
        ("hest-ridge", "head.components", 0),
        ("knn", "head.k", 0),
        ("mlp", "head.network.width", 0),
        ("nh2st", "head.width", 0),
        ("nh2st", "head.hidden", 0),
        ("nh2st", "head.decoder_hidden", 0),
        ("nh2st", "head.heads", 0),
        ("nh2st", "head.depth", 0),
        ("nh2st", "head.mlp_ratio", 0),
        ("nh2st", "head.dropout", -1),
        ("nh2st", "head.similar", 0),
        ("nh2st", "head.temperature", 0),
        ("nh2st", "head.off_diagonal", -1),
        ("nh2st", "head.query_weight", -1),
        ("nh2st", "head.neighbour_weight", -1),
        ("nh2st-context", "head.centring", -1),
        ("nh2st-context", "head.kernel.ridge", 0),
        ("nh2st-context", "head.kernel.low_count", -1),
        ("nh2st-context", "head.kernel.rank", 0),
        ("nh2st-context", "head.kernel.stain_directions", -1),
        ("nh2st-context", "head.kernel.exact_up_to", 0),
        ("nh2st-context", "head.kernel.landmarks", 0),
        ("nh2st-context", "head.network.width", 0),
        ("nh2st-context", "head.network.members", 0),
        ("nh2st-context", "head.network.input_dropout", -1),
        ("nh2st-context", "head.network.dropout", -1),
        ("nh2st-context", "head.network.output_scale", 0),
        ("nh2st-context", "head.network.epochs", 0),
        ("nh2st-context", "head.network.batch_size", 0),
        ("nh2st-context", "head.network.lr", 0),
        ("nh2st-context", "head.network.warmup", -1),
        ("nh2st-context", "head.network.weight_decay", -1),
        ("nh2st-context", "head.network.components", 0),
        ("nh2st-context", "head.network.low_count", -1),
        ("nh2st-context", "head.network.stain_directions", -1),
        ("nh2st-context", "head.network.attention.neighbours", 0),
        ("nh2st-context", "head.network.attention.components", 0),
        ("nh2st-context", "head.network.attention.heads", 0),
        ("nh2st-context", "head.network.attention.key", 0),
        ("nh2st-context", "head.network.attention.value", 0),
        ("nh2st-context", "head.network.attention.dropout", -1),
        ("nh2st-context", "head.kernel_share", -1),
        ("nh2st-context", "carry.rank", 0),
        ("nh2st-context", "carry.retrieval.k", 0),
        ("nh2st-context", "carry.retrieval.components", 0),
        ("nh2st-context", "carry.retrieval.most", 0),
        ("ridge", "head.alpha", 0),
    ],
)
def test_a_number_below_what_may_be_is_refused(recipe: str, key: str, value: int) -> None:
    with pytest.raises(RecipeError, match=f"{key.replace('.', chr(92) + '.')}: input should be greater than"):
        load_train_recipe(recipe, [f"{key}={value}"])
