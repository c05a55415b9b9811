"""A pilot of a study: patches of spots of some of its slides, the same for every encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import OF_ONE_SLIDE, ExpressionError, UsageError, fault_of
from nh2st_pipe.core.h5ad import read_h5ad, write_h5ad
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.store.format import counts_fingerprint
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest, write_manifest
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["Pilot", "make_pilot"]

_PATCH = 100  # spots that lie together, so that a head has their neighbourhood


@dataclass(frozen=True)
class Pilot:
    """A manifest of its own, with expression files that hold some of the spots."""

    folder: Path
    rows: list[SlideRow]
    failed: dict[str, str]
    """Slides that could not be used, each with its cause."""

    @property
    def manifest(self) -> Path:
        """The manifest to embed."""
        return self.folder / "manifest.csv"


def make_pilot(rows: Sequence[SlideRow], out: Path, spots: int, most_slides: int, seed: int) -> Pilot:
    """Write a pilot of `spots` spots on each of at most `most_slides` slides below `out`; one that is there is kept.

    Slides are drawn patient after patient. Raises UsageError where no slide has expression.
    """
    known = [row for row in rows if row.expression is not None]
    if not known:
        raise UsageError("none of the slides has expression: there is nothing to judge an encoder by")
    drawn = _spread(known, most_slides, np.random.default_rng(seed))
    prints = [(row.record(), _print(row)) for row in drawn]
    key = hashlib.sha256(json.dumps([prints, spots, seed], default=str).encode()).hexdigest()[:10]
    folder = out / f"pilot-{key}"
    failed: dict[str, str] = {}
    left_out = folder / "left-out.json"
    if (folder / "manifest.csv").is_file():  # it is written last
        failed = json.loads(left_out.read_text("utf-8"))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for row in drawn:
            try:
                written.append(replace(row, expression=_some_of(row, folder, spots, seed)))
            except OF_ONE_SLIDE as error:
                failed[row.slide_id] = str(error)
        if not written:
            raise UsageError(f"no slide of the pilot can be used: {'; '.join(failed.values())}")
        left_out.write_text(json.dumps(failed), "utf-8")
        write_manifest(written, folder / "manifest.csv")
    return Pilot(folder, read_manifest(folder / "manifest.csv"), failed)


def _print(row: SlideRow) -> str:
    assert row.expression is not None
    try:
        return counts_fingerprint(row.expression)
    except OSError:
        return ""  # it is named when it is read


def _spread(rows: Sequence[SlideRow], most: int, rng: np.random.Generator) -> list[SlideRow]:
    """Draw at most `most` rows, one of each patient before a second of any; in the manifest's order."""
    if len(rows) <= most:
        return list(rows)
    seen: dict[str, int] = {}
    turn = {}
    for i in rng.permutation(len(rows)):
        turn[int(i)] = seen[rows[i].patient] = seen.get(rows[i].patient, -1) + 1
    return [rows[i] for i in sorted(sorted(turn, key=lambda i: turn[i])[:most])]


def _some_of(row: SlideRow, folder: Path, wanted: int, seed: int) -> Path:
    """Write an expression file with `wanted` of a slide's spots, and return its path."""

    assert row.expression is not None
    spots = read_spots(row.expression)
    kept = _patches(spots, wanted, np.random.default_rng([seed, *row.slide_id.encode()]))
    path = folder / f"{row.slide_id}.h5ad"
    with fault_of(ExpressionError, f"{row.expression} cannot be read"), quiet_warnings():
        data = read_h5ad(row.expression)
        part = data[[spots.barcodes[i] for i in kept]].copy()
    write_h5ad(part, path)
    return path


def _patches(spots: Spots, wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the indices of `wanted` spots in patches far apart, sorted; all where there are no more."""
    n = len(spots)
    if n <= wanted:
        return np.arange(n)
    tree = cKDTree(spots.xy)
    centre = int(rng.integers(n))
    away = np.full(n, np.inf)
    kept = np.zeros(n, np.bool_)
    while kept.sum() < wanted:
        more = min(_PATCH, wanted - int(kept.sum()))
        near = np.asarray(tree.query(spots.xy[centre], k=n)[1])
        kept[near[~kept[near]][:more]] = True
        away = np.minimum(away, np.linalg.norm(spots.xy - spots.xy[centre], axis=1))
        centre = int(np.where(kept, -1.0, away).argmax())
    return np.flatnonzero(kept)
