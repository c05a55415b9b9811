"""What a correlation reaches without any tie: predictions against the same slide's truth, moved away.

Tissue is smooth in space, so the PCC of two unrelated maps is far from 0 by chance, and the more so the smoother they
are. Moving the truth over the slide, as on a torus, with or without a mirror, keeps its structure and breaks the tie to
the prediction; a spot is compared where one lands on a spot. (Toroidal shifts: Fortin & Payette, Ecoscience 2002.)

Letters: n spots, G genes, S moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["FEWEST_SPOTS", "MOVES", "moved_pcc", "moves"]

MOVES = 20
FEWEST_SPOTS = 8
"""Spots below which a slide has no such null."""

_REACH = 0.75  # of a pitch: any place between spots of a square or hexagonal array has one nearer
_APART = 0.25  # of a side: a shorter way without a mirror leaves neighbours on each other
_LANDED = 0.25  # of the spots have to land, for their correlation to have the spread of a slide's
_TRIES = 20
_GENES_AT_ONCE = 256
_FLAT = 1e-6  # as in `metrics`, in single precision


def moves(xy: NDArray[np.float64], seed: int, count: int = MOVES) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield `count` moves of n spots at `xy` (n × 2): the rows that landed, and the rows they landed on.

    Nothing where there are fewer than eight spots, or all lie in one place.
    """
    pitch = pitch_px(xy)
    if len(xy) < FEWEST_SPOTS or pitch <= 0:
        return
    places = (xy - xy.min(axis=0)) / pitch
    box = places.max(axis=0) + 1
    tree, rng = cKDTree(places, boxsize=box), np.random.default_rng(seed)
    for _ in range(count):
        best: tuple[NDArray[Any], NDArray[Any]] | None = None
        for _ in range(_TRIES):
            mirror = rng.integers(2, size=2).astype(bool)
            way = rng.random(2) * box
            if not mirror.any() and (np.minimum(way, box - way) < _APART * box).all():
                continue
            turned = np.where(mirror, box - 1 - places, places)
            near, onto = tree.query((turned + way) % box, distance_upper_bound=_REACH)
            rows = np.flatnonzero(np.isfinite(near))
            if best is None or len(rows) > len(best[0]):
                best = rows, np.asarray(onto)[rows]
            if len(rows) >= _LANDED * len(xy):
                break
        if best is not None and len(best[0]) >= 2:
            yield best


def moved_pcc(
    predicted: NDArray[Any], target: NDArray[Any], xy: NDArray[np.float64], seed: int, count: int = MOVES
) -> NDArray[np.float32]:
    """Return S × G: each gene's PCC (n × G against n × G) with the truth moved in S ways; NaN where it is undefined.

    S is 0 for a slide of fewer than eight spots.
    """
    genes = predicted.shape[1]
    found = [np.empty((0, genes), np.float32)]
    for rows, onto in moves(xy, seed, count):
        of_move = np.empty((1, genes), np.float32)
        for start in range(0, genes, _GENES_AT_ONCE):
            block = slice(start, min(start + _GENES_AT_ONCE, genes))
            p, t = predicted[:, block][rows].astype(np.float32), target[:, block][onto].astype(np.float32)
            says_nothing, varies = _centre(p), ~_centre(t)
            spread = np.sqrt(np.einsum("ng,ng->g", p, p) * np.einsum("ng,ng->g", t, t))
            with np.errstate(invalid="ignore", divide="ignore"):
                pcc = np.where(says_nothing, 0.0, np.einsum("ng,ng->g", p, t) / spread)
            of_move[0, block] = np.where(varies, pcc, np.nan)
        found.append(of_move)
    return np.concatenate(found)


def _centre(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Take the mean off each gene's values n × G, in place; return which of them do not vary."""
    mean = values.mean(axis=0)
    values -= mean
    flat: NDArray[np.bool_] = np.sqrt(np.square(values).mean(axis=0)) <= _FLAT * np.maximum(np.abs(mean), 1)
    return flat
