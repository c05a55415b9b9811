"""her2st: HER2+ breast cancer sections of Andersson et al. 2021 (almaan/her2st, Zenodo 3957257).

    ST-imgs/<patient>/<section>/*.jpg     H&E, full resolution
    ST-cnts/<section>.tsv.gz              spots × genes, row names "XxY"
    ST-spotfiles/<section>_selection.tsv  x, y, new_x, new_y, pixel_x, pixel_y, selected

The spots kept are those in both files, joined by "XxY". x counts columns and pixel_x runs along the image's
width. The images carry no resolution; it is estimated from the array, whose pitch is 200 µm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.datasets.common import files_of, write_section
from nh2st_pipe.tiles.lattice import SPOT_PITCH_UM, array_pitch_px
from nh2st_pipe.tiles.manifest import SlideRow

__all__ = ["import_her2st"]

_IMAGES = {".jpg", ".jpeg", ".tif", ".tiff", ".png"}
_SPOT_COLUMNS = ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y")


def import_her2st(folder: Path, expression_dir: Path, say: Callable[[str], None]) -> list[SlideRow]:
    """Turn `folder` into one `.h5ad` per section under `expression_dir`, and return the manifest's rows.

    Raises ExpressionError naming the file that is missing or does not hold what it should.
    """
    count_files: dict[str, Path] = {}
    for count_file in files_of(folder, "ST-cnts/*.tsv.gz") + files_of(folder, "ST-cnts/*.tsv"):
        first = count_files.setdefault(count_file.name.split(".")[0], count_file)
        if first is not count_file:
            say(f"{count_file.name} is passed over: {first.name} is the same section, as published")
    if not count_files:
        raise ExpressionError(
            f"{folder} is not a her2st folder: there is no ST-cnts/<section>.tsv.gz in it (expected ST-imgs/, "
            "ST-cnts/ and ST-spotfiles/)"
        )
    rows = []
    for section, count_file in sorted(count_files.items()):
        image = _image(folder, section)
        patient = image.parent.parent.name if image.parent.name == section else section[0]
        target = expression_dir / f"{section}.h5ad"
        n_spots, n_dropped, mpp = _section(folder, section, count_file, target)
        dropped = f", {n_dropped} in only one of the two files left out" if n_dropped else ""
        say(f"{section}: {n_spots} spots{dropped}; {mpp:.4f} µm per px estimated from the 200 µm pitch")
        rows.append(SlideRow(section, image.resolve(), target.resolve(), patient, mpp))
    return rows


def _image(folder: Path, section: str) -> Path:
    found = [path for path in files_of(folder, f"ST-imgs/*/{section}/*") if path.suffix.lower() in _IMAGES]
    if len(found) != 1:
        what = "no image" if not found else f"{len(found)} images"
        raise ExpressionError(f"{what} in {folder}/ST-imgs/*/{section}/ for section {section}; one is expected")
    return found[0]


def _section(folder: Path, section: str, count_file: Path, target: Path) -> tuple[int, int, float]:
    spot_file = folder / "ST-spotfiles" / f"{section}_selection.tsv"
    if not spot_file.is_file():
        raise ExpressionError(f"{spot_file} is missing; {count_file.name} has no positions without it")
    places = _table(spot_file)
    missing = [name for name in _SPOT_COLUMNS if name not in places.columns]
    if missing:
        raise ExpressionError(f"{spot_file} lacks the columns {', '.join(missing)}")
    places = places.with_columns(pl.format("{}x{}", "x", "y").alias("barcode"))
    counts = _table(count_file)
    counts = counts.rename({counts.columns[0]: "barcode"})
    for table, file in ((places, spot_file), (counts, count_file)):
        if table["barcode"].is_duplicated().any():
            first = table.filter(pl.col("barcode").is_duplicated())["barcode"][0]
            raise ExpressionError(f"{file}: the spot {first} stands in more than one row")
    # Joined by name, checked from both sides; the order is the count file's.
    both = counts.select("barcode").join(places, on="barcode", how="inner", maintain_order="left")
    if both.height == 0:
        raise ExpressionError(f"{count_file} and {spot_file} have no spot in common")
    matrix = both.select("barcode").join(counts, on="barcode", how="left", maintain_order="left").drop("barcode")
    dropped = counts.height + places.height - 2 * both.height

    xy = both.select("pixel_x", "pixel_y").to_numpy().astype(np.float64)
    pitch = array_pitch_px(xy, both.select("new_x", "new_y").to_numpy().astype(np.float64))
    if pitch is None:
        raise ExpressionError(f"{spot_file}: pixel_x, pixel_y and new_x, new_y are not those of one square array")
    mpp = SPOT_PITCH_UM["square"] / pitch
    write_section(
        target,
        counts=sp.csr_matrix(matrix.to_numpy().astype(np.float32)),
        barcodes=both["barcode"].to_list(),
        genes=matrix.columns,
        xy_level0_px=xy,
        array_row=both["y"].to_numpy().astype(np.int64),
        array_col=both["x"].to_numpy().astype(np.int64),
        uns={"source": "her2st (Andersson et al. 2021)", "mpp": mpp, "mpp_source": "200 µm array pitch"},
    )
    return both.height, dropped, mpp


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(path.read_bytes(), separator="\t", infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{path} is not a readable table: {str(error).splitlines()[0]}") from error
