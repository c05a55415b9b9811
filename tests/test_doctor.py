"""`doctor` in the worlds that it is for: each says what is wrong and what to do, and none ends it."""

from __future__ import annotations

import collections
import errno
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nh2st_pipe import doctor
from nh2st_pipe.doctor import Finding, examine, said_of, worst
from tests.cli.test_commands import call
from tests.hub import Hub, standing_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def found(folder: Path, **options: Any) -> dict[str, Finding]:
    options = {"hub": False, "self_test": False, **options}
    return {each.what: each for each in examine(folder, **options)}


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA L40S, 550.54") -> None:
    """An `nvidia-smi` that names a GPU."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_sound_machine_has_no_fault_and_its_self_test_trains(tmp_path: Path) -> None:
    got = found(tmp_path, self_test=True)
    assert worst(list(got.values())) == 0
    assert got["packages"].said.startswith("nh2st-pipe ")
    assert f"torch {torch.__version__.partition('+')[0]}" in got["packages"].said
    assert got["locks"].state == got["slides"].state == got["self-test"].state == "ok"
    assert "a head trained and judged" in got["self-test"].said
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_without_a_gpu_that_is_said_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    got = found(tmp_path)["GPU"]
    assert got.state == "note"
    assert "runs on the CPU" in got.said


@pytest.mark.parametrize(
    ("cuda", "said", "todo"),
    [
        (None, "NVIDIA L40S (driver 550.54), which torch .* cannot see: it is built for CPUs", "build for CUDA"),
        ("13.0", r"NVIDIA L40S (driver 550.54), which torch .* \(CUDA 13.0\) cannot use", "update the driver"),
    ],
)
def test_a_torch_that_cannot_see_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str, todo: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    driver(tmp_path / "bin", monkeypatch)
    got = found(tmp_path)["GPU"]
    assert got.state == "fault"
    assert got.said.startswith("NVIDIA L40S (driver 550.54), which torch ")
    assert got.said.endswith(said.rpartition(".* ")[2].replace("\\", ""))
    assert todo in got.todo


@pytest.mark.parametrize(
    ("built", "free", "state", "said"),
    [
        (["sm_80", "sm_90"], 70, "ok", "NVIDIA H100, 70 of 80 GB free"),
        (["sm_50", "sm_60"], 70, "fault", "not built for its sm_90"),
        (["sm_50", "compute_80"], 70, "ok", "NVIDIA H100"),
        (["sm_90"], 4, "note", "others have most of it"),
    ],
)
def test_a_gpu_is_named_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[str], free: int, state: str, said: str
) -> None:
    of = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": of,
        "mem_get_info": (free * 10**9, 80 * 10**9),
        "get_arch_list": built,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    got = found(tmp_path)["GPU 0"]
    assert got.state == state
    assert said in got.said
    assert bool(got.todo) == (state != "ok")


def test_on_a_full_disk_and_with_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10**12, 10**12, 10**6))
    got = found(tmp_path / "not yet there")
    assert got["disk"].state == got["temporary files"].state == "fault"
    assert "0.0 GB free" in got["disk"].said
    assert "take another disk" in got["disk"].todo
    assert "TMPDIR" in got["temporary files"].todo
    if Path("/dev/shm").is_dir():
        assert got["/dev/shm"].state == "note"
        assert "--shm-size" in got["/dev/shm"].todo


def test_a_self_test_that_fails_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nh2st_pipe.synthetic.generate", full)
    got = found(tmp_path, self_test=True)["self-test"]
    assert got.state == "fault"
    assert "No space left on device" in got.said
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    got = found(tmp_path)["locks"]
    assert got.state == "fault"
    assert "keeps no locks" in got.said
    assert "-o flock" in got.todo


def test_packages_that_are_not_there_or_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    plain = importlib.import_module

    def load(name: str) -> Any:
        if name == "openslide":
            raise OSError("libopenslide.so.1: cannot open shared object file")
        return plain(name)

    monkeypatch.setattr(importlib, "import_module", load)
    got = found(tmp_path)
    assert got["packages"].state == "fault"
    assert "timm: no module timm" in got["packages"].said
    assert "openslide: libopenslide.so.1" in got["packages"].said
    assert "pip install" in got["packages"].todo
    assert "disk" in got  # the others are told all the same


def test_a_part_that_breaks_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: unknown")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    got = found(tmp_path)
    assert got["GPU"].state == "fault"
    assert got["GPU"].said == "could not be told: CUDA error: unknown"
    assert got["locks"].state == "ok"


def test_without_network_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.core.hub.reachable", lambda: False)
    got = found(tmp_path, hub=True)
    assert got["hub"].state == "note"
    assert "cannot be reached" in got["hub"].said
    assert "--weights FILE" in got["hub"].todo
    assert "gated encoders" not in got
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in found(tmp_path, hub=True)["hub"].said


def test_which_gated_encoders_a_token_opens(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos |= {"MahmoodLab/UNI2-h": {"config.json": b"{}"}, "paige-ai/Virchow2": {"config.json": b"{}"}}
    hub.gated.add("paige-ai/Virchow2")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    got = found(tmp_path, hub=True)
    assert got["hub"].state == "ok"
    opened, _, shut = got["gated encoders"].said.partition("; not: ")
    assert opened == "opened: uni2-h"
    assert {"virchow2", "uni"} <= set(shut.split(", "))
    assert "agree to an encoder's terms" in got["gated encoders"].todo
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "HF_TOKEN" in found(tmp_path, hub=True)["hub"].todo


def test_the_command_prints_a_line_each_and_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("doctor", tmp_path, "--no-hub", "--no-self-test")
    assert done.returncode == 0
    assert all(line.startswith(("ok", "note", "  ")) for line in done.stdout.splitlines())
    monkeypatch.setattr(doctor, "_slides", lambda: iter([Finding("slides", "fault", "none", "install it")]))
    done = call("doctor", tmp_path, "--no-hub", "--no-self-test", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)["findings"]
    assert {"what": "slides", "state": "fault", "said": "none", "todo": "install it"} in said
    text = said_of(Finding("slides", "fault", "none", "install it"), 8)
    assert text == "FAULT  slides    none\n                 → install it"
