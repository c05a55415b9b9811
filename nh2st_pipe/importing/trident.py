"""TRIDENT: `features_<encoder>/<slide>.h5` below a folder of its coordinates, vectors of slides beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, UsageError, listed
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import attribute, dataset, h5_file, table_xy, tensor_of, values_of

__all__ = ["TRIDENT"]

_OF_TILES, _OF_SLIDES = "features_", "slide_features_"
_DEPTH = ("", "*", "*/*")


class TRIDENT:
    """See Layout."""

    name = "trident"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any({"features", "coords"} <= keys and "patch_size_level0" in attrs for _, keys, attrs in look.h5)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        places = {folder, *(each for depth in _DEPTH[1:] for each in folder.glob(depth) if each.is_dir())}
        of_tiles = sorted(each for each in places if each.name.startswith(_OF_TILES))
        coords = {each.parent for each in of_tiles}
        if len(coords) > 1:
            raise UsageError(
                f"{folder} holds features of tiles laid in more than one way: give one of {listed(sorted(coords))}"
            )
        sections = [section for each in of_tiles or [folder] for section in _sections(each, asked)]
        vectors: dict[str, dict[str, Callable[[], NDArray[np.float32]]]] = {}
        for each in sorted(each for each in places if each.name.startswith(_OF_SLIDES)):
            for path in sorted(each.glob("*.h5")):
                vectors.setdefault(path.stem, {})[each.name.removeprefix(_OF_SLIDES)] = _vector(path)
        return Found("TRIDENT", tuple(sections), vectors)


def _sections(folder: Path, asked: Asked) -> Iterator[Section]:
    encoder = folder.name.removeprefix(_OF_TILES) if folder.name.startswith(_OF_TILES) else None
    done = set[str]()
    for path in sorted(folder.glob("*.h5")):
        done.add(path.stem)
        yield Section(path.stem, path, encoder, partial(_opened, path, asked))
    for path in sorted(folder.glob("*.pt")):
        if path.stem not in done:
            yield Section(path.stem, path, encoder, partial(_opened_pt, path, asked))


@contextmanager
def _opened(path: Path, asked: Asked) -> Iterator[Features]:
    with h5_file(path) as file:
        coords = dataset(file, "coords", path)
        features = dataset(file, "features", path)
        yield Features(values_of(features), _places(coords, path, asked), size=_size(coords))


@contextmanager
def _opened_pt(path: Path, asked: Asked) -> Iterator[Features]:
    """Open a tensor alone, whose coordinates lie in `patches/`."""
    beside = (asked.coords or path.parent.parent / "patches") / f"{path.stem}_patches.h5"
    if not beside.is_file():
        raise SlideError(f"{path} holds no coordinates, and there is no {beside}; --coords says where that folder is")
    with h5_file(beside) as file:
        coords = dataset(file, "coords", beside)
        yield Features(tensor_of(path), _places(coords, beside, asked), size=_size(coords))


def _places(coords: Any, path: Path, asked: Asked) -> Places:
    side = attribute(coords, "patch_size_level0")
    if side is None and asked.tile_px is None and asked.tile_um is None:
        raise UsageError(
            f"{path}: its coordinates have no patch_size_level0, as where TRIDENT took those of CLAM: give --tile-px "
            "(level-0 px) or --tile-um"
        )
    return Places(table_xy(coords, path), None if side is None else float(side))


def _size(coords: Any) -> tuple[int, int] | None:
    width, height = attribute(coords, "level0_width"), attribute(coords, "level0_height")
    return None if width is None or height is None else (int(width), int(height))


def _vector(path: Path) -> Callable[[], NDArray[np.float32]]:
    def read() -> NDArray[np.float32]:
        with h5_file(path) as file:
            values = np.asarray(dataset(file, "features", path)[:], np.float32)
        if values.ndim > 1 and values.shape[0] > 1:
            raise SlideError(f"{path} holds {values.shape[0]} vectors, and one of the whole slide is expected")
        return values.ravel()

    return read
