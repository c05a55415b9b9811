"""Spots and their counts, read from an AnnData `.h5ad` and checked.

The file holds raw counts in `layers["counts"]` or X, spot centres in `obsm["spatial"]` (full-resolution px,
x then y), barcodes as observation names and genes as variable names; optionally `obs` columns array_row,
array_col and in_tissue, and `uns["spatial"]` with Space Ranger's scale factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, fault_of, listed
from nh2st_pipe.core.h5ad import read_h5ad

__all__ = ["Spots", "read_spots"]


_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "nan", "none", "")


@dataclass(frozen=True)
class Spots:
    """The places on one slide that are embedded, with their counts where they are known.

    `xy` is n × 2, float64, level-0 px, x then y. `counts` is n × g (CSR, raw) beside `genes`, or both None.
    """

    barcodes: list[str]
    xy: NDArray[np.float64]
    array_row: NDArray[np.int64] | None = None
    array_col: NDArray[np.int64] | None = None
    counts: sp.csr_matrix | None = None
    genes: list[str] | None = None
    diameter_px: float | None = None
    """How wide a spot is by `uns["spatial"]`, level-0 px."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Px of smaller images (hires, lowres) per level-0 px, by `uns["spatial"]`."""
    mpp: float | None = None
    """µm per level-0 px by `uns["spatial"]`, where it says so (Visium HD)."""
    notices: tuple[str, ...] = ()
    """How the file is read, where a person would not expect it."""
    doubts: tuple[str, ...] = ()
    """What is unlikely about what it holds."""

    def __len__(self) -> int:
        return len(self.barcodes)

    @property
    def grid(self) -> NDArray[np.int64] | None:
        """n × 2: array_row, array_col; None where they are not known."""
        if self.array_row is None or self.array_col is None:
            return None
        return np.column_stack((self.array_row, self.array_col))

    @property
    def whole_counts(self) -> bool:
        """Whether all counts are whole numbers, as raw ones are."""
        return self.counts is None or not np.any(self.counts.data % 1 != 0)

    def take(self, order: NDArray[np.int64]) -> Spots:
        """Return the spots in another order."""
        return replace(
            self,
            barcodes=[self.barcodes[i] for i in order],
            xy=self.xy[order],
            array_row=None if self.array_row is None else self.array_row[order],
            array_col=None if self.array_col is None else self.array_col[order],
            counts=None if self.counts is None else self.counts[order],
        )


def read_spots(path: Path) -> Spots:
    """Read the spots of `path`; those outside the tissue (in_tissue = 0) are left out, with a notice.

    Raises ExpressionError naming the spot or gene where something cannot be used.
    """
    data = read_h5ad(path)
    with fault_of(ExpressionError, f"{path} cannot be used"):
        return _spots_of(data, path)


def _spots_of(data: anndata.AnnData, path: Path) -> Spots:
    barcodes = [str(name) for name in data.obs_names]
    genes = [str(name) for name in data.var_names]
    for what, seen in (("barcode", barcodes), ("gene", genes)):
        twice = _repeated(seen)
        if twice:
            raise ExpressionError(f"{path}: {what}s must be unique, and these stand twice or more: {listed(twice)}")
    if not barcodes:
        raise ExpressionError(f"{path} holds no spots")

    factors = _scale_factors(data)
    spots = Spots(
        barcodes=barcodes,
        xy=_spot_centres(data, path),
        array_row=_grid_index(data, "array_row", path),
        array_col=_grid_index(data, "array_col", path),
        counts=_raw_counts(data, path),
        genes=genes,
        diameter_px=factors.get("spot_diameter_fullres"),
        scales={key: factors[name] for key in ("hires", "lowres") if (name := f"tissue_{key}_scalef") in factors},
        mpp=factors.get("microns_per_pixel"),
    )
    notices, doubts = [], []
    if not spots.whole_counts:
        doubts.append("counts are not whole numbers: are they already normalised? Raw counts are expected")
    if "in_tissue" in data.obs:
        inside = np.flatnonzero(_in_tissue(data, path))
        if len(inside) == 0:
            raise ExpressionError(f"{path}: obs['in_tissue'] is 0 for every spot, so there is nothing to embed")
        if len(inside) < len(spots):
            notices.append(f"{len(spots) - len(inside)} spots with in_tissue = 0 left out")
            spots = spots.take(inside)
    return replace(spots, notices=tuple(notices), doubts=tuple(doubts))


