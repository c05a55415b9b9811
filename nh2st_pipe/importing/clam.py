"""CLAM: `h5_files/<slide>.h5` with features and corners alone; how large tiles are is in `patches/<slide>.h5`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import attribute, dataset, h5_file, table_xy, tensor_of, values_of

__all__ = ["CLAM"]


class CLAM:
    """See Layout."""

    name = "clam"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any(
            {"features", "coords"} <= keys and "patch_size_level0" not in attrs and not keys & {"annots", "embeddings"}
            for _, keys, attrs in look.h5
        )

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        where = folder / "h5_files" if (folder / "h5_files").is_dir() else folder
        patches = asked.coords or next(
            (each for each in (folder / "patches", folder.parent / "patches") if each.is_dir()), None
        )
        files = {path.stem: path for path in sorted(where.glob("*.h5"))}
        for path in sorted((folder / "pt_files").glob("*.pt")):
            files.setdefault(path.stem, path)
        return Found(
            "CLAM",
            tuple(Section(name, path, None, partial(_opened, path, patches)) for name, path in files.items()),
        )


@contextmanager
def _opened(path: Path, patches: Path | None) -> Iterator[Features]:
    beside = None if patches is None else patches / f"{path.stem}.h5"
    xy, side = None, None
    if beside is not None and beside.is_file():
        with h5_file(beside) as file:
            coords = dataset(file, "coords", beside)
            xy, side = table_xy(coords, beside), _side(coords)
    if path.suffix == ".pt":
        if xy is None:
            raise SlideError(f"{path} holds no coordinates; --coords says where CLAM's folder patches is")
        yield Features(tensor_of(path), Places(xy, side))
        return
    with h5_file(path) as file:
        own = table_xy(dataset(file, "coords", path), path)
        if xy is not None and not (own.shape == xy.shape and np.array_equal(own[:, :2], xy[:, :2])):
            raise SlideError(f"{path} and {beside} have other coordinates: are they of the same run?")
        yield Features(values_of(dataset(file, "features", path)), Places(own, side))


def _side(coords: Any) -> float | None:
    """Return the side of a tile, level-0 px: px at the level of the patches, times how much smaller that is."""
    px, down = attribute(coords, "patch_size"), coords.attrs.get("downsample")
    if px is None or down is None:
        return None
    custom = attribute(coords, "custom_downsample")
    return float(px) * float(np.ravel(down)[0]) * float(custom or 1)
