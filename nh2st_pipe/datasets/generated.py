"""Small folders in the layouts of published datasets: tissue wider than high, so that a transposed reading shows.

What `nh2st-pipe demo --layout NAME` runs on, and what the importers are tested with.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse as sp
import shapely
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nh2st_pipe.core.errors import UsageError, nearest

__all__ = [
    "GENES",
    "SECTIONS",
    "Tissue",
    "generate_layout",
    "hest",
    "hest_bench",
    "original",
    "repackaged",
    "spared",
    "spatialdata",
    "stimage",
    "visium",
    "xenium",
]

GENES = [f"G{i}" for i in range(12)]
PITCH = 40


@dataclass
class Tissue:
    """Spots of a lattice of 12 columns and 5 rows in the upper left of an image, on tissue.

    A square one, or Visium's: `hexagonal`, its columns counted in twos.
    """

    seed: int
    hexagonal: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows, cols = np.mgrid[1:6, 1:13]
        self.row, self.col = rows.ravel(), cols.ravel()
        self.xy = np.column_stack((self.col, self.row)) * float(PITCH)
        if self.hexagonal:
            odd = self.row % 2
            self.xy = np.column_stack((self.xy[:, 0] + odd * PITCH / 2, self.xy[:, 1] * np.sqrt(3) / 2))
            self.col = 2 * self.col + odd
        self.shade = rng.uniform(0.3, 1.0, len(self.xy))
        with_shade = np.arange(len(GENES)) % 2 == 0  # the others fall where it rises
        rate = np.where(with_shade, self.shade[:, None], 1.3 - self.shade[:, None])
        self.counts: NDArray[np.int64] = rng.poisson(30 * rate)

    def __len__(self) -> int:
        return len(self.xy)

    def draw(self, path: Path) -> None:
        """Write the image."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.drawn().save(path)

    def drawn(self) -> Image.Image:
        """Return the image, 800 × 320 px: tissue under the spots and nowhere else."""
        image = Image.new("RGB", (800, 320), (245, 244, 246))
        pen = ImageDraw.Draw(image)
        for (x, y), shade in zip(self.xy, self.shade, strict=True):
            colour = (int(215 - 60 * shade), int(130 - 60 * shade), int(185 - 30 * shade))
            pen.rectangle((x - 20, y - 20, x + 20, y + 20), fill=colour)
        return image


def _frame(tissue: Tissue, names: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"": names, **{gene: tissue.counts[:, i] for i, gene in enumerate(GENES)}})


def repackaged(folder: Path, names: list[str], ending: str) -> Path:
    """TRIPLEX's repackaging of STNet (.tif) and of skin (.jpg)."""
    for number, name in enumerate(names):
        tissue = Tissue(number)
        tissue.draw(folder / f"ST-imgs/{name}{ending}")
        spots = [f"{x}x{y}" for x, y in zip(tissue.col, tissue.row, strict=True)]
        for place in ("ST-cnts", "ST-spotfiles"):
            (folder / place).mkdir(exist_ok=True)
        frame = _frame(tissue, spots).rename({"": "__index_level_0__"})
        frame.select(pl.exclude("__index_level_0__"), "__index_level_0__").write_parquet(
            folder / f"ST-cnts/{name}_sub.parquet"
        )
        lines = [
            f"{x + 0.02}\t{y - 0.03}\t{px}\t{py}"
            for x, y, (px, py) in zip(tissue.col, tissue.row, tissue.xy, strict=True)
        ]
        (folder / f"ST-spotfiles/{name}_selection.tsv").write_text(
            "\n".join(["x\ty\tpixel_x\tpixel_y", *reversed(lines), "40\t40\t5\t5"]) + "\n"
        )
    return folder


