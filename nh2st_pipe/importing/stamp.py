"""STAMP: `<extractor>-<hash>/<slide>.h5`, features in float16 and corners in µm from the scan's top left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import attribute, dataset, h5_file, table_xy, values_of

__all__ = ["STAMP"]

_OLD_UM, _OLD_PX = 256.0, 224.0  # of a tile before version 2, whose coordinates count in such px


class STAMP:
    """See Layout."""

    name = "stamp"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any({"feats", "coords"} <= keys for _, keys, _ in look.h5)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        sections = []
        for path in sorted(folder.rglob("*.h5")):
            with h5_file(path) as file:
                if "feats" not in file or attribute(file, "feat_type") in ("slide", "patient"):
                    continue
                encoder, version = attribute(file, "extractor"), attribute(file, "stamp_version")
            name = re.sub("-[0-9a-f]{8}$", "", str(encoder)) if encoder else None  # names have hyphens too
            sections.append(Section(path.stem, path, name, partial(_opened, path), str(version or "")))
        return Found("STAMP", tuple(sections))


@contextmanager
def _opened(path: Path) -> Iterator[Features]:
    with h5_file(path) as file:
        xy, features = table_xy(dataset(file, "coords", path), path), dataset(file, "feats", path)
        side = attribute(file, "tile_size_um") or (
            attribute(file, "tile_size") if attribute(file, "unit") == "um" else None
        )
        if side is not None:
            yield Features(values_of(features), Places(xy, float(side), "µm"))
            return
        stride = _stride(xy)
        if abs(stride - _OLD_PX) > 1:
            raise SlideError(
                f"{path} does not say in which unit its coordinates are (no attribute tile_size_um), and with "
                f"{stride:.4g} from tile to tile they are not those of STAMP before version 2 either"
            )
        scale = _OLD_UM / _OLD_PX
        yield Features(values_of(features), Places(xy * scale, _OLD_UM, "µm"), assumed=("tiles of 256 µm",))


def _stride(xy: np.ndarray) -> float:
    steps = np.diff(np.unique(xy[:, 0]))
    return float(steps.min()) if len(steps) else 0.0
