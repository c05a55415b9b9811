"""Finished fits of a run that is not finished: what a training that was stopped goes on from.

Each is that of a head on a fold: a file of arrays (safetensors) with the rest as JSON in its head, written whole; and
nothing in it is ever run. Predictions are in it where blocks are to be joined; those of slides are written as they are
made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.data.folds import Fold
from nh2st_pipe.evaluation.judged import Judged
from nh2st_pipe.heads.base import Distribution, Prediction
from nh2st_pipe.heads.carry import Carried, Strength
from nh2st_pipe.training.fold import FoldResult

__all__ = ["Fits"]

_TYPES: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (FoldResult, Fold, Judged, Prediction, Distribution, Carried, Strength)
}


class Fits:
    """The finished fits in a folder, by head and fold."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.safetensors")))

    def keep(self, result: FoldResult, number: int) -> None:
        """Keep the fit of a head on fold `number`, with the predictions that it holds."""
        from safetensors.numpy import save

        arrays: dict[str, NDArray[Any]] = {}
        said = json.dumps(_packed(result, arrays))
        self._folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path(result.head, number)) as part:
            part.write_bytes(save(arrays, metadata={"result": said}))

    def find(self, head: str, number: int) -> FoldResult | None:
        """Return the fit of a head on fold `number`; None, so that it is made anew, where none can be read."""
        from safetensors import safe_open

        path = self._path(head, number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                found = _unpacked(json.loads(file.metadata()["result"]), file.get_tensor)
        except Exception:  # whatever is wrong with it
            return None
        return found if isinstance(found, FoldResult) else None

    def _path(self, head: str, number: int) -> Path:
        return self._folder / f"{head}-{number}.safetensors"


def _packed(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return a value as JSON, its arrays put aside under names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: _packed(getattr(value, each.name), arrays) for each in dataclasses.fields(value)}
        return {"is": type(value).__name__, "of": fields}
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = np.ascontiguousarray(value)
        return {"is": "array", "of": name}
    if isinstance(value, dict):
        return {"is": "dict", "of": [[key, _packed(each, arrays)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"is": "tuple", "of": [_packed(each, arrays) for each in value]}
    if isinstance(value, list):
        return [_packed(each, arrays) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a fit holds a {type(value).__name__}, which cannot be kept")


def _unpacked(value: Any, array: Callable[[str], NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, array) for each in value]
    if not isinstance(value, dict):
        return value
    kind, of = value["is"], value["of"]
    if kind == "array":
        return array(of)
    if kind == "dict":
        return {key: _unpacked(each, array) for key, each in of}
    if kind == "tuple":
        return tuple(_unpacked(each, array) for each in of)
    return _TYPES[kind](**{name: _unpacked(each, array) for name, each in of.items()})
