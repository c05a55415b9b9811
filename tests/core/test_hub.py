from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nh2st_pipe.core.errors import HubError
from nh2st_pipe.core.hub import fetch, fetch_folder
from tests.hub import COMMIT, Hub, standing_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["lab/tiny"] = {"model.safetensors": b"weights", "config.json": b"{}", "other.bin": b"no"}
        hub.repos["lab/locked"] = {"model.safetensors": b"weights"}
        hub.gated.add("lab/locked")
        yield hub


def test_a_file_is_fetched_once_and_then_found_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch("lab/tiny", "model.safetensors", "v1")
    assert path.read_bytes() == b"weights"
    monkeypatch.setattr("nh2st_pipe.core.hub.reachable", lambda: False)
    assert fetch("lab/tiny", "model.safetensors", "v1") == path


def test_of_a_repository_the_files_asked_for_are_fetched(hub: Hub) -> None:
    folder = fetch_folder("lab/tiny", ["config.json", "model.safetensors"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder.name == COMMIT


@pytest.mark.parametrize(
    ("repo", "file", "revision", "message"),
    [
        ("lab/locked", "model.safetensors", None, "lab/locked is gated, and no token was given: agree to its terms"),
        ("lab/none", "model.safetensors", None, "the hub knows no lab/none, or it is private"),
        ("lab/tiny", "model.safetensors", "v9", "lab/tiny has no revision 'v9'"),
        ("lab/tiny", "w.bin", None, "lab/tiny holds no file w.bin"),
        ("lab/tiny/more", "w.bin", None, "is no name of a repository"),
    ],
)
def test_each_way_in_which_a_file_cannot_be_had_is_told_apart(
    hub: Hub, repo: str, file: str, revision: str | None, message: str
) -> None:
    with pytest.raises(HubError, match=message):
        fetch(repo, file, revision)


def test_a_hub_that_is_out_of_reach_is_asked_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    with pytest.raises(HubError, match="not in the local cache, and the hub cannot be reached"):
        fetch("lab/tiny", "model.safetensors")
    assert time.monotonic() - began < 5  # the client alone tries for half a minute
    assert "Retrying" not in capfd.readouterr().err
