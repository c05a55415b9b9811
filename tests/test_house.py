"""What stands around the code agrees with it: requirements, recipes of packages, the citation, templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import nh2st_pipe

ROOT = Path(__file__).parents[1]
CONDA = {"torch": "pytorch", "faiss-cpu": "faiss", "openslide-bin": "openslide"}


def needed() -> dict[str, str]:
    """Return what the package needs without a GPU, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {each.name: str(each.specifier) for each in map(Requirement, project["dependencies"])}
    del found["faiss-gpu"]
    return found


def test_what_a_machine_without_a_gpu_needs_is_what_the_package_needs() -> None:
    lines = [line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert {each.name: str(each.specifier) for each in map(Requirement, lines)} == needed()


def test_the_conda_recipe_needs_the_same() -> None:
    text = (ROOT / "packaging/meta.yaml").read_text()
    assert f'set version = "{nh2st_pipe.__version__}"' in text
    plain = re.sub(r"{{.*?}}", "x", re.sub(r"{%.*?%}\n", "", text))
    run = yaml.safe_load(plain)["requirements"]["run"]
    found = {name: bound for name, _, bound in (each.partition(" ") for each in run) if name != "python"}
    assert found.keys() == {CONDA.get(name, name) for name in needed()}
    for name, bound in needed().items():
        if name != "openslide-bin":  # numbered otherwise there
            assert found[CONDA.get(name, name)] == bound


def test_every_dependency_is_pinned_for_tests() -> None:
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.lower() for name in needed()} - pins == {"faiss-cpu"}


def test_the_citation_is_of_this_version() -> None:
    cited: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == nh2st_pipe.__version__
    assert cited["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert all(key in cited for key in ("title", "message", "authors"))


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md")), ids=lambda file: file.name)
def test_templates_say_what_they_are_for(file: Path) -> None:
    _, head, body = file.read_text().split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"name", "about"}
    assert body.strip()


def test_what_is_copied_into_an_image_is_there() -> None:
    lines = (ROOT / "packaging/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    listed = (ROOT / "packaging/nh2st-pipe.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
    copied += [line.split()[0] for line in listed.splitlines()]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
