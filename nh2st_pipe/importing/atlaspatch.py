"""AtlasPatch: `patches/<slide>.h5` with a dataset for each encoder in the group `features`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py

from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import attribute, dataset, h5_file, table_xy, values_of

__all__ = ["AtlasPatch"]

_UNFINISHED = "__tmp_"


class AtlasPatch:
    """See Layout."""

    name = "atlaspatch"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any({"features/", "coords"} <= keys for _, keys, _ in look.h5)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        sections = []
        where = folder / "patches" if (folder / "patches").is_dir() else folder
        for path in sorted(where.glob("*.h5")):
            with h5_file(path) as file:
                group = file.get("features")
                names = sorted(group) if isinstance(group, h5py.Group) else []
            for name in names:
                if not name.startswith(_UNFINISHED):
                    sections.append(Section(path.stem, path, name, partial(_opened, path, name)))
        return Found("AtlasPatch", tuple(sections))


@contextmanager
def _opened(path: Path, encoder: str) -> Iterator[Features]:
    with h5_file(path) as file:
        coords, side = table_xy(dataset(file, "coords", path), path), attribute(file, "patch_size_level0")
        width, height = attribute(file, "level0_width"), attribute(file, "level0_height")
        size = None if width is None or height is None else (int(width), int(height))
        places = Places(coords, None if side is None else float(side))
        yield Features(values_of(dataset(file["features"], encoder, path)), places, size=size)
