"""HistoEncoder: `features.parquet` with the tile's place from its file's name and a column for each value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from nh2st_pipe.core.errors import SlideError, fault_of, listed
from nh2st_pipe.core.memory import require
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section

__all__ = ["HistoEncoder"]

_FILE = re.compile(r"features(_\d+)?\.parquet")
_BELOW = ("tiles", "patches")


class HistoEncoder:
    """See Layout."""

    name = "histoencoder"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any(_FILE.fullmatch(name) for name in look.names)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        files = [path for path in sorted(folder.rglob("*.parquet")) if _FILE.fullmatch(path.name)]
        of = dict[str, list[Path]]()
        for path in files:
            with fault_of(SlideError, f"{path} cannot be used"):
                if "path" not in pl.read_parquet_schema(path):
                    raise SlideError(f"{path} has no column path, by which tiles and slides are known")
                names = pl.read_parquet(path, columns=["path"])["path"].unique().to_list()
            for name in sorted({_slide(str(each)) for each in names}):
                of.setdefault(name, []).append(path)
        return Found(
            "HistoEncoder",
            tuple(Section(name, paths[0], None, partial(_opened, name, paths)) for name, paths in of.items()),
        )


def _slide(path: str) -> str:
    """Return the slide of a tile's file: HistoPrep lays tiles in a folder called as the slide, or in one below it."""
    parents = Path(path.replace("\\", "/")).parts[:-1]
    if len(parents) > 1 and parents[-1] in _BELOW:
        return parents[-2]
    return parents[-1] if parents else ""


@contextmanager
def _opened(name: str, paths: list[Path]) -> Iterator[Features]:
    require(sum(path.stat().st_size for path in paths), f"{paths[0]}")
    with fault_of(SlideError, f"{paths[0]} cannot be used"):
        every = pl.concat([pl.read_parquet(path) for path in paths], how="vertical")
        mine = every.filter(pl.col("path").map_elements(lambda each: _slide(str(each)) == name, pl.Boolean))
        missing = {"x", "y", "w"} - set(mine.columns)
        if missing:
            raise SlideError(f"{paths[0]} has no columns {listed(sorted(missing))}")
        columns = sorted(
            (each for each in mine.columns if re.fullmatch(r"feat\d+", each)), key=lambda each: int(each[4:])
        )
        if not columns:
            raise SlideError(f"{paths[0]} has no columns feat1, feat2 …")
        xy, sides = mine.select("x", "y").to_numpy().astype(np.float64), mine["w"].unique().to_list()
        features = mine.select(columns).to_numpy()
    if len(sides) != 1:
        raise SlideError(f"{paths[0]}: tiles of {name} are {listed(sides)} px wide; one size is expected")
    if not (xy >= 0).all():  # what HistoEncoder writes where a name does not say it
        raise SlideError(f"{paths[0]}: names of the tiles of {name} do not say where they lie (x…_y…_w…_h…)")
    yield Features(features, Places(xy, float(sides[0])))