def original(folder: Path, names: list[str], *, skin: bool = False) -> Path:
    """STNet or, with `skin`, cSCC, as their authors published them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        tissue, of = Tissue(number), f"GSM42843{number:02d}_" if skin else ""
        tissue.draw(folder / (f"{of}{name}.jpg" if skin else f"HE_{name}.jpg"))
        spots = [f"{x}x{y}" for x, y in zip(tissue.col, tissue.row, strict=True)]
        counts = _frame(tissue, spots).write_csv(separator="\t")
        (folder / f"{of}{name}_stdata.tsv.gz").write_bytes(gzip.compress(counts.encode()))
        places = zip(spots, tissue.col, tissue.row, tissue.xy, strict=True)
        if skin:
            rows = [f"{x}\t{y}\t{x + 0.02}\t{y}\t{px}\t{py}" for _, x, y, (px, py) in places]
            words = "\n".join(["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y", *reversed(rows)])
            (folder / f"{of}spot_data-selection-{name}.tsv.gz").write_bytes(gzip.compress(words.encode()))
        else:
            words = "\n".join([",X,Y", *reversed([f"{spot},{px},{py}" for spot, _, _, (px, py) in places])])
            (folder / f"spots_{name}.csv.gz").write_bytes(gzip.compress(words.encode()))
    return folder


def stimage(folder: Path, names: list[str], *, floats: bool = False) -> Path:
    """STimage-1K4M; with `floats` as in PCW and Mouse."""
    for number, name in enumerate(names):
        tissue = Tissue(number)
        tissue.draw(folder / f"image/{name}.png")
        off = 0.02 if floats else 0
        spots = [f"{name}_{x + off}x{y + off}" for x, y in zip(tissue.col, tissue.row, strict=True)]
        for place in ("gene_exp", "coord"):
            (folder / place).mkdir(exist_ok=True)
        _frame(tissue, spots).write_csv(folder / f"gene_exp/{name}_count.csv")
        table = pl.DataFrame({"": spots, "yaxis": tissue.xy[:, 1], "xaxis": tissue.xy[:, 0], "r": 15.0})
        table.reverse().write_csv(folder / f"coord/{name}_coord.csv")
    return folder


def hest(folder: Path, names: list[str], *, organ: str = "Breast", table: bool = False) -> Path:
    """HEST-1k: the pixel row first, as in its own files; patches for all spots but the first two."""
    about = []
    for number, name in enumerate(names):
        tissue = Tissue(number)
        tissue.draw(folder / f"wsis/{name}.tif")
        barcodes = [f"{i:03d}x{number:03d}" for i in range(len(tissue))]
        obs = pd.DataFrame(
            {
                "in_tissue": 1,
                "array_row": tissue.row,
                "array_col": tissue.col,
                "pxl_row_in_fullres": tissue.xy[:, 1],
                "pxl_col_in_fullres": tissue.xy[:, 0],
            },
            index=barcodes,
        )
        data = anndata.AnnData(sp.csr_matrix(tissue.counts.astype(np.float32)), obs, pd.DataFrame(index=GENES))
        data.obsm["spatial"] = tissue.xy
        for place in ("st", "metadata", "patches"):
            (folder / place).mkdir(exist_ok=True)
        data.write_h5ad(folder / f"st/{name}.h5ad")
        known = {"id": name, "patient": f"Patient {number // 2}", "organ": organ, "species": "Homo sapiens"}
        known |= {"st_technology": "Visium", "pixel_size_um_estimated": 2.5}  # type: ignore[dict-item]
        about.append(known)
        (folder / f"metadata/{name}.json").write_text(json.dumps(known))
        with h5py.File(folder / f"patches/{name}.h5", "w") as file:
            file["barcode"] = np.array(barcodes[2:], "S")[:, None]
            file["coords"] = tissue.xy[2:]
    if table:
        pl.DataFrame(about).write_csv(folder / "HEST_v1_1_0.csv")
    return folder


def hest_bench(folder: Path, task: str, splits: list[tuple[list[str], list[str]]], genes: list[str]) -> Path:
    """A task of HEST-Benchmark: patches of overlapping squares, in an order of their own, and two spots without one."""
    place, side, rng = folder / task, 52, np.random.default_rng(len(task))
    for part in ("patches", "adata", "splits"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(sorted({name for split in splits for names in split for name in names})):
        tissue = Tissue(number)
        tissue.draw(place / f"{name}.tif")
        pixels = np.pad(np.array(Image.open(place / f"{name}.tif")), ((side, side), (side, side), (0, 0)), "edge")
        (place / f"{name}.tif").unlink()  # no slide is part of it
        barcodes = np.array([f"{i:03d}x{number:03d}" for i in range(len(tissue))])
        obs = pd.DataFrame({"array_row": tissue.row, "array_col": tissue.col}, index=barcodes)
        data = anndata.AnnData(sp.csr_matrix(tissue.counts.astype(np.float32)), obs, pd.DataFrame(index=GENES))
        data.obsm["spatial"] = tissue.xy
        data.write_h5ad(place / f"adata/{name}.h5ad")
        order = rng.permutation(np.arange(2, len(tissue)))
        corner = (tissue.xy[order] - side / 2).astype(np.int64)
        squares = [pixels[y + side : y + 2 * side, x + side : x + 2 * side] for x, y in corner]
        with h5py.File(place / f"patches/{name}.h5", "w") as file:
            file["img"] = np.stack([np.asarray(Image.fromarray(each).resize((224, 224))) for each in squares])
            file["img"].attrs["patch_size_src"] = side
            file["coords"], file["barcode"] = corner, barcodes[order].astype("S")[:, None]
    for number, (train, test) in enumerate(splits):
        for side_of, names in (("train", train), ("test", test)):
            rows = "".join(f"{name},patches/{name}.h5,adata/{name}.h5ad\n" for name in names)
            (place / f"splits/{side_of}_{number}.csv").write_text(f"sample_id,patches_path,expr_path\n{rows}")
    (place / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    return folder


def spared(folder: Path, names: list[str]) -> Path:
    """SpaRED: one AnnData of several slides, patches of 16 px (their spots' diameter) as 224 px."""
    parts, side = [], 16
    for number, name in enumerate(names):
        tissue = Tissue(number)
        image = tissue.drawn()
        crops = [image.crop((int(x) - 8, int(y) - 8, int(x) + 8, int(y) + 8)).resize((224, 224)) for x, y in tissue.xy]
        obs = pd.DataFrame(
            {
                "slide_id": name,
                "split": ("train", "train", "test")[number % 3],
                "patient": f"P{number}",
                "array_row": tissue.row,
                "array_col": tissue.col,
            },
            index=[f"{i}-{name}" for i in range(len(tissue))],
        )
        var = pd.DataFrame({"gene_symbol": GENES}, index=[f"ENSG{i:011d}" for i in range(len(GENES))])
        data = anndata.AnnData(sp.csr_matrix(tissue.counts.astype(np.float32)), obs, var)
        data.obsm["spatial"] = tissue.xy.astype(np.int64)
        data.obsm["patches_scale_1.0"] = np.stack([np.asarray(crop).ravel() for crop in crops])
        parts.append(data)
    every = anndata.concat(parts, merge="same")
    every.obs["slide_id"] = every.obs["slide_id"].astype("category")
    every.uns["spatial"] = {name: {"scalefactors": {"spot_diameter_fullres": float(side) + 0.4}} for name in names}
    (folder / "a_dataset/2024").mkdir(parents=True)
    every.write_h5ad(folder / "a_dataset/2024/adata.h5ad")
    return folder


def _way(kind: str, values: Any, axes: str) -> Any:
    """One of NGFF's transformations, as SpatialData writes them."""
    named = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in axes]
    return {"type": kind, kind: values, "input": {"axes": named}, "output": {"name": "global", "axes": named}}


