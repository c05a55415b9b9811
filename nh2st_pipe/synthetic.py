"""Generated slides whose expression follows a known rule: something to try everything on, and to test against.

Every slide has three smooth random fields, each of mean 0 and spread 1 over its spots, that change from one
spot to the next but one. They are drawn into the image and they decide the expression:

    a   how densely nuclei lie
    b   the colour of the stroma, pale to pink
    c   the size of the nuclei

f[s] is the mean of (a, b, c) over the tile of spot s, and m[s] the mean of f over the up to eight spots around
s on the grid, without s itself. Sixty genes in three groups, the same on every slide:

    LOCAL01..20   rate[s, g] = exp(base[g] + weight[g] · f[s])     the tile itself shows it
    NEIGH01..20   rate[s, g] = exp(base[g] + weight[g] · m[s])     only the tiles around it show it
    NOISE01..20   rate[s, g] = exp(base[g])                        nothing shows it

Beside them 940 genes OTHER001..940 that nothing shows either: the rest of a transcriptome, so that the sixty are a
small part of a spot's counts. Scaled over the sixty alone the NOISE genes would follow the image, as what the others
leave.

Counts are Poisson(depth[s] · rate[s, g]), with a depth per spot that the image does not show. f and m are
correlated (about 0.65), as they are in tissue. Targets that are smoothed over the grid (`smooth: grid8`) mix the
groups: a smoothed LOCAL gene depends on the neighbours too.

The `.h5ad` of each slide keeps the truth in uns: expected_rate n × 60 (before depth), fields n × 3 (f), depth n,
log_base 60 and weights 60 × 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.datasets.common import Section, write_section
from nh2st_pipe.tiles.manifest import SlideRow, write_manifest

__all__ = ["GENES", "OTHERS", "generate", "neighbour_mean"]

PITCH_PX = 224
"""Distance of spots and side of a tile, level-0 px."""
MPP = 0.5
GENES = [f"{group}{i:02d}" for group in ("LOCAL", "NEIGH", "NOISE") for i in range(1, 21)]
OTHERS = [f"OTHER{i:03d}" for i in range(1, 941)]

_LEVELS = 3
_CELLS = 4  # lattice cells of a field per spot pitch
_SMOOTH_CELLS = 2.0  # half a pitch: spots next to each other correlate at about 0.5
_NEIGHBOUR_GAIN = 1.8  # the mean of eight varies less than one; this makes up for it
_NUCLEUS_STEP_PX = 17  # nuclei sit on a shaken grid, so that few overlap
_CORNERS = 12  # of the polygon that stands for a nucleus


def generate(folder: Path, *, n_slides: int = 4, grid: int = 12, seed: int = 0) -> Path:
    """Write `n_slides` slides (pyramidal TIFF at 0.5 µm per px) with grid × grid spots each, and their manifest.

    Spots are 224 px (112 µm) apart, the first centre at 224 px; a slide is (grid + 1) · 224 px a side. Slides
    are called demo-1, demo-2, …, each of a patient of its own. The same arguments give the same arrays. Returns
    the path of manifest.csv.

    Raises UsageError where there would be nothing to write.
    """
    if n_slides < 1 or grid < 2:
        raise UsageError(f"a demo takes at least 1 slide and a grid of 2, not {n_slides} and {grid}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log_base, weights = _gene_rule(np.random.default_rng([seed, 0]))
    rows = []
    for number in range(1, n_slides + 1):
        row = SlideRow(
            slide_id=f"demo-{number}",
            slide=folder / f"demo-{number}.tif",
            expression=folder / f"demo-{number}.h5ad",
            patient=f"demo-{number}",
        )
        rng = np.random.default_rng([seed, number])
        lattice = _lattice(rng, grid)
        _write_pyramid(row.slide, _paint(rng, lattice))
        _write_expression(row, rng, _on_spots(lattice), log_base, weights)
        rows.append(row)
    manifest = folder / "manifest.csv"
    write_manifest(rows, manifest)
    return manifest


def neighbour_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the up to eight grid neighbours of each spot, itself left out; rows × columns × F."""
    rows, columns, _ = values.shape
    total = np.zeros_like(values)
    count = np.zeros((rows, columns, 1))
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    inside = np.pad(np.ones_like(count), ((1, 1), (1, 1), (0, 0)))
    for down in range(3):
        for right in range(3):
            if (down, right) != (1, 1):
                total += padded[down : down + rows, right : right + columns]
                count += inside[down : down + rows, right : right + columns]
    return np.asarray(total / count)


