"""The site: pages of this folder, pages that live elsewhere in the repository, the commands and the Python interface.

Sphinx with MyST, as scanpy, squidpy and scvi-tools have it: notebooks keep their outputs (myst-nb), names link to the
pages of AnnData and PyTorch, and a warning ends the build. Nothing is executed here.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import nh2st_pipe

ROOT = Path(__file__).resolve().parents[1]

project, author, release = "nh2st-pipe", "nh2st-pipe's authors", nh2st_pipe.__version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_theme, html_title = "furo", f"nh2st-pipe {release}"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_show_copyright = html_show_sphinx = html_copy_source = False
highlight_language = "none"  # what is Python says so; the rest is commands and tables
smartquotes = False  # "--" is an option
exclude_patterns = ["_build", "templates"]

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text, copybutton_only_copy_prompt_lines = "$ ", True

default_role = "code"  # single backticks in docstrings
autodoc_typehints, autodoc_member_order = "signature", "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
add_module_names = False
python_use_unqualified_type_names = True

ELSEWHERE = {
    "store": "stages/embed/STORE.md",
    "recipes": "stages/train/README.md",
    "datasets": "manifests/README.md",
    "benchmarks": "benchmarks/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}
"""Page → the file of the repository that it shows; there is a page of that name with a line that says so."""

_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def linked(text: str, of: Path) -> str:
    """Return a page whose links lead to pages of the site; what is no page is named by its path in the repository."""
    pages = {(ROOT / path).resolve(): page for page, path in ELSEWHERE.items()}

    def made(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        path, _, anchor = target.partition("#")
        if picture or not path or re.match(r"[a-z]+:", target):
            return found.group()
        file = (of.parent / path).resolve()
        where = f"#{anchor}" if anchor else ""
        if file in pages:
            return f"[{words}]({pages[file]}.md{where})"
        if file.is_relative_to(ROOT / "docs") and file.suffix in (".md", ".ipynb") and file.is_file():
            return f"[{words}]({file.relative_to(ROOT / 'docs').as_posix()}{where})"
        if not file.exists():
            raise ValueError(f"{of}: a link leads to {target}, which is not there")
        name = file.relative_to(ROOT).as_posix()
        return f"`{name}`" if words.strip("`") in (name, file.name, path) else f"{words} (`{name}`)"

    return _LINK.sub(made, text)


def commands() -> str:
    """Return every command with its arguments and options, as the command line has them."""
    import typer

    from nh2st_pipe.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    lines = []
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [
            f"## {name}",
            "",
            inspect.cleandoc(command.help or ""),
            "",
            "```",
            f"nh2st-pipe {name} {usage}",
            "```",
        ]
        lines += ["", "| | |", "|---|---|"]
        for parameter in command.params:
            names, words = parameter.get_help_record(context) or (str(parameter.name).upper(), "")
            words = re.sub(r"([|[])", r"\\\1", words or str(getattr(parameter, "help", "") or ""))
            lines.append(f"| {', '.join(f'`{each.strip()}`' for each in names.split(','))} | {words} |")
        lines.append("")
    return "\n".join(lines)


def read_page(app: Any, page: str, source: list[str]) -> None:
    """Put in what a page shows of elsewhere, and lead its links where they go."""
    of = ROOT / "docs" / f"{page}.md"
    if page in ELSEWHERE:
        of = ROOT / ELSEWHERE[page]
        source[0] = of.read_text("utf-8")
    if of.is_file():  # a notebook leads where it says
        source[0] = linked(source[0].replace("{{ commands }}", commands()), of)


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Take docstrings as the plain text that they are: backticks are code, no other character means anything."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(
            f"`{part}`" if part.startswith("`") else re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts
        )


def setup(app: Any) -> dict[str, bool]:
    """Join the above to Sphinx."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring)
    return {"parallel_read_safe": True}