def spatialdata(folder: Path, names: list[str], *, version: Literal[2, 3] = 3) -> Path:
    """SpatialData 0.7, as its library wrote the same: the world is half a px, moved; shapes lie turned in it."""
    for number, name in enumerate(names):
        tissue = Tissue(number)
        root = zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=version)
        pixels = np.asarray(tissue.drawn()).transpose(2, 0, 1)
        steps = [_way("scale", [1.0, 0.5, 0.5], "cyx"), _way("translation", [0.0, 20.0, 10.0], "cyx")]
        into = {"type": "sequence", "transformations": steps, "output": {"name": "global"}}
        for image, values, way in (
            ("a_low", pixels[:, ::4, ::4], _way("scale", [1.0, 2.0, 2.0], "cyx")),
            ("full", pixels, into),
        ):
            group = root.create_group(f"images/{image}")
            chunks = tuple(min(side, 128) for side in values.shape)
            array = group.create_array("s0", shape=values.shape, dtype=np.uint8, chunks=chunks)
            array[:] = values
            scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
            axes: Any = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in "cyx"]
            multiscales = [
                {
                    "axes": axes,
                    "datasets": [{"path": "s0", "coordinateTransformations": scale}],
                    "coordinateTransformations": [way],
                }
            ]
            group.attrs.update({"ome": {"multiscales": multiscales}} if version == 3 else {"multiscales": multiscales})
        place = (tissue.xy * 0.5 + (10, 20))[:, ::-1] / 4
        shapes = root.create_group("shapes/spots")
        shapes.attrs["coordinateTransformations"] = [_way("affine", [[0.0, 4.0, 0.0], [4.0, 0.0, 0.0]], "xy")]
        ids = [f"spot{i}" for i in range(len(tissue))]
        table = pl.DataFrame(
            {"geometry": shapely.to_wkb(shapely.points(place)), "radius": 5.0, "__index_level_0__": ids}
        )
        table.reverse().write_parquet(folder / f"{name}.zarr/shapes/spots/shapes.parquet")
        obs = pd.DataFrame(
            {"region": "spots", "spot_id": ids, "array_row": tissue.row, "array_col": tissue.col},
            index=[f"AC{i}-1" for i in range(len(tissue))],
        )
        data = anndata.AnnData(sp.csr_matrix(tissue.counts.astype(np.float32)), obs, pd.DataFrame(index=GENES))
        data.uns["spatialdata_attrs"] = {"region": "spots", "region_key": "region", "instance_key": "spot_id"}
        with anndata.settings.override(auto_shard_zarr_v3=False):
            write_elem(root, "tables/table", data)
    return folder


