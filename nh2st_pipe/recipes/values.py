"""Typed values, checked when they are made, their faults in words. Recipes are such values."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from nh2st_pipe.core.errors import RecipeError, fault_of

_NO_GROUP = ("model_type", "model_attributes_type", "dict_type")  # pydantic's names of one fault

__all__ = ["Strict", "faults_in_words", "validate"]

Recipe = TypeVar("Recipe", bound=BaseModel)


class Strict(BaseModel):
    """A value that refuses unknown keys and numbers that are none, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def faults_in_words(error: pydantic.ValidationError, model: type[BaseModel], data: Any = None) -> str:
    """Return each fault with the key it is about, and the nearest key where there is no such one.

    `data` is what was validated: of a value that can be of several kinds, keys of its own kind alone are offered.
    """
    lines = []
    for fault in error.errors():
        # The second part under `head` is pydantic's own: which kind of head it tried.
        loc = fault["loc"][:1] + fault["loc"][2:] if fault["loc"][:1] == ("head",) else fault["loc"]
        where = ".".join(str(part) for part in loc)
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such key{_nearest_key(where, list(_keys(model, data)))}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: is missing")
        elif fault["type"] == "value_error":  # our own words, which name what they are about
            lines.append(": ".join(filter(None, (where, str(fault["ctx"]["error"])))))
        elif fault["type"] in _NO_GROUP:
            lines.append(f"{where}: should be a group of keys (got {fault['input']!r})")
        else:
            lines.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]} (got {fault['input']!r})")
    return "; ".join(lines)


def _keys(annotation: Any, data: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field in a model and inside it, as far as `data` is of their kind or has them."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        for part in typing.get_args(annotation):
            yield from _keys(part, data, prefix)
        return
    of_kind = annotation.model_fields.get("kind")
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if of_kind is not None and kind is not None and kind not in typing.get_args(of_kind.annotation):
        return
    for name, field in annotation.model_fields.items():
        yield f"{prefix}{name}"
        inside = data.get(name) if isinstance(data, Mapping) else None
        if inside is not None or field.default is not None:  # a part that is left out unless it is given
            yield from _keys(field.annotation, inside, f"{prefix}{name}.")


def _nearest_key(wrong: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the dotted key whose last part is most like that of `wrong`, or nothing."""
    leaf = wrong.rpartition(".")[2]
    match = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.6)
    if not match:
        return ""
    same = [key for key in known if key.rpartition(".")[2] == match[0]]
    # Of several, the one that stands nearest to where the wrong one stood.
    best = max(same, key=lambda key: (difflib.SequenceMatcher(None, wrong, key).ratio(), -len(key)))
    return f"; did you mean '{best}'?"


def validate(model: type[Recipe], data: dict[str, Any], where: str | Path) -> Recipe:
    """Return `data` as a checked `model`. Raises RecipeError naming each key at fault, and `where` it stands."""
    with fault_of(RecipeError, f"{where} cannot be used"):
        try:
            return model.model_validate(data)
        except pydantic.ValidationError as error:
            raise RecipeError(f"{where}: {faults_in_words(error, model, data)}") from error
