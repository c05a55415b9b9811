"""Slides with tissue, and folders of features of them as each tool lays them down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import shapely
import torch
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.quiet import quiet_warnings
from tests.conftest import write_spots

SIDE, MPP, DIM = 32, 0.5, 12  # level-0 px of a tile; µm per px; values
SIZE = (800, 600)


@dataclass(frozen=True)
class Made:
    """One slide's tiles and features."""

    name: str
    corner: NDArray[np.int64]
    features: NDArray[np.float32]
    spots: int

    @property
    def centres(self) -> NDArray[np.float64]:
        return np.asarray(self.corner + SIDE / 2, np.float64)

    @property
    def barcodes(self) -> list[str]:
        return [f"b{i}" for i in range(len(self.corner))]

    def moved(self, corner: Any) -> Made:
        return replace(self, corner=np.asarray(corner))


def slides(folder: Path, n: int = 2, *, expression: bool = True) -> tuple[Path, list[Made]]:
    """Write `n` slides with tissue and a manifest; return that, and tiles laid on the tissue."""
    folder.mkdir(exist_ok=True)
    lines, every = ["slide_id,slide,mpp,patient" + ",expression" * expression], []
    for number in range(n):
        rng = np.random.default_rng(number)
        image = np.full((SIZE[1], SIZE[0], 3), 244, np.uint8)
        tissue = np.zeros(image.shape[:2], bool)
        tissue[64:256, 96:576] = True  # an L that no turn or mirror leaves as it is
        tissue[256:544, 96:224] = True
        image[tissue] = (rng.integers(-25, 25, (tissue.sum(), 3)) + np.array([186, 110, 160])).astype(np.uint8)
        Image.fromarray(image).save(folder / f"case-{number}.png")
        places = [(x, y) for y in range(0, SIZE[1] - SIDE, SIDE) for x in range(0, SIZE[0] - SIDE, SIDE)]
        corner = np.array([(x, y) for x, y in places if tissue[y : y + SIDE, x : x + SIDE].mean() > 0.9])
        features = rng.normal(size=(len(corner), DIM)).astype(np.float32)
        features[:, 0] = corner[:, 0] / 300
        made = Made(f"case-{number}", corner, features, len(corner))
        every.append(made)
        line = f"c{number},case-{number}.png,{MPP},P{number}"
        if expression:
            grid = (made.centres // SIDE)[:, ::-1].astype(np.int64)
            write_spots(folder / f"c{number}.h5ad", made.centres, grid=grid, barcodes=made.barcodes, seed=number)
            line += f",c{number}.h5ad"
        lines.append(line)
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv", every


def _h5(path: Path, **datasets: Any) -> h5py.File:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = h5py.File(path, "w")
    for name, values in datasets.items():
        file[name] = values
    return file


_TRIDENT = {
    "patch_size": 32,
    "patch_size_level0": SIDE,
    "level0_magnification": 20,
    "target_magnification": 10,
    "overlap": 0,
    "level0_width": SIZE[0],
    "level0_height": SIZE[1],
}


def trident(folder: Path, every: list[Made], encoder: str = "our_encoder") -> dict[str, Any]:
    root = folder / "20x_32px_0px_overlap"
    for made in every:
        with _h5(root / f"patches/{made.name}_patches.h5", coords=made.corner) as file:
            file["coords"].attrs.update(_TRIDENT)
        with _h5(root / f"features_{encoder}/{made.name}.h5", coords=made.corner, features=made.features) as file:
            file["coords"].attrs.update(_TRIDENT)
            file["features"].attrs["encoder"] = encoder
        with _h5(root / f"slide_features_titan/{made.name}.h5", features=made.features.mean(0)):
            pass
    return {}


def trident_pt(folder: Path, every: list[Made]) -> dict[str, Any]:
    trident(folder, every)
    for path in (folder / "20x_64px_0px_overlap/features_our_encoder").glob("*.h5"):
        with h5py.File(path) as file:
            torch.save(torch.from_numpy(file["features"][:]), path.with_suffix(".pt"))
        path.unlink()
    return {"layout": "trident"}


def clam(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        with _h5(folder / f"patches/{made.name}.h5", coords=made.corner) as file:
            file["coords"].attrs.update(patch_size=SIDE // 2, patch_level=1, downsample=(2.0, 2.0), name=made.name)
        path = folder / f"features/h5_files/{made.name}.h5"
        _h5(path, coords=made.corner.astype(np.int32), features=made.features).close()
    return {"encoder": "our_encoder", "at": folder / "features"}


def clam_1nd(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        _h5(folder / f"{made.name}.h5", coords=made.corner, features=made.features[None]).close()
    return {"encoder": "our_encoder", "tile_px": SIDE}


def hest(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        barcodes = np.array([[name] for name in made.barcodes], dtype=object)
        order = np.random.default_rng(1).permutation(len(made.corner))  # never by order
        datasets = {"embeddings": made.features[order], "barcodes": barcodes[order], "coords": made.corner[order]}
        _h5(folder / f"IDC/our_encoder/{made.name}.h5", **datasets).close()
    return {"tile_px": SIDE}


def stamp(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        um = (made.corner * MPP).astype(np.float32)
        feats = made.features.astype(np.float16)
        with _h5(folder / f"our_encoder-1a2b3c4d/{made.name}.h5", coords=um, feats=feats) as file:
            said = {"stamp_version": "2.5.0", "extractor": "our_encoder-1a2b3c4d", "unit": "um"}
            file.attrs.update(said | {"tile_size_um": SIDE * MPP, "tile_size_px": 224, "feat_type": "tile"})
    return {}


def atlaspatch(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        rest = np.tile([SIDE, SIDE, 0], (len(made.corner), 1))
        coords = np.hstack((made.corner, rest)).astype(np.int32)
        with _h5(folder / f"patches/{made.name}.h5", coords=coords) as file:
            file["features/our_encoder"] = made.features
            file["features/__tmp_other"] = made.features[:3]
            file.attrs.update(patch_size_level0=SIDE, level0_width=SIZE[0], level0_height=SIZE[1])
    return {}


def slide2vec(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        order = np.lexsort((made.corner[:, 1], made.corner[:, 0]))
        for name in ("tiles", "tile_embeddings"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        x, y = made.corner[order].T
        np.savez(folder / f"tiles/{made.name}.coordinates.npz", x=x, y=y, tile_index=np.arange(len(x), dtype=np.int32))
        torch.save(torch.from_numpy(made.features[order]), folder / f"tile_embeddings/{made.name}.pt")
        meta = {"artifact_type": "tile_embeddings", "encoder_name": "our_encoder", "tile_size_lv0": SIDE}
        (folder / f"tile_embeddings/{made.name}.meta.json").write_text(json.dumps(meta))
    return {}


def tiatoolbox(folder: Path, every: list[Made]) -> dict[str, Any]:
    for made in every:
        root = zarr.open_group(folder / f"{made.name}.zarr", mode="w")
        read = made.corner * MPP / 0.25  # at 0.25 µm per px
        root["features"] = made.features
        root["coordinates"] = np.hstack((read, read + SIDE * MPP / 0.25))
    return {"encoder": "our_encoder", "mpp_read": 0.25}


def gigapath(folder: Path, every: list[Made]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for made in every:
        coords = torch.from_numpy(made.corner.astype(np.float32))
        torch.save({"tile_embeds": torch.from_numpy(made.features), "coords": coords}, folder / f"{made.name}.pt")
    return {"tile_px": SIDE}


def histoencoder(folder: Path, every: list[Made]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for made in every:
        x, y = made.corner.T
        paths = [f"/data/{made.name}/tiles/x{a}_y{b}_w{SIDE}_h{SIDE}.jpeg" for a, b in made.corner]
        side = np.full(len(x), SIDE)
        values = {f"feat{i + 1}": made.features[:, i] for i in range(DIM)}
        tables.append(pl.DataFrame({"path": paths, "x": x, "y": y, "w": side, "h": side, **values}))
    pl.concat(tables).write_parquet(folder / "features.parquet")
    return {"encoder": "our_encoder"}


def lazyslide(folder: Path, every: list[Made]) -> dict[str, Any]:
    import pandas as pd

    for made in every:
        path = folder / f"{made.name}.zarr"
        root = zarr.open_group(path, mode="w")
        spec = {"width": SIDE, "height": SIDE, "mpp": MPP, "base_downsample": 1.0}
        root.attrs.update({"spatialdata_attrs": {"version": "0.1"}, "tile_spec": {"tiles": spec}})
        root.attrs["slide_properties"] = {"shape": [SIZE[1], SIZE[0]], "mpp": MPP}
        x, y = made.corner.T
        boxes = shapely.to_wkb(shapely.box(x, y, x + SIDE, y + SIDE))
        (path / "shapes/tiles").mkdir(parents=True)
        ids = np.arange(len(x))
        pl.DataFrame({"tile_id": ids, "x": x, "y": y, "geometry": list(boxes)}).write_parquet(
            path / "shapes/tiles/shapes.parquet"
        )
        table = root.create_group("tables/our_encoder_tiles")
        table.attrs.update({"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"})
        order = ids[::-1]  # a row belongs to the tile whose id it carries
        table["X"] = made.features[order]
        with quiet_warnings():
            write_elem(table, "obs", pd.DataFrame({"tile_id": order, "library_id": pd.Categorical(["tiles"] * len(x))}))
    return {}


TOOLS: dict[str, Callable[[Path, list[Made]], dict[str, Any]]] = {
    "trident": trident,
    "trident_pt": trident_pt,
    "clam": clam,
    "clam_1nd": clam_1nd,
    "hest": hest,
    "stamp": stamp,
    "atlaspatch": atlaspatch,
    "slide2vec": slide2vec,
    "tiatoolbox": tiatoolbox,
    "gigapath": gigapath,
    "histoencoder": histoencoder,
    "lazyslide": lazyslide,
}