def xenium(folder: Path, name: str = "A1", *, turned: bool = False, cells: bool = True, seed: int = 0) -> Path:
    """Xenium: transcripts and cells of squares of 100 µm; the H&E image as it is, or turned by a quarter."""
    tissue, section = Tissue(seed), folder / name
    outs = section / "outs"
    outs.mkdir(parents=True)
    picture = tissue.drawn()
    # Spots are 40 px apart, and to be 100 µm: 2.5 µm a px, with the origin half a square before the first.
    size = 0.2125
    to_um = np.array([[2.5, 0, -50.0], [0, 2.5, -50.0], [0, 0, 1]])
    if turned:  # x of the turned image is the old height less y, y is the old x
        picture = picture.transpose(Image.Transpose.ROTATE_270)
        to_um = to_um @ np.array([[0, 1.0, 0], [-1.0, 0, 320], [0, 0, 1]])
    picture.save(section / f"{name}_he_image.tif")
    to_morphology = np.diag([1 / size, 1 / size, 1]) @ to_um
    np.savetxt(section / f"{name}_he_imagealignment.csv", to_morphology, delimiter=",")
    (outs / "experiment.xenium").write_text(json.dumps({"pixel_size": size}))
    rng = np.random.default_rng(0)
    spot, gene = (np.repeat(axis.ravel(), tissue.counts.ravel()) for axis in np.indices(tissue.counts.shape))
    where = rng.uniform(1, 99, (len(spot), 2)) + np.column_stack((tissue.col[spot], tissue.row[spot])) * 100 - 100
    table = pl.DataFrame(
        {
            "feature_name": [GENES[i] for i in gene] + ["NegControlProbe_1", "BLANK_7", GENES[0]],
            "x_location": [*where[:, 0], 5.0, 5.0, 5.0],
            "y_location": [*where[:, 1], 5.0, 5.0, 5.0],
            "qv": [40.0] * len(gene) + [40.0, 40.0, 12.0],
        }
    )
    table.sample(fraction=1, shuffle=True, seed=0).write_parquet(outs / "transcripts.parquet")
    if cells:  # two of each spot, that share its counts
        half = rng.binomial(tissue.counts, 0.4)
        counts = sp.csr_matrix(
            np.column_stack((np.concatenate((half, tissue.counts - half)), np.ones(2 * len(tissue))))
        )
        ids = [f"cell{i}-1" for i in range(2 * len(tissue))]
        centre = np.column_stack((tissue.col, tissue.row)) * 100 - 100
        centres = np.concatenate((centre + 20, centre + 70))
        frame = pl.DataFrame({"cell_id": ids, "x_centroid": centres[:, 0], "y_centroid": centres[:, 1]})
        frame.reverse().write_parquet(outs / "cells.parquet")
        with h5py.File(outs / "cell_feature_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            for key, values in (("data", counts.data), ("indices", counts.indices), ("indptr", counts.indptr)):
                group[key] = values
            group["shape"] = [len(GENES) + 1, len(ids)]
            group["barcodes"] = np.array(ids, "S")
            group["features/name"] = group["features/id"] = np.array([*GENES, "NegControlCodeword_1"], "S")
    return folder


def visium(folder: Path, name: str = "A1", *, version: int = 3, bin_um: int | None = None) -> Path:
    """Space Ranger's outs/ of versions 1 (mtx, no header), 2 (HDF5 of a genome), 3 (HDF5), and HD at a bin."""
    tissue = Tissue(version, hexagonal=bin_um is None)
    section = folder / name
    tissue.draw(section / "he.tif")
    place = section / "outs" / (f"binned_outputs/square_{bin_um:03d}um" if bin_um else "")
    (place / "spatial").mkdir(parents=True, exist_ok=True)
    barcodes = [f"AC{i:04d}-1" for i in range(len(tissue))]
    ids = [f"ENSG{i:011d}" for i in range(len(GENES))]
    by_spot = sp.csr_matrix(tissue.counts)
    if version == 1:
        from scipy.io import mmwrite

        matrix = place / "filtered_feature_bc_matrix"
        matrix.mkdir()
        mmwrite(matrix / "matrix.mtx", by_spot.T.tocoo())
        (matrix / "matrix.mtx.gz").write_bytes(gzip.compress((matrix / "matrix.mtx").read_bytes()))
        (matrix / "matrix.mtx").unlink()
        (matrix / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(barcodes).encode()))
        features = [f"{i}\t{gene}\tGene Expression" for i, gene in zip(ids, GENES, strict=True)]
        (matrix / "features.tsv.gz").write_bytes(gzip.compress("\n".join(features).encode()))
    else:
        with h5py.File(place / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix" if version >= 3 else "GRCh38")
            for key, values in (("data", by_spot.data), ("indices", by_spot.indices), ("indptr", by_spot.indptr)):
                group[key] = values
            group["shape"] = [len(GENES), len(tissue)]
            group["barcodes"] = np.array(barcodes, "S")
            names, own = ("features/name", "features/id") if version >= 3 else ("gene_names", "genes")
            group[names], group[own] = np.array(GENES, "S"), np.array(ids, "S")
    table = pl.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": [int(i != 7) for i in range(len(tissue))],
            "array_row": tissue.row,
            "array_col": tissue.col,
            "pxl_row_in_fullres": tissue.xy[:, 1],
            "pxl_col_in_fullres": tissue.xy[:, 0],
        }
    ).reverse()
    if bin_um:
        table.write_parquet(place / "spatial/tissue_positions.parquet")
    elif version == 1:
        table.write_csv(place / "spatial/tissue_positions_list.csv", include_header=False)
    else:
        table.write_csv(place / "spatial/tissue_positions.csv")
    scales: dict[str, float] = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 20.0}
    (place / "spatial/scalefactors_json.json").write_text(
        json.dumps({**scales, "microns_per_pixel": 0.4} if bin_um else scales)
    )
    return folder


