"""Sections as another laboratory might have stained them: stand-ins for slides of another patient.

    python benchmarks/restain.py MANIFEST --out FOLDER [--seed 1]

Writes every slide of the manifest under a stain of its own, haematoxylin, eosin and the rest each gained by 0.6 to 1.4
and shifted by ±0.05, and a manifest beside them. These are other draws, and wider, than those that `embed` learns stain
directions from. Then: nh2st-pipe embed --slides FOLDER/manifest.csv … --store FOLDER/store.zarr
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from PIL import Image

from nh2st_pipe.encoders.stains import stained

STRIP = 512


def main(manifest: Path, out: Annotated[Path, typer.Option()], seed: int = 1) -> None:
    Image.MAX_IMAGE_PIXELS = None
    out.mkdir(parents=True, exist_ok=True)
    rows = pl.read_csv(manifest)
    draw = np.random.default_rng(seed)
    paths = []
    for row in rows.iter_rows(named=True):
        gain, offset = draw.uniform(0.6, 1.4, 3), draw.uniform(-0.05, 0.05, 3)
        pixels = np.array(Image.open(manifest.parent / row["slide"]).convert("RGB"))
        for start in range(0, len(pixels), STRIP):
            pixels[start : start + STRIP] = stained(pixels[start : start + STRIP], gain, offset)
        paths.append(f"{row['slide_id']}.jpg")
        Image.fromarray(pixels).save(out / paths[-1], quality=95)
        print(row["slide_id"], "gain", gain.round(2), "offset", offset.round(3), flush=True)
    columns = [pl.Series("slide", paths)]
    if "expression" in rows.columns:
        found = [str((manifest.parent / path).resolve()) for path in rows["expression"]]
        columns.append(pl.Series("expression", found))
    rows.with_columns(columns).write_csv(out / "manifest.csv")


if __name__ == "__main__":
    typer.run(main)
