"""Files of others, opened so that whatever is wrong with them is a fault of theirs, with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.hdf5 import opened_h5
from nh2st_pipe.core.memory import require
from nh2st_pipe.importing.found import Values

__all__ = ["ROW_BYTES", "attribute", "dataset", "h5_file", "names_of", "stem", "table_xy", "tensor_of", "values_of"]

ROW_BYTES = 16 << 20
"""Of features read at once."""

_COMPOUND = (".ome.tif", ".ome.tiff", ".ome.zarr")


@contextmanager
def h5_file(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file. Raises SlideError naming it, for whatever goes wrong while it is open."""
    with fault_of(SlideError, f"{path} cannot be used"), opened_h5(path) as file:
        yield file


def dataset(file: h5py.File | h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """Return a dataset. Raises SlideError with what there is where there is none of that name."""
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise SlideError(f"{path} has no dataset '{name}' (it holds {', '.join(sorted(file)) or 'nothing'})")
    return found


def attribute(holder: Any, name: str) -> Any:
    """Return an attribute, None where it is missing or the words "None"; text as text."""
    value = holder.attrs.get(name)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    return None if value is None or (isinstance(value, str) and value in ("None", "")) else value


@dataclass(frozen=True)
class _Squeezed:
    """Features that are stored as 1 × n × d."""

    of: h5py.Dataset

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.of.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.of.dtype
        return dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        values: NDArray[Any] = self.of[0, rows]
        return values


def values_of(found: h5py.Dataset) -> Values:
    """Return features n × d, also where they are stored as 1 × n × d."""
    values: Values = _Squeezed(found) if found.ndim == 3 and found.shape[0] == 1 else found
    return values


def table_xy(found: Any, path: Path) -> NDArray[np.float64]:
    """Return coordinates n × 2, of n × 2 or more columns. Raises SlideError where there are no such."""
    values = np.asarray(found[:], np.float64)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or values.shape[1] < 2:
        raise SlideError(f"{path}: coordinates should be tiles × 2, and are {values.shape}")
    return values


def names_of(found: Any) -> list[str]:
    """Return text of a dataset n or n × 1."""
    return [each.decode("utf-8") if isinstance(each, bytes) else str(each) for each in np.asarray(found[:]).ravel()]


def tensor_of(path: Path, of: Callable[[Any], Any] = lambda loaded: loaded) -> NDArray[Any]:
    """Return the tensor in a .pt file, `of` what is loaded from it. Nothing in it is run.

    Raises SlideError where it holds anything else.
    """
    import torch

    require(path.stat().st_size, f"{path}")
    with fault_of(SlideError, f"{path} cannot be used: a file of tensors alone is expected"):
        found = of(torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(found, torch.Tensor):
        raise SlideError(f"{path} holds {type(found).__name__}, and a tensor is expected")
    if found.dtype is torch.bfloat16:
        found = found.float()
    values: NDArray[Any] = found.numpy()
    return values[0] if values.ndim == 3 and values.shape[0] == 1 else values


def stem(name: str) -> str:
    """Return a slide's name without what follows the dot."""
    for ending in _COMPOUND:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).stem
