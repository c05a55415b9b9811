"""Code of others: by the name under which a package registers it (an entry point), as "package.module:Name", or as
"file.py:Name".

Naming it runs it. So a name comes from whoever calls; what is fetched from a hub may name registered code alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from nh2st_pipe.core.errors import RecipeError, reason_of

__all__ = ["ENCODERS", "FEATURES", "HEADS", "LAYOUTS", "Plugged", "by_reference", "plugged", "registered"]

HEADS = "nh2st_pipe.heads"
ENCODERS = "nh2st_pipe.encoders"
LAYOUTS = "nh2st_pipe.layouts"
FEATURES = "nh2st_pipe.features"
"""Entry points: the group under which a package registers."""


@dataclass(frozen=True)
class Plugged:
    """Code of others, loaded."""

    what: Any
    source: str
    """Where it is from, in words: a package and its version, or a file and its SHA-256."""


def by_reference(name: str) -> bool:
    """Whether a name says itself where code is: in a file or a module."""
    return ":" in name


def registered(group: str, ours: Collection[str] = ()) -> dict[str, EntryPoint]:
    """Return what packages register under `group`, by name. Raises RecipeError where one is called as one of `ours`,
    or two are called the same.
    """
    found = dict[str, EntryPoint]()
    for point in entry_points(group=group):
        if point.name in ours:
            raise RecipeError(f"{_package(point)} registers '{point.name}' ({group}), which is the name of one of ours")
        if point.name in found and found[point.name].value != point.value:
            both = f"{_package(found[point.name])} and {_package(point)}"
            raise RecipeError(f"{both} both register '{point.name}' ({group})")
        found[point.name] = point
    return found


def plugged(group: str, name: str, ours: Collection[str] = ()) -> Plugged | None:
    """Return the code called `name`; None where nothing is registered as that.

    Raises RecipeError where it cannot be loaded.
    """
    if by_reference(name):
        module, _, attribute = name.rpartition(":")
        if module.endswith(".py"):
            path = Path(module).expanduser()
            if not path.is_file():
                raise RecipeError(f"there is no file {path}, in which {name} would be")
            source = path.read_bytes()
            sha = hashlib.sha256(source).hexdigest()
            inside = _of_file(str(path.resolve()), sha)
            return Plugged(_attribute(inside, attribute, name), f"{path.name}, SHA-256 {sha}")
        try:
            loaded = importlib.import_module(module)
        except Exception as error:
            raise RecipeError(f"{name} cannot be loaded: {reason_of(error)}") from error
        return Plugged(_attribute(loaded, attribute, name), f"{module} {getattr(loaded, '__version__', '')}".strip())
    point = registered(group, ours).get(name)
    if point is None:
        return None
    try:
        return Plugged(point.load(), _package(point))
    except Exception as error:
        raise RecipeError(
            f"'{name}' of {_package(point)} ({point.value}) cannot be loaded: {reason_of(error)}"
        ) from error


@cache
def _of_file(path: str, sha: str) -> ModuleType:
    """Return the module in a file; again where the file has changed."""
    name = f"nh2st_plug_in_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what is pickled of it is found there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, of: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise RecipeError(f"{of} cannot be loaded: there is no {name} in it") from None


def _package(point: EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
