"""Typed values, checked when they are made, their faults in words. Recipes are such values."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from nh2st_pipe.core.errors import RecipeError, nearest

__all__ = ["Strict", "faults_in_words", "validate"]

Recipe = TypeVar("Recipe", bound=BaseModel)


class Strict(BaseModel):
    """A value that refuses unknown keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def faults_in_words(error: pydantic.ValidationError, model: type[BaseModel]) -> str:
    """Return each fault with the key it is about, and the nearest key where there is no such one."""
    lines = []
    for fault in error.errors():
        # The second part under `head` is pydantic's own: which kind of head it tried.
        loc = fault["loc"][:1] + fault["loc"][2:] if fault["loc"][:1] == ("head",) else fault["loc"]
        where = ".".join(str(part) for part in loc)
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such key{nearest(str(fault['loc'][-1]), _keys(model))}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: is missing")
        elif fault["type"] == "value_error":  # our own words, which name what they are about
            lines.append(": ".join(filter(None, (where, str(fault["ctx"]["error"])))))
        else:
            lines.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]} (got {fault['input']!r})")
    return "; ".join(lines)


def _keys(annotation: Any) -> set[str]:
    """Every field name in a model and the models inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return set(fields) | {key for f in fields.values() for key in _keys(f.annotation)}
    return {key for part in typing.get_args(annotation) for key in _keys(part)}


def validate(model: type[Recipe], data: dict[str, Any], where: str | Path) -> Recipe:
    """Return `data` as a checked `model`. Raises RecipeError naming each key at fault, and `where` it stands."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {faults_in_words(error, model)}") from error