def her2st(folder: Path, names: list[str]) -> Path:
    """her2st, as its authors published it."""
    for number, name in enumerate(names):
        tissue = Tissue(number)
        tissue.draw(folder / f"ST-imgs/{name[0]}/{name}/section.jpg")
        spots = [f"{x}x{y}" for x, y in zip(tissue.col, tissue.row, strict=True)]
        for place in ("ST-cnts", "ST-spotfiles"):
            (folder / place).mkdir(exist_ok=True)
        counts = _frame(tissue, spots).write_csv(separator="\t")
        (folder / f"ST-cnts/{name}.tsv.gz").write_bytes(gzip.compress(counts.encode()))
        places = zip(tissue.col, tissue.row, tissue.xy, strict=True)
        lines = [f"{x}\t{y}\t{x + 0.01}\t{y}\t{px}\t{py}\t1" for x, y, (px, py) in places]
        (folder / f"ST-spotfiles/{name}_selection.tsv").write_text(
            "\n".join(["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected", *lines]) + "\n"
        )
    return folder


SECTIONS: dict[str, Callable[[Path], Path]] = {
    "her2st": lambda folder: her2st(folder, ["A1", "B1", "C1"]),
    "stnet": lambda folder: original(folder, ["BC23209_C1", "BC23209_C2", "BC23270_D1"]),
    "skin": lambda folder: original(folder, ["P2_ST_rep1", "P5_ST_rep1", "P9_ST_rep2"], skin=True),
    "stimage": lambda folder: stimage(folder, ["Human_Heart_A", "Human_Heart_B", "Human_Heart_C"]),
    "hest": lambda folder: hest(folder, ["INT1", "INT2", "INT3"]),
    "hest-bench": lambda folder: hest_bench(folder, "IDC", [(["A", "B"], ["C"]), (["B", "C"], ["A"])], GENES[:8]),
    "spared": lambda folder: spared(folder, ["A_1", "B_1", "C_1"]),
    "spatialdata": lambda folder: spatialdata(folder, ["A", "B", "C"]),
    "visium": lambda folder: visium(visium(visium(folder, "A1"), "B1", version=1), "C1", version=2),
    "xenium": lambda folder: xenium(xenium(xenium(folder, "A1"), "B1", turned=True, seed=1), "C1", seed=2),
}
"""Layout, as `nh2st-pipe manifest` calls it → three sections of it."""


def generate_layout(layout: str, folder: Path) -> Path:
    """Write three small sections in a published layout. Raises UsageError where it is not known."""
    if layout not in SECTIONS:
        raise UsageError(f"no layout is called '{layout}'{nearest(layout, SECTIONS)} (there is {', '.join(SECTIONS)})")
    return SECTIONS[layout](folder)
