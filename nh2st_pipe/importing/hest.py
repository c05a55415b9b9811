"""HEST: embeddings of its benchmark, `<encoder>/<sample>.h5`, a row for each spot, known by its barcode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.reading import attribute, dataset, h5_file, names_of, table_xy, values_of

__all__ = ["HEST"]

_TILE_UM = 112.0  # 224 px at 0.5 µm


class HEST:
    """See Layout."""

    name = "hest"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return any({"embeddings", "barcodes"} <= keys or {"img", "barcode"} <= keys for _, keys, _ in look.h5)

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        files = sorted(folder.rglob("*.h5"))
        embedded = [path for path in files if _has(path, "embeddings")]
        if files and not embedded:
            raise UsageError(
                f"{folder} holds HEST's patches, which are pictures and no features: nh2st-pipe embed encodes their "
                "slides"
            )
        return Found(
            "HEST",
            tuple(Section(path.stem, path, path.parent.name, partial(_opened, path, asked)) for path in embedded),
        )


def _has(path: Path, name: str) -> bool:
    with h5_file(path) as file:
        return name in file


@contextmanager
def _opened(path: Path, asked: Asked) -> Iterator[Features]:
    side, assumed = None, tuple[str, ...]()
    patches = asked.coords and asked.coords / path.name
    if patches and patches.is_file():
        with h5_file(patches) as file:
            said = attribute(dataset(file, "img", patches), "patch_size_src")
            side = None if said is None else float(said)
    elif asked.tile_um is None and asked.tile_px is None:
        assumed = (f"tiles of {_TILE_UM:g} µm",)
    with h5_file(path) as file:
        places = Places(table_xy(dataset(file, "coords", path), path), side, side_um=_TILE_UM)
        barcodes = names_of(dataset(file, "barcodes", path))
        yield Features(values_of(dataset(file, "embeddings", path)), places, barcodes, assumed=assumed)