def _gene_rule(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log_base (60) and weights (60 × 3); the weights of LOCAL have length 0.5, in any direction."""
    log_base = rng.uniform(np.log(5), np.log(60), len(GENES))
    weights = rng.normal(size=(len(GENES), 3))
    weights *= 0.5 / np.linalg.norm(weights, axis=1, keepdims=True)
    weights[20:40] *= _NEIGHBOUR_GAIN
    weights[40:] = 0.0
    return log_base, weights


def _lattice(rng: np.random.Generator, grid: int) -> NDArray[np.float64]:
    """Return the fields on a lattice of 4 cells per pitch over the whole slide: cells × cells × 3.

    The spots' tiles begin half a pitch from the border. Over the spots each field has mean 0 and spread 1.
    """
    side = (grid + 1) * _CELLS
    noise = rng.normal(size=(side, side, 3))
    lattice = gaussian_filter(noise, (_SMOOTH_CELLS, _SMOOTH_CELLS, 0), mode="reflect")
    spots = _on_spots(lattice)
    return np.asarray((lattice - spots.mean(axis=(0, 1))) / spots.std(axis=(0, 1)))


def _on_spots(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each field over every spot's tile: grid × grid × 3."""
    margin = _CELLS // 2
    inner = lattice[margin:-margin, margin:-margin]
    grid = inner.shape[0] // _CELLS
    return np.asarray(inner.reshape(grid, _CELLS, grid, _CELLS, 3).mean(axis=(1, 3)))


def _write_expression(
    row: SlideRow,
    rng: np.random.Generator,
    fields: NDArray[np.float64],
    log_base: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> None:
    grid = fields.shape[0]
    own = fields.reshape(-1, 3)
    around = neighbour_mean(fields).reshape(-1, 3)
    log_rate = np.tile(log_base, (len(own), 1))
    log_rate[:, :20] += own @ weights[:20].T
    log_rate[:, 20:40] += around @ weights[20:40].T
    rate = np.exp(log_rate)
    depth = rng.lognormal(0.0, 0.3, len(own))
    others = np.tile(np.random.default_rng(0).uniform(2, 20, len(OTHERS)), (len(own), 1))
    counts = np.hstack([rng.poisson(depth[:, None] * each) for each in (rate, others)]).astype(np.float32)
    array_row, array_col = (axis.ravel().astype(np.int64) for axis in np.mgrid[:grid, :grid])
    uns: dict[str, Any] = {
        "expected_rate": rate.astype(np.float32),
        "fields": own,
        "depth": depth,
        "log_base": log_base,
        "weights": weights,
    }
    assert row.expression is not None
    section = Section(
        image=row.slide,
        counts=sp.csr_matrix(counts),
        barcodes=[f"{r}x{c}" for r, c in zip(array_row, array_col, strict=True)],
        genes=[*GENES, *OTHERS],
        xy=(np.column_stack((array_col, array_row)) + 1.0) * PITCH_PX,
        array_row=array_row,
        array_col=array_col,
        patient=row.patient,
    )
    write_section(row.expression, section, "drawn by nh2st-pipe", uns)


def _paint(rng: np.random.Generator, lattice: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Draw the fields as tissue: side × side × 3, RGB."""
    side = lattice.shape[0] * PITCH_PX // _CELLS
    stain = rng.normal(0.0, 4.0, (4, 3)).astype(np.float32)  # no two slides are stained quite alike
    pale, pink, nucleus, glass = (
        np.array(rgb, np.float32) + jitter
        for rgb, jitter in zip(
            ((240, 222, 232), (222, 138, 178), (86, 58, 128), (244, 243, 245)),
            stain * np.array([[1.0], [1.0], [1.0], [0.2]], np.float32),
            strict=True,
        )
    )
    # Colours are smooth: half the resolution, and a third of the time.
    half = side // 2
    pinkness = 1 / (1 + np.exp(-1.6 * _resized(lattice[..., 1], half)))
    pinkness += 0.16 * _fibres(rng, half)
    colour = pale + np.clip(pinkness, 0, 1)[..., None] * (pink - pale)
    inside = _tissue(rng, half)[..., None]
    colour = glass + inside * (colour - glass)
    canvas = np.stack([_resized(colour[..., channel], side) for channel in range(3)], axis=-1)

    mask = _nuclei(rng, lattice, side)
    mask = mask * (_resized(inside[..., 0], side) > 0.5)
    canvas += (mask[..., None] / np.float32(255)) * (nucleus - canvas)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _resized(values: NDArray[Any], side: int) -> NDArray[np.float32]:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _fibres(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Return wavy bundles of about 20 px, in -1..1: side × side."""
    coarse = max(2, side // 56)
    bend, fade = (_resized(rng.normal(size=(coarse, coarse)), side) for _ in range(2))
    down, right = np.mgrid[:side, :side].astype(np.float32)
    waves = np.sin((0.8 * down + 0.3 * right) / 3.2 + 5.0 * bend)
    return np.asarray(waves * np.clip(0.5 + 0.5 * fade, 0, 1), dtype=np.float32)


def _tissue(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Return how far each pixel is tissue, 0..1: a rounded square with an uneven edge that holds every tile."""
    margin, corner = 0.26 * PITCH_PX / 2, 0.4 * PITCH_PX / 2  # at half resolution
    place = np.abs(np.arange(side, dtype=np.float32) - (side - 1) / 2) - (side / 2 - margin - corner)
    out = np.maximum(place, 0)
    beyond = np.hypot(out[:, None], out[None, :]) - corner
    edge = 0.08 * PITCH_PX / 2 * _resized(rng.normal(size=(side // 40, side // 40)).clip(-1.5, 1.5), side)
    return np.asarray(np.clip((edge - beyond) / 3 + 0.5, 0, 1), dtype=np.float32)


def _nuclei(rng: np.random.Generator, lattice: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """Draw the nuclei: 0 where there is none, up to 255 where one is darkest; side × side."""
    steps = side // _NUCLEUS_STEP_PX
    xy = np.stack(np.meshgrid(np.arange(steps), np.arange(steps)), axis=-1).reshape(-1, 2) + 0.5
    xy = xy * _NUCLEUS_STEP_PX + rng.uniform(-8, 8, (steps * steps, 2))
    cell = np.clip((xy * _CELLS / PITCH_PX).astype(np.int64), 0, lattice.shape[0] - 1)
    density, _, size = lattice[cell[:, 1], cell[:, 0]].T
    present = rng.random(len(xy)) < 0.04 + 0.8 / (1 + np.exp(-1.5 * (density - 0.3)))
    xy, size = xy[present], size[present]

    radius = 5.2 * np.exp(0.26 * np.clip(size, -2, 2) + rng.normal(0, 0.12, len(xy)))
    squeeze = rng.uniform(0.6, 1.0, len(xy))
    turn, darkness = rng.uniform(0, np.pi, len(xy)), rng.integers(150, 250, len(xy))
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    along = radius[:, None] * np.cos(angle)
    across = (radius * squeeze)[:, None] * np.sin(angle)
    x = xy[:, :1] + along * np.cos(turn)[:, None] - across * np.sin(turn)[:, None]
    y = xy[:, 1:] + along * np.sin(turn)[:, None] + across * np.cos(turn)[:, None]
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    for outline, shade in zip(np.stack((x, y), axis=-1).reshape(len(xy), -1).tolist(), darkness.tolist(), strict=True):
        draw.polygon(outline, fill=shade)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)


def _write_pyramid(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a tiled TIFF of three levels, each half the one before, that OpenSlide reads as generic-tiff."""
    with written_whole(path) as part, tifffile.TiffWriter(part) as tif:
        for level in range(_LEVELS):
            scale = 2**level
            tif.write(
                pixels if level == 0 else np.asarray(Image.fromarray(pixels).reduce(scale)),
                tile=(256, 256),
                compression="zlib",
                photometric="rgb",
                subfiletype=1 if level else 0,
                resolution=(1e4 / (MPP * scale), 1e4 / (MPP * scale)),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