def _scale_factors(data: anndata.AnnData) -> dict[str, float]:
    """Return Space Ranger's scale factors, those that are positive numbers.

    They stand in `uns["spatial"][<library>]["scalefactors"]`; those of several libraries are no one's, and left.
    """
    libraries = data.uns.get("spatial")
    if not isinstance(libraries, Mapping) or len(libraries) != 1:
        return {}
    (library,) = libraries.values()
    factors = library.get("scalefactors") if isinstance(library, Mapping) else None
    known: dict[str, float] = {}
    for name, value in factors.items() if isinstance(factors, Mapping) else ():
        with suppress(TypeError, ValueError):
            number = float(value)
            if np.isfinite(number) and number > 0:
                known[str(name)] = number
    return known


def _repeated(names: list[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]


def _in_tissue(data: anndata.AnnData, path: Path) -> NDArray[np.bool_]:
    """Return which spots are in the tissue: numbers, booleans, or either of them as text."""
    values = [str(value).strip().lower() for value in data.obs["in_tissue"]]
    strange = [i for i, value in enumerate(values) if value not in _TRUE and value not in _FALSE]
    if strange:
        spot = data.obs_names[strange[0]]
        raise ExpressionError(f"{path}: obs['in_tissue'] of spot {spot} is '{values[strange[0]]}', neither 1 nor 0")
    return np.array([value in _TRUE for value in values])


def _spot_centres(data: anndata.AnnData, path: Path) -> NDArray[np.float64]:
    if "spatial" not in data.obsm:
        have = ", ".join(data.obsm) or "nothing"
        raise ExpressionError(
            f"{path} has no obsm['spatial'] (obsm holds {have}); it should hold each spot's centre as x, y in "
            "full-resolution pixels"
        )
    try:
        xy = np.asarray(data.obsm["spatial"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ExpressionError(
            f"{path}: obsm['spatial'] holds text; it should hold x, y in full-resolution pixels"
        ) from error
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ExpressionError(f"{path}: obsm['spatial'] should be spots × 2 (x, y), and is {xy.shape}")
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(bad):
        named = listed(data.obs_names[i] for i in bad)
        raise ExpressionError(f"{path}: obsm['spatial'] is not a number for {len(bad)} spots: {named}")
    return xy


def _grid_index(data: anndata.AnnData, column: str, path: Path) -> NDArray[np.int64] | None:
    if column not in data.obs:
        return None
    try:
        values = data.obs[column].to_numpy().astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ExpressionError(f"{path}: obs['{column}'] should hold whole numbers") from error
    bad = np.flatnonzero(~np.isfinite(values) | (values % 1 != 0))
    if len(bad):
        spot = data.obs_names[bad[0]]
        raise ExpressionError(f"{path}: obs['{column}'] of spot {spot} is {values[bad[0]]}, not a whole number")
    return np.asarray(values, dtype=np.int64)


def _raw_counts(data: anndata.AnnData, path: Path) -> sp.csr_matrix:
    where, matrix = ("layers['counts']", data.layers["counts"]) if "counts" in data.layers else ("X", data.X)
    if matrix is None:
        raise ExpressionError(f"{path} holds no counts, neither in layers['counts'] nor in X")
    counts = sp.csr_matrix(matrix)
    counts.sum_duplicates()
    if not np.issubdtype(counts.dtype, np.number):
        raise ExpressionError(f"{path}: {where} holds what is no number")
    for what, bad in (("not a number", ~np.isfinite(counts.data)), ("negative", counts.data < 0)):
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(counts.indptr, first, side="right")) - 1
            spot, gene = data.obs_names[row], data.var_names[counts.indices[first]]
            raise ExpressionError(
                f"{path}: {where} is {what} in {int(bad.sum())} places, the first at spot {spot}, gene {gene}; "
                "raw counts are expected"
            )
    return counts
