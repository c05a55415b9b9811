"""Prov-GigaPath: dictionaries of tensors, `tile_embeds` and `coords`, that a person saved as `.pt`, one a slide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import tensor_of

__all__ = ["GigaPath"]


class GigaPath:
    """See Layout."""

    name = "gigapath"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        files = sorted(look.folder.glob("*.pt"))[:1]
        return any(_keys(path) >= {"tile_embeds", "coords"} for path in files)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        files = sorted(folder.glob("*.pt"))
        sections = tuple(Section(path.stem, path, "prov-gigapath", partial(_opened, path)) for path in files)
        return Found("GigaPath", sections)


def _keys(path: Path) -> set[str]:
    """Return the names in a file of tensors; none where it holds anything else."""
    found = set[str]()

    def look(loaded: Any) -> Any:
        found.update(map(str, loaded) if isinstance(loaded, dict) else ())
        return next(iter(loaded.values())) if isinstance(loaded, dict) and loaded else loaded

    try:
        tensor_of(path, look)
    except SlideError:
        return set()
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Features]:
    def of(name: str) -> Any:
        return lambda loaded: loaded[name]

    coords = tensor_of(path, of("coords")).astype(np.float64)
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise SlideError(f"{path}: coords should be tiles × 2, and are {coords.shape}")
    yield Features(tensor_of(path, of("tile_embeds")), Places(coords, None))
