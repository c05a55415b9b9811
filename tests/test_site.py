"""The site's own parts; that it builds without a warning is `make docs`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

import nh2st_pipe
from nh2st_pipe.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_and_option_stands_in_the_reference(conf: ModuleType) -> None:
    text = conf.commands()
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in group.commands.items():
        part = text.split(f"\n## {name}\n")[1 if f"\n## {name}\n" in text else 0].split("\n## ")[0]
        assert str(command.help).splitlines()[0].strip() in part
        for parameter in command.params:
            if parameter.name != "help":
                for option in parameter.opts:
                    assert option in part, f"{name} {option}"


def test_every_verb_stands_in_the_reference_of_python() -> None:
    text = (DOCS / "api.md").read_text()
    for name in set(nh2st_pipe.__all__) - {"__version__", "NH2ST"}:
        assert re.search(rf"auto\w+:: (nh2st_pipe\.)?{name}\n", text), name


def test_links_lead_to_pages_and_what_is_no_page_is_named(conf: ModuleType) -> None:
    of = DOCS.parent / "stages/train/README.md"
    said = conf.linked("[how](../../docs/predictions.md#x) [heads/carry.py](../../nh2st_pipe/heads/carry.py)", of)
    assert said == "[how](predictions.md#x) heads/carry.py (`nh2st_pipe/heads/carry.py`)"
    readme = DOCS.parent / "README.md"
    assert conf.linked("[Format](stages/embed/STORE.md) [x](https://a.b/c) ![p](docs/report.jpg)", readme) == (
        "[Format](store.md) [x](https://a.b/c) ![p](docs/report.jpg)"
    )
    with pytest.raises(ValueError, match=r"README\.md: a link leads to docs/none\.md, which is not there"):
        conf.linked("[x](docs/none.md)", readme)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{each.name}" for each in DOCS.glob("*.md"))])
def test_no_link_of_a_page_is_dead(conf: ModuleType, page: str) -> None:
    conf.linked((DOCS.parent / page).read_text(), DOCS.parent / page)


def test_what_is_shown_of_elsewhere_is_there(conf: ModuleType) -> None:
    for page, path in conf.ELSEWHERE.items():
        assert (DOCS / f"{page}.md").read_text() == f"This page shows {path}.\n"
        source = [""]
        conf.read_page(None, page, source)
        assert source[0].startswith("# ")


def test_docstrings_are_plain_text(conf: ModuleType) -> None:
    lines = ["Values of *args and `x_` in layers_, n | m; `a*b`."]
    conf.read_docstring(None, "function", "f", None, None, lines)
    assert lines == [r"Values of \*args and ``x_`` in layers\_, n \| m; ``a*b``."]


@pytest.mark.parametrize("file", sorted((DOCS / "tutorials").glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_tutorial_is_kept_with_its_outputs_and_without_this_machines_folders(file: Path) -> None:
    notebook = json.loads(file.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # in one go, from the top
    assert any(cell["outputs"] for cell in code)
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert '"stderr"' not in outputs
    assert '"error"' not in outputs
    assert not re.search(r"/(tmp|home|root|Users|work)/", outputs)
    assert file.stat().st_size < 2_000_000
    assert f"tutorials/{file.stem}\n" in (DOCS / "index.md").read_text()
