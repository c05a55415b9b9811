"""Recipes and dataset descriptions, found by name.

They live at the top of the repository (`stages/`, `manifests/`). A wheel carries them inside the package; an
editable install and a source tree have them beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nh2st_pipe.core.errors import RecipeError, fault_of, nearest

__all__ = ["find", "load_yaml", "names"]

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")


def _folder(kind: str) -> Path:
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / kind).is_dir():
            return root / kind
    raise RecipeError(f"the folder {kind}/ is missing from this installation; reinstall nh2st-pipe")


def names(kind: str) -> list[str]:
    """Return the names of one kind of recipe ("stages/embed", "stages/train", "manifests"), sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def find(kind: str, name: str | Path) -> Path:
    """Return the file of the recipe called `name`, or `name` itself where it is a path to a YAML file."""
    text = str(name)
    if text.endswith(_SUFFIXES) or "/" in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise RecipeError(f"no recipe file at {path}")
        return path
    path = _folder(kind) / f"{text}.yaml"
    if not path.is_file():
        what = {"stages/embed": "encoder", "stages/train": "training recipe"}.get(kind, "dataset")
        known = names(kind)
        raise RecipeError(f"no {what} is called '{text}'{nearest(text, known)} (there are {', '.join(known)})")
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping from `path`."""
    with fault_of(RecipeError, f"{path} is not YAML"):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        what = "is empty" if data is None else "holds a list" if isinstance(data, list) else "holds a single value"
        raise RecipeError(f"{path} should hold 'key: value' lines, and {what}")
    return data
