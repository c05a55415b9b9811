"""Small studies on generated slides: a few spots each, embedded by the fake encoder in well under a second."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.store.read import SlideData

# The tests run side by side, on tensors so small that threads cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Python keeps the first folder that it makes for processes' sockets: not one in the TMPDIR of whichever test is first,
# whose name may be too long for them (`core.children.fresh_processes`).
get_temp_dir()

# The same examples every time, and no time limit for one of them: a slow machine is not a fault.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def blank(folder: Path, size: tuple[int, int] = (400, 300)) -> Path:
    path = folder / "slide.png"
    Image.new("RGB", size, "white").save(path)
    return path


def slide(
    slide_id: str = "s", patient: str = "p", counts: Any = None, genes: list[str] | None = None, **more: Any
) -> SlideData:
    counts = np.ones((4, 3)) if counts is None else np.asarray(counts)
    n = len(counts)
    values: dict[str, Any] = {
        "extra": {},
        "barcodes": [f"b{i}" for i in range(n)],
        "xy": np.zeros((n, 2)),
        "array_row": np.arange(n),
        "array_col": np.zeros(n, int),
        "views": np.zeros((n, 1, 2), np.float16),
        "neighbours": np.zeros((n, 9), np.int32),
        **more,
    }
    return SlideData(slide_id, patient, counts=sp.csr_matrix(counts), genes=genes or ["a", "b", "c"], **values)


SHARED = Path(__file__).resolve().parents[2] / "shared"
GENES = [f"G{i:02d}" for i in range(12)]


@pytest.fixture(scope="session")
def her2st() -> Path:
    folder = SHARED / "data" / "her2st"
    if not folder.is_dir():
        pytest.skip("the her2st sections are not on this machine")
    return folder


@pytest.fixture(scope="session")
def lite0_weights() -> Path:
    path = SHARED / "models" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip("the EfficientNet-Lite0 weights are not on this machine")
    return path


def picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """A smooth coloured image: neighbouring tiles are alike, distant ones are not."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 255, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_spots(
    path: Path,
    xy: NDArray[np.float64],
    *,
    grid: NDArray[np.int64] | None = None,
    genes: list[str] | None = None,
    seed: int = 0,
    counts: NDArray[Any] | None = None,
    barcodes: list[str] | None = None,
    change: Callable[[anndata.AnnData], None] | None = None,
) -> Path:
    genes = genes or GENES
    rng = np.random.default_rng(seed)
    if counts is None:
        # Expression follows the place, so that there is something to learn.
        level = 1 + xy[:, :1] / xy[:, 0].max() * np.linspace(0.2, 4, len(genes))
        counts = rng.poisson(3 * level).astype(np.float32)
    obs = pd.DataFrame(index=barcodes or [f"s{i}" for i in range(len(xy))])
    if grid is not None:
        obs["array_row"], obs["array_col"] = grid[:, 0], grid[:, 1]
    data = anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    data.obsm["spatial"] = xy
    if change is not None:
        change(data)
    data.write_h5ad(path)
    return path


def grid_positions(side: int, pitch: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rows, cols = (axis.ravel() for axis in np.mgrid[:side, :side])
    return np.column_stack((cols, rows)) * pitch + pitch, np.column_stack((rows, cols))


_STORED: dict[str, Path] = {}


@dataclass(frozen=True)
class Study:
    """A manifest of generated slides in a folder of its own."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.csv"

    def embed(self, **options: Any) -> Any:
        from nh2st_pipe.embedding.run import embed

        options = {"encoder": "fake", "store": self.folder / "store.zarr", "tile_px": 48, **options}
        return embed(self.manifest, **options)

    def stored(self, **options: Any) -> None:
        """As `embed`, for tests of what comes after: where these very slides were embedded before, a copy of that."""
        files = sorted(self.folder.iterdir())
        if not all(file.is_file() for file in files):  # there is a store already
            self.embed(**options)
            return
        sha = hashlib.sha256(str(sorted(options.items())).encode())
        for file in files:
            sha.update(file.name.encode() + file.read_bytes())
        kept = _STORED.get(key := sha.hexdigest())
        if kept is None:
            self.embed(**options)
            kept = _STORED[key] = Path(tempfile.mkdtemp(prefix="stored-", dir=self.folder.parents[1]))
            shutil.copytree(self.folder, kept, dirs_exist_ok=True)
        else:
            shutil.copytree(kept, self.folder, dirs_exist_ok=True)  # images with their times, which the store knows


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    def make(
        n_slides: int = 3,
        side: int = 5,
        *,
        expression: bool = True,
        patients: list[str] | None = None,
        name: str = "study",
    ) -> Study:
        folder = tmp_path / name
        folder.mkdir()
        xy, grid = grid_positions(side, 40.0)
        lines = ["slide_id,slide,patient" + (",expression" if expression else "")]
        for i in range(n_slides):
            size = int(40 * (side + 1))
            Image.fromarray(picture(size, size, seed=i)).save(folder / f"s{i}.png")
            line = f"s{i},s{i}.png,{patients[i] if patients else f'P{i}'}"
            if expression:
                write_spots(folder / f"s{i}.h5ad", xy, grid=grid, seed=i)
                line += f",s{i}.h5ad"
            lines.append(line)
        (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
        return Study(folder)

    return make


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()
