"""Which of our encoders another tool means by a name, and in which arithmetic it runs it."""

from __future__ import annotations

import re
from functools import cache

from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision, load_encoder_recipe

__all__ = ["called", "recipe_for", "same_encoder", "usual_precision"]

_ALIASES = {
    "univ1": "uni",
    "univ2": "uni2-h",
    "uni2": "uni2-h",
    "conchv1": "conch",
    "conch15": "conch-v1.5",
    "conchv15": "conch-v1.5",
    "hoptimus0": "h-optimus-0",
    "hoptimus1": "h-optimus-1",
    "gigapath": "prov-gigapath",
    "midnight": "midnight-12k",
    "phikonv1": "phikon",
    "virchowfull": "virchow",
    "virchow2full": "virchow2",
    "hibou": "hibou-l",
    "kaikovitl14": "kaiko-vitl14",
    "resnet50imagenet": "resnet50",
}
"""Other tools' names, without what is neither letter nor digit, to ours."""

_POOLINGS = (("virchow2", "virchow2-cls"), ("h0-mini", "h0-mini-cls-mean"), ("uni", "uni-cls-mean"))
"""Encoders of which we have more than one pooling: the number of values tells which."""

_OTHER_NAMES = {"resnet50trunc"}
"""What has the width of one of ours and is none of them."""

_IN_FLOAT32 = (
    *("conch", "phikon", "phikon-v2", "ctranspath", "hibou-l", "lunit-vits8", "resnet50"),
    *("kaiko-vits8", "kaiko-vits16", "kaiko-vitb8", "kaiko-vitb16", "kaiko-vitl14"),
)
"""What TRIDENT runs in float32."""

_USUAL: dict[str, Precision] = {"CLAM": "float32", "GigaPath": "float16", "AtlasPatch": "float16", "STAMP": "float16"}


@cache
def _ours() -> dict[str, str]:
    return {_plain(name): name for name in files.names("stages/embed")} | _ALIASES


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def called(name: str) -> str:
    """Return our name of an encoder that another tool calls `name`; that itself where it is none of ours."""
    plain = _plain(name)
    return name if plain in _OTHER_NAMES else _ours().get(plain, name)


def same_encoder(one: str, other: str) -> bool:
    """Whether two names are of the same encoder, whatever its pooling."""
    first, second = called(one), called(other)
    return first == second or any({first, second} <= set(each) for each in _POOLINGS)


def recipe_for(name: str, dim: int) -> str | EncoderRecipe:
    """Return the recipe of what a tool calls `name` and gives `dim` values a tile: the pooling that has as many; the
    name itself where it is none of ours.
    """
    ours = called(name)
    if ours not in files.names("stages/embed"):
        return name
    for each in next((every for every in _POOLINGS if ours in every), (ours,)):
        recipe = load_encoder_recipe(each)
        if recipe.dim == dim:
            return recipe
    return load_encoder_recipe(ours)


def usual_precision(tool: str, recipe: EncoderRecipe, stored: str) -> Precision:
    """Return the arithmetic in which a tool runs an encoder where nobody asks for another; it writes it nowhere."""
    if tool in _USUAL:
        return _USUAL[tool]
    if tool == "TRIDENT" and recipe.kind != "imported":
        if recipe.name in _IN_FLOAT32:
            return "float32"
        return "bfloat16" if recipe.name == "uni2-h" else "float16"
    return "float16" if stored == "float16" else "float32"
