"""Whether an encoder can be had, told in seven worlds by a hub that stands in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nh2st_pipe.encoders.check import check_encoder
from nh2st_pipe.recipes.encoder import EncoderRecipe
from tests.cli.test_commands import call
from tests.encoders.test_encoders import tiny, weights_of
from tests.hub import Hub, standing_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["lab/tiny"] = {"model.safetensors": weights_of(tiny(), tmp_path / "w.safetensors").read_bytes()}
        yield hub


def said(recipe: EncoderRecipe, weights: Path | None = None) -> tuple[bool, str]:
    architecture, found = check_encoder(recipe, weights)
    assert architecture.good
    assert architecture.words.startswith("vit_tiny_patch16_224, 0.0 million weights, 24 values per tile")
    return found.good, found.words


def test_what_can_be_had_is_not_fetched_and_what_is_here_is_read(hub: Hub) -> None:
    recipe = tiny(repo="lab/tiny")
    assert said(recipe) == (True, "model.safetensors of lab/tiny can be fetched (0.00 GB)")
    assert not any(path.endswith("safetensors") and "GET" in path for path in hub.asked)
    from nh2st_pipe.core.hub import fetch

    fetch("lab/tiny", "model.safetensors")
    good, words = said(recipe)
    assert good
    assert "model.safetensors fits (SHA-256 " in words


@pytest.mark.parametrize("world", ["no network", "no token", "no access", "no revision", "no file", "no repository"])
def test_each_way_in_which_it_cannot_be_had_has_its_words(
    hub: Hub, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"repo": "lab/tiny"}
    if world == "no network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        words = "not in the local cache, and the hub cannot be reached"
    elif world in ("no token", "no access"):
        hub.gated.add("lab/tiny")
        if world == "no access":
            monkeypatch.setenv("HF_TOKEN", "hf_mine")
        words = {"no token": "is gated, and no token was given", "no access": "your token has no access"}[world]
    elif world == "no revision":
        changes["revision"], words = "v9", "has no revision 'v9'"
    elif world == "no file":
        changes["file"], words = "w.bin", "holds no file w.bin"
    else:
        changes["repo"], words = "lab/none", "the hub knows no lab/none"
    good, found = said(tiny(**changes))
    assert not good
    assert words in found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><head><title>Log in</title>", "is a web page, not weights"),
        (b"\x00\x01cut short", "cannot be read as weights"),
    ],
)
def test_files_that_are_no_weights_are_told_apart(tmp_path: Path, content: bytes, words: str) -> None:
    for name in ("w.safetensors", "w.bin"):
        (tmp_path / name).write_bytes(content)
        good, found = said(tiny(), tmp_path / name)
        assert not good
        assert words in found


def test_other_weights_than_the_recipe_expects_are_refused(tmp_path: Path) -> None:
    path = weights_of(tiny(), tmp_path / "w.safetensors")
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    assert said(tiny(sha256=own), path)[0]
    good, words = said(tiny(sha256="0" * 64), path)
    assert not good
    assert f"has the SHA-256 {own}, and the recipe of tiny expects 000" in words
    good, words = said(tiny(), weights_of(tiny(arguments={**tiny().arguments, "depth": 3}), path))
    assert not good
    assert "does not fit encoder tiny" in words


def test_a_recipe_with_a_wrong_dimension_is_found_without_weights() -> None:
    architecture, _ = check_encoder(tiny(dim=25, repo=None))
    assert not architecture.good
    assert "gives 24 values per tile, and the recipe of tiny says 25" in architecture.words


def test_the_command_says_it_and_its_status_tells(tmp_path: Path) -> None:
    path, recipe = tmp_path / "tiny.yaml", tiny()
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    weights = weights_of(recipe, tmp_path / "w.safetensors")
    done = call("encoders", path, "--check", "--weights", weights)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("weights: ")
    weights.write_bytes(b"<html>")
    done = call("encoders", path, "--check", "--weights", weights)
    assert done.returncode == 1
    assert "weights: FAULT: " in done.stdout
    assert call("encoders", "--check").returncode == 2
