"""One slide's prediction as every target sees it: tiles on level 0, chosen genes, values, intervals, and trust.

Letters: n tiles, g genes, those that were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, UsageError, fault_of, listed, nearest
from nh2st_pipe.core.h5ad import require_h5
from nh2st_pipe.core.quiet import quiet_warnings

__all__ = ["ImageOf", "PredictionView", "read_view"]

_RANKED_BY = ("half_pcc", "cv_low", "cv_pcc")
_LAYERS = ("low", "high", "spread", "target")
_ENDS = {"low": -1, "high": 1}
_BLOCK_VALUES = 16_000_000
_PART_VALUES = 1_500_000  # with two ends of intervals each, as Python's numbers, 0.2 GB
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ImageOf:
    """The image that a prediction is of."""

    name: str
    """Of its file, without folders."""
    width: int
    """Level-0 px."""
    height: int
    mpp: float | None
    """µm per level-0 px, None where it is not known."""
    tile_px: float
    """Side of a tile, level-0 px."""
    origin: tuple[int, int] | None
    """Where QuPath counts from, level-0 px; None where the store did not keep it."""
    fingerprint: str = ""


@dataclass(frozen=True)
class PredictionView:
    """One slide's prediction; what is chosen of it, and what was left out."""

    file: Path
    slide_id: str
    unit: str
    """What its values are of."""
    image: ImageOf
    about: dict[str, Any]
    """All else that the file says of itself."""
    obs: pd.DataFrame
    """All of the file's tiles."""
    var: pd.DataFrame
    """All of its genes."""
    every_xy: NDArray[np.float64]
    layers: tuple[str, ...]
    """Those of low, high, spread and target that it has."""
    written: tuple[str, ...]
    """Those of them that are in the file; the ends of intervals may be told by var["half_width"] alone."""
    rows: NDArray[np.int64]
    """The tiles that were chosen, by their place in the file."""
    columns: NDArray[np.int64]
    """The genes that were chosen."""
    picture: NDArray[np.uint8] | None = None
    """The slide, made smaller, h × w × 3."""
    scale: float = 1.0
    """Px of the picture per level-0 px."""
    spot_px: float | None = None
    """How wide a spot is drawn, level-0 px."""
    everything: bool = False
    """Whether genes that are not trusted and tiles that are unlike the training tiles are among them: then marked."""
    left_out: tuple[str, ...] = field(default=())
    """In words."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def barcodes(self) -> list[str]:
        """Names of the tiles, n."""
        return [str(name) for name in self.obs.index[self.rows]]

    @cached_property
    def genes(self) -> list[str]:
        """Names of the genes, g."""
        return [str(name) for name in self.var.index[self.columns]]

    @property
    def xy(self) -> NDArray[np.float64]:
        """Centres of the tiles, n × 2, level-0 px."""
        return self.every_xy[self.rows]

    @cached_property
    def trusted(self) -> list[bool | None]:
        """Whether each gene is trusted, None where there was no verdict; g."""
        return list(np.array(_verdicts(self.var), object)[self.columns])

    @cached_property
    def unlike(self) -> NDArray[np.bool_]:
        """Whether each tile is unlike the training tiles, n; none where that is not known."""
        return _unlike(self.obs)[self.rows]

    @property
    def percentile(self) -> NDArray[np.float64] | None:
        """Per cent of the training tiles that lie nearer to others than each tile to them, n; None where not known."""
        if "train_percentile" not in self.obs:
            return None
        return np.asarray(self.obs["train_percentile"], np.float64)[self.rows]

    @cached_property
    def label(self) -> str:
        """What the prediction is, in a line."""
        made = ", ".join(str(self.about[key]) for key in ("recipe", "encoder") if key in self.about)
        return f"{self.unit or 'values without a unit'}; predicted by {made or 'a head that is not named'}"

    @cached_property
    def marked_genes(self) -> list[str]:
        """Names of the genes, those that are not trusted marked, g."""
        known = {True: "", False: " (untrusted)", None: " (not judged)"}
        return [f"{gene}{known[verdict]}" for gene, verdict in zip(self.genes, self.trusted, strict=True)]

    def blocks(self) -> Iterator[slice]:
        """Yield places of genes, a part of them at a time: as many as there is easily memory for."""
        step = max(1, _BLOCK_VALUES // max(1, len(self.obs)))
        for start in range(0, len(self.columns), step):
            yield slice(start, min(start + step, len(self.columns)))

    def parts(self) -> Iterator[slice]:
        """Yield places of tiles, a part of them at a time: as many as there is easily memory for with all genes."""
        step = max(1, _PART_VALUES // max(1, len(self.columns)))
        for start in range(0, len(self.rows), step):
            yield slice(start, min(start + step, len(self.rows)))

    def values(self, layer: str = "", of: slice = slice(None), tiles: slice = slice(None)) -> NDArray[np.float32]:
        """Return n × g values as they were predicted, or of a layer; of some genes, of some `tiles`."""
        columns, rows_of = self.columns[of], self.rows[tiles]
        if layer in _ENDS and layer not in self.written:
            reach = np.asarray(self.var["half_width"], np.float32)[columns]
            return self.values("", of, tiles) + _ENDS[layer] * reach
        name = f"layers/{layer}" if layer else "X"
        with fault_of(RunError, f"the predictions {self.file} cannot be read"), h5py.File(self.file) as data:
            out = np.empty((len(rows_of), len(columns)), np.float32)
            first, last = (int(columns.min()), int(columns.max()) + 1) if len(columns) else (0, 0)
            step = _whole_chunks(data[name], last - first)
            for start in range(0, len(self.obs), step):  # of the file, where chunks begin
                low, high = np.searchsorted(rows_of, (start, start + step))
                if low < high and last:
                    part = data[name][int(rows_of[low]) : int(rows_of[high - 1]) + 1, first:last]
                    out[low:high] = part[rows_of[low:high] - rows_of[low]][:, columns - first]
        return out

    def chosen(
        self, genes: Sequence[str] | None = None, *, most: int | None = None, everything: bool = False
    ) -> PredictionView:
        """Return the view with genes of these names, or as many as a target takes, the likeliest to hold first.

        Genes that are not trusted and tiles that are unlike the training tiles are left out, unless `everything` is
        asked for. Raises UsageError where a gene is not there, RunError where none or no tile is left.
        """
        if not len(self.obs):
            raise RunError(f"{self.file} is a prediction of no tiles: there is nothing to export")
        names = [str(name) for name in self.var.index]
        columns = self._ranked() if genes is None else self._named(genes, names)
        verdicts, words = _verdicts(self.var), list[str]()
        rows = np.arange(len(self.obs))
        if not everything:
            kept = [i for i in columns if verdicts[i]]
            if not kept:
                unjudged = sum(verdicts[i] is None for i in columns)
                raise RunError(
                    f"{self.slide_id}: none of {len(columns):,} genes is trusted ({unjudged:,} were not judged), and "
                    "others are exported with --all alone, marked"
                )
            if len(kept) < len(columns):
                words.append(f"{len(columns) - len(kept):,} of {len(columns):,} genes are not trusted and left out")
            columns, unlike = kept, _unlike(self.obs)
            rows = np.flatnonzero(~unlike)
            if not len(rows):
                raise RunError(
                    f"{self.slide_id}: all of its tiles are unlike the training tiles, and such are exported with "
                    "--all alone, marked"
                )
            if unlike.any():
                words.append(f"{unlike.sum():,} of {len(unlike):,} tiles are unlike the training tiles and left out")
        if genes is None and most is not None and len(columns) > most:
            words.append(
                f"{len(columns) - most:,} more genes are left out, behind the first {most:,} by their PCC between "
                "halves of the training tissue or out of fold; --genes names others"
            )
            columns = columns[:most]
        return replace(
            self, rows=rows, columns=np.array(columns, np.int64), everything=everything, left_out=tuple(words)
        )

    def _ranked(self) -> list[int]:
        by = next((name for name in _RANKED_BY if name in self.var), None)
        if by is None:
            return list(range(len(self.var)))
        rank = np.nan_to_num(np.asarray(self.var[by], np.float64), nan=-2.0)
        return [int(i) for i in np.argsort(-rank, kind="stable")]

    def _named(self, genes: Sequence[str], names: list[str]) -> list[int]:
        place = {name: i for i, name in enumerate(names)}
        strangers = [gene for gene in dict.fromkeys(genes) if gene not in place]
        if strangers:
            raise UsageError(
                f"{self.file} does not hold {listed(f'{gene}{nearest(gene, names)}' for gene in strangers)}"
            )
        return [place[gene] for gene in dict.fromkeys(genes)]


def read_view(file: Path, verdicts: pd.DataFrame | None = None) -> PredictionView:
    """Open a prediction, all of its tiles and genes. `verdicts` are columns of var, by gene, that it lacks: a run's.

    Raises RunError where it cannot be read, or does not say how large its tiles are.
    """
    with fault_of(RunError, f"the predictions {file} cannot be read"):
        require_h5(file, RunError)
        with quiet_warnings(), h5py.File(file) as data:
            obs, var = (read_elem(data[name]) for name in ("obs", "var"))
            uns: dict[str, Any] = read_elem(data["uns"])
            xy = np.asarray(data["obsm/spatial"], np.float64)
            written = tuple(name for name in _LAYERS if f"layers/{name}" in data)
            layers = tuple(name for name in _LAYERS if name in written or (name in _ENDS and "half_width" in var))
            shape = data["X"].shape
        if shape != (len(obs), len(var)) or xy.shape != (len(obs), 2):
            raise RunError(
                f"the predictions {file} are {shape}, and it names {len(obs):,} tiles and {len(var):,} genes"
            )
        about = dict(uns.get("nh2st_pipe", {}))
        said: Any = json.loads(str(about.get("image", "null"))) or {}
        if any(said.get(key) is None for key in ("width", "height", "tile_level0_px")):
            raise RunError(f"{file} does not say how large its tiles are: it is an earlier version's; predict again")
        image = _image_of(said)
    slide_id = str(about.get("slide_id", file.stem))
    section = uns.get("spatial", {}).get(slide_id, {})
    factors = section.get("scalefactors", {})
    picture: Any = section.get("images", {}).get("hires")
    if verdicts is not None:
        for column in verdicts.columns.difference(var.columns):
            var[column] = verdicts[column].reindex(var.index)
    return PredictionView(
        file=file,
        slide_id=slide_id,
        unit=str(about.get("unit", "")),
        image=image,
        about=about,
        obs=obs,
        var=var,
        every_xy=xy,
        layers=layers,
        written=written,
        rows=np.arange(len(obs)),
        columns=np.arange(len(var)),
        picture=None if picture is None else np.asarray(picture, np.uint8),
        scale=float(factors.get("tissue_hires_scalef", 1.0)),
        spot_px=None if "spot_diameter_fullres" not in factors else float(factors["spot_diameter_fullres"]),
    )


def _image_of(said: Mapping[str, Any]) -> ImageOf:
    return ImageOf(
        name=str(said.get("path", "")),
        width=int(said["width"]),
        height=int(said["height"]),
        mpp=None if said.get("mpp") is None else float(said["mpp"]),
        tile_px=float(said["tile_level0_px"]),
        origin=None if said.get("origin") is None else (int(said["origin"][0]), int(said["origin"][1])),
        fingerprint=str(said.get("fingerprint", "")),
    )


def _whole_chunks(values: h5py.Dataset, columns: int) -> int:
    """Return how many rows of a matrix are read at once, of so many columns: so that no chunk is decoded twice."""
    rows = values.chunks[0] if values.chunks else 1
    most = min(_ROWS_AT_ONCE, _BLOCK_VALUES // max(1, columns))
    return int(max(1, most // rows) * rows)


def _verdicts(var: pd.DataFrame) -> list[bool | None]:
    if "trusted" not in var:
        return [None] * len(var)
    judged = var["judged"] if "judged" in var else var["trusted"].notna()
    return [bool(yes) if known else None for yes, known in zip(var["trusted"], judged, strict=True)]


def _unlike(obs: pd.DataFrame) -> NDArray[np.bool_]:
    if "unlike" not in obs:
        return np.zeros(len(obs), np.bool_)
    return np.asarray(obs["unlike"] == "yes", np.bool_)
