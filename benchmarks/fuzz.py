"""Files that a person or another program hands in, damaged in every way, at the doors where they come in.

    python benchmarks/fuzz.py --minutes 10

Each input is a whole, valid one with a few bytes, numbers, words or nodes changed. What comes of it has to be a value
or one of the package's own errors, in words that are not Python's, within 20 s and 2 GB. Anything else is a finding: it
is printed, and the input is kept in --keep. The status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_SECONDS, _MOST_BYTES = 20.0, 2 << 30
processes = mp.get_context("forkserver")
_EACH = 200  # inputs of one door in a row: what is loaded once is used again

Make = Callable[[Path], object]
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Door:
    """What makes a whole input in a folder, what reads it, and which of its files are damaged (a pattern)."""

    make: Make
    read: Read
    files: str = "**/*"


# --- inputs ----------------------------------------------------------------------------------------------------------


def _study(folder: Path) -> None:
    """Three slides of 25 spots, with a manifest."""
    import anndata
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = ["slide_id,slide,patient,expression,mpp,tissue,site"]
    rows, cols = (axis.ravel() for axis in np.mgrid[:5, :5])
    for name in ("s0", "s1", "s2"):
        picture = rng.integers(60, 220, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((240, 240), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        obs = pd.DataFrame({"array_row": rows, "array_col": cols, "in_tissue": 1}, index=[f"b{i}" for i in range(25)])
        counts = sp.csr_matrix(rng.poisson(3, (25, 8)).astype(np.float32))
        data = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(8)]))
        data.obsm["spatial"] = np.column_stack((cols, rows)) * 40.0 + 40
        data.uns["spatial"] = {"x": {"scalefactors": {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 30.0}}}
        data.write_h5ad(folder / f"{name}.h5ad")
        lines.append(f"{name},{name}.png,P{name},{name}.h5ad,0.5,,breast")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def _store(folder: Path) -> None:
    from nh2st_pipe import embed

    _study(folder)
    embed(folder / "manifest.csv", encoder="fake", store=folder / "store.zarr", tile_px=48, views=8, device="cpu")


def _run(folder: Path) -> None:
    from nh2st_pipe import predict, train

    _store(folder)
    train(folder / "store.zarr", recipe="ridge", genes=6, out=folder / "run", device="cpu")
    predict(folder / "run", embeddings=folder / "store.zarr", out=folder / "predictions")


def _recipe(kind: str, name: str) -> Make:
    def make(folder: Path) -> None:
        from nh2st_pipe.recipes import files

        shutil.copy(files.find(kind, name), folder / "recipe.yaml")

    return make


def _picture(ending: str) -> Make:
    def make(folder: Path) -> None:
        import numpy as np
        import tifffile
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
        path = folder / f"a{ending}"
        if ending == ".ome.tif":
            with tifffile.TiffWriter(path) as file:
                options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
                file.write(pixels, subifds=1, metadata={"axes": "YXS"}, **options)
                file.write(pixels[::2, ::2], subfiletype=1, **options)
        elif ending == ".tif":
            tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb")
        elif ending == ".strips.tif":
            tifffile.imwrite(path, pixels, rowsperstrip=64, compression="zlib", photometric="rgb")
        else:
            Image.fromarray(pixels).save(path)

    return make


def _ome_zarr(folder: Path) -> None:
    import numpy as np
    import zarr

    root = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=2)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 128, 128), dtype=np.uint8)
    levels: list[Any] = []
    for number, step in enumerate((1, 2)):
        part = pixels[:, ::step, ::step]
        array: Any = root.create_array(str(number), shape=part.shape, chunks=(3, 64, 64), dtype="uint8")
        array[:] = part
        scale = [{"type": "scale", "scale": [1.0, 0.5 * step, 0.5 * step]}]
        levels.append({"path": str(number), "coordinateTransformations": scale})
    axes: Any = [{"name": name, "type": "space", "unit": "micrometer"} for name in "cyx"]
    root.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]


def _mask(ending: str) -> Make:
    def make(folder: Path) -> None:
        import numpy as np
        import tifffile
        from PIL import Image

        mask = np.zeros((300, 400), np.uint8)
        mask[50:200, 80:300] = 255
        if ending == ".tif":
            tifffile.imwrite(folder / "mask.tif", mask, compression="zlib", rowsperstrip=50)
        else:
            Image.fromarray(mask).save(folder / f"mask{ending}")

    return make


def _outline(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (400, 300), "white").save(folder / "slide.png")
    ring = [[10, 10], [200, 10], [200, 150], [10, 150], [10, 10]]
    hole = [[50, 50], [80, 50], [80, 80], [50, 80], [50, 50]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring, hole]}, "properties": {}}
    text = json.dumps({"type": "FeatureCollection", "features": [feature, feature]})
    (folder / "outline.geojson").write_text(text)


def _czi(folder: Path) -> None:
    import numpy as np
    from pylibCZIrw.czi import create_czi

    rng = np.random.default_rng(0)
    with create_czi(str(folder / "slide.czi"), compression_options="zstd1:ExplicitLevel=2") as file:
        for scene, corner in enumerate(((0, 0), (150, 100))):
            file.write(rng.integers(100, 250, (90, 120, 3), dtype=np.uint8), corner, scene=scene)
        file.write_metadata(scale_x=0.5e-6, scale_y=0.5e-6)


def _genes(folder: Path) -> None:
    (folder / "genes.txt").write_text("\n".join(f"G{i}" for i in range(8)) + "\n")
    (folder / "genes.json").write_text(json.dumps({"genes": [f"G{i}" for i in range(8)]}))


def _together(folder: Path) -> None:
    """Predictions, and what goes with them: an index, gene sets, regions."""
    from nh2st_pipe import open_store
    from nh2st_pipe.searching.index import index_of

    _run(folder)
    index_of(open_store(folder / "store.zarr"))
    ring = [[10, 10], [200, 10], [200, 150], [10, 150], [10, 10]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"name": "A"}}
    (folder / "regions").mkdir()
    text = json.dumps({"type": "FeatureCollection", "features": [feature]})
    (folder / "regions/s0.geojson").write_text(text)
    (folder / "sets.tsv").write_text("UP\tx\tG0\tG1\tG2\tG3\tG4\tG5\nDOWN\ty\tG2\tG3\tG1\n")


def _layout(name: str) -> Make:
    def make(folder: Path) -> None:
        from nh2st_pipe.datasets.generated import generate_layout

        generate_layout(name, folder)

    return make


# --- readers ---------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> object:
    from nh2st_pipe.embedding.plan import Wanted
    from nh2st_pipe.tiles.manifest import read_manifest

    return [Wanted.of(row) for row in read_manifest(folder / "manifest.csv")]


def _read_spots(folder: Path) -> object:
    from nh2st_pipe.tiles.geometry import spots_say
    from nh2st_pipe.tiles.spots import read_spots

    return spots_say(read_spots(folder / "s0.h5ad"))


def _read_slide(folder: Path) -> object:
    from nh2st_pipe.slides import open_slide
    from nh2st_pipe.slides.base import read_tile, thumbnail
    from nh2st_pipe.slides.whole import missing_data

    (path,) = folder.iterdir()
    if path.is_file() and missing_data(path):
        return None
    slide = open_slide(path)
    try:
        if slide.size[0] * slide.size[1] < 1e8:  # the work is that of its px
            thumbnail(slide, 256)
        return read_tile(slide, (100.0, 90.0), 96.0, 48, "bicubic")
    finally:
        slide.close()


def _read_mask(folder: Path) -> object:
    from nh2st_pipe.tiles.masks import mask_from_image

    (path,) = folder.iterdir()
    return mask_from_image(path)


def _read_outline(folder: Path) -> object:
    from nh2st_pipe.slides import open_slide
    from nh2st_pipe.tiles.masks import mask_from_geojson

    return mask_from_geojson(folder / "outline.geojson", open_slide(folder / "slide.png"))


def _read_genes(folder: Path) -> object:
    from nh2st_pipe.data.panels import read_gene_file

    return [read_gene_file(folder / "genes.txt"), read_gene_file(folder / "genes.json")]


def _read_train_recipe(folder: Path) -> object:
    from nh2st_pipe.recipes.train import load_train_recipe

    return load_train_recipe(folder / "recipe.yaml")


def _read_encoder_recipe(folder: Path) -> object:
    from nh2st_pipe.recipes.encoder import load_encoder_recipe

    return load_encoder_recipe(folder / "recipe.yaml")


def _read_store(folder: Path) -> object:
    from nh2st_pipe import open_store
    from nh2st_pipe.core.errors import DamageError

    store = open_store(folder / "store.zarr")
    found = [store.slides(), store.damaged(), store.incomplete(), repr(store)]
    for name in store.slides():
        try:
            found.append(repr(store.read(name)))
        except DamageError:
            found.append(name)
    return found


def _read_run(folder: Path) -> object:
    from nh2st_pipe import compare, load_model
    from nh2st_pipe.reporting.page import report
    from nh2st_pipe.runs.folder import find_run

    find_run(folder / "run")
    return [compare([folder / "run"]), load_model(folder / "run"), report(folder / "run", folder / "report.html")]


def _read_unchecked_run(folder: Path) -> object:
    """As `_read_run`, with the hashes written anew: what somebody edited, and not what was damaged."""
    from nh2st_pipe.runs.checksums import write_sums

    if (folder / "run").is_dir():
        write_sums(folder / "run")
    return _read_run(folder)


def _read_predictions(folder: Path) -> object:
    from nh2st_pipe import evaluate

    return evaluate(folder / "predictions", embeddings=folder / "store.zarr")


def _read_exports(folder: Path) -> object:
    """Predictions as tables, for QuPath, as pictures, in a cohort, and in a report; a fault of one slide is said."""
    from nh2st_pipe.cohorts.table import cohort_of
    from nh2st_pipe.core.errors import RunError
    from nh2st_pipe.exporting.run import export

    out = folder.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    done = export(folder / "predictions", "csv,qupath,anndata,ome-tiff", out, everything=True)
    cohort = cohort_of(folder / "predictions")
    words = [*done.failed.values(), *cohort.failed.values()]
    if any(_PYTHON.search(each) for each in words):
        raise RunError(next(each for each in words if _PYTHON.search(each)))
    return [cohort.frame(), cohort.by_patient(), done]


def _read_together(folder: Path) -> object:
    from nh2st_pipe.reporting.page import report
    from nh2st_pipe.searching.search import Query, search

    asked = {"gene_sets": folder / "sets.tsv", "regions": folder / "regions"}
    page = report(folder / "predictions", folder.parent / "report.html", domains=2, **asked)  # type: ignore[arg-type]
    store, predictions = folder / "store.zarr", folder / "predictions"
    found = search(store, Query(slide="s0", at=(60.0, 60.0), same_patient=True, k=5))
    return [page, found, search(store, Query(where="unlike < 101", k=5), predictions=predictions)]


def _read_layout(name: str) -> Read:
    def read(folder: Path) -> object:
        from nh2st_pipe.datasets import import_dataset

        out = folder.parent / "imported"
        shutil.rmtree(out, ignore_errors=True)
        return import_dataset(name, folder, out / "manifest.csv", lambda words: None)

    return read


DOORS: dict[str, Door] = {
    "manifest": Door(_study, _read_manifest, "manifest.csv"),
    "counts": Door(_study, _read_spots, "s0.h5ad"),
    "train recipe": Door(_recipe("stages/train", "nh2st-context"), _read_train_recipe),
    "train recipe of nh2st": Door(_recipe("stages/train", "nh2st"), _read_train_recipe),
    "encoder recipe": Door(_recipe("stages/embed", "uni2-h"), _read_encoder_recipe),
    "png": Door(_picture(".png"), _read_slide),
    "jpeg": Door(_picture(".jpg"), _read_slide),
    "bmp": Door(_picture(".bmp"), _read_slide),
    "webp": Door(_picture(".webp"), _read_slide),
    "tiff": Door(_picture(".tif"), _read_slide),
    "tiff in strips": Door(_picture(".strips.tif"), _read_slide),
    "ome-tiff": Door(_picture(".ome.tif"), _read_slide),
    "czi": Door(_czi, _read_slide),
    "ome-zarr": Door(_ome_zarr, _read_slide),
    "mask, png": Door(_mask(".png"), _read_mask),
    "mask, tiff": Door(_mask(".tif"), _read_mask),
    "mask, bmp": Door(_mask(".bmp"), _read_mask),
    "outline": Door(_outline, _read_outline, "outline.geojson"),
    "genes": Door(_genes, _read_genes),
    "store": Door(_store, _read_store, "store.zarr/**/*"),
    "run": Door(_run, _read_run, "run/**/*"),
    "run, edited": Door(_run, _read_unchecked_run, "run/**/*"),
    "predictions": Door(_run, _read_predictions, "predictions/*.h5ad"),
    "exports": Door(_run, _read_exports, "predictions/*.h5ad"),
    "together, predictions": Door(_together, _read_together, "predictions/*.h5ad"),
    "together, index": Door(_together, _read_together, "store.zarr.search/**/*"),
    "together, regions": Door(_together, _read_together, "regions/*"),
    "together, sets": Door(_together, _read_together, "sets.tsv"),
    **{
        f"layout {name}": Door(_layout(name), _read_layout(name))
        for name in ("her2st", "hest", "visium", "spatialdata", "xenium", "stimage")
    },
}


# --- damage ----------------------------------------------------------------------------------------------------------

_NUMBERS = ("0", "-1", "1e309", "nan", "inf", "-0.0", "1e-320", "9" * 30, "1.5", "0x10", "1_000", "１２", "")
_WORDS: tuple[str, ...] = ("null", "true", "[]", "{}", '""', "~", "None", "!!bool maybe", "2020-13-01", "&a [*a]", "*b")
_WORDS += ("\x00", "é" * 300)
_NODES: tuple[Any, ...] = (None, True, [], {}, "", "x", -1, 0, 1.5, 1e300, 10**40, [[[]]], {"a": {}}, ["x"] * 50)
_MARKS = (",", ";", "\t", '"', ":", "[", "}", "\n", "")
_TEXT = (".csv", ".tsv", ".txt", ".yaml", ".json", ".geojson", ".jsonl", ".md", ".zarray", ".zattrs")


def damaged(data: bytes, rng: random.Random, name: str) -> bytes:
    """Return a file's bytes with something changed, as fits what it is."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        of_text = name.endswith(_TEXT) and rng.random() < 0.85
        data = _of_text(data, rng, name) if of_text else _of_bytes(data, rng)
    return data


def _of_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
    at, how = rng.randrange(len(data)), rng.randrange(8)
    if rng.random() < 0.4:
        at = min(at, rng.randrange(512))  # where headers are
    changed = bytearray(data)
    if how <= 2:
        changed[at] ^= 1 << rng.randrange(8)
    elif how == 3:
        changed[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\1\0"))
    elif how == 4:
        return data[:at]
    elif how == 5:
        stop = at + rng.randrange(1, 200)
        changed[at:stop] = changed[at:stop] * 2
    elif how == 6:
        del changed[at : at + rng.randrange(1, 200)]
    else:
        changed[at : at + 16] = bytes(rng.randrange(256) for _ in range(16))
    return bytes(changed)


def _of_text(data: bytes, rng: random.Random, name: str) -> bytes:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _of_bytes(data, rng)
    if name.endswith((".json", ".geojson", ".zarray", ".zattrs")) and rng.random() < 0.6:
        try:
            return json.dumps(_of_node(json.loads(text), rng)).encode()
        except (ValueError, RecursionError):
            pass
    how = rng.randrange(5)
    if how <= 1:
        spans = [found.span() for found in re.finditer(r"-?\d+(\.\d+)?", text)]
        new: tuple[str, ...] = (*_NUMBERS, *_WORDS)
    elif how == 2:
        spans, new = [found.span() for found in re.finditer(r"\w+", text)], (*_WORDS, *_NUMBERS)
    elif how == 3:
        spans, new = [found.span() for found in re.finditer(r"[^\w\s]", text)], _MARKS
    else:
        lines = text.splitlines(keepends=True)
        if lines:
            at = rng.randrange(len(lines))
            lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [lines[at], "\n"], [lines[at].rstrip("\n")]))
        return "".join(lines).encode()
    if not spans:
        return _of_bytes(data, rng)
    start, stop = rng.choice(spans)
    return (text[:start] + rng.choice(new) + text[stop:]).encode()


def _of_node(node: Any, rng: random.Random) -> Any:
    """Return JSON values with one node replaced, left out, or doubled."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(list(node))
        if rng.random() < 0.1:
            return {name: value for name, value in node.items() if name != key}
        return {**node, key: _of_node(node[key], rng)}
    if isinstance(node, list) and node and rng.random() < 0.9:
        at = rng.randrange(len(node))
        if rng.random() < 0.1:
            return node[:at] + node[at + 1 :]
        return [*node[:at], _of_node(node[at], rng), *node[at + 1 :]]
    return rng.choice(_NODES)


# --- judgement -------------------------------------------------------------------------------------------------------

_PYTHON = re.compile(
    r"object has no attribute|NoneType|Traceback|unhashable|not subscriptable|not iterable|\bint\(\)|\bfloat\(\)|"
    r"invalid literal for|list index|index out of range|out of bounds|KeyError|TypeError|ValueError|AttributeError|"
    r"dtype\('|<class '|\bndarray\b|positional argument|unexpected keyword|codec can't|cannot reshape|broadcast|"
    r"must be str|must be real|not supported between|unsupported operand|maximum recursion|too many values|"
    r"not enough values|\[Errno|0x[0-9a-f]{8,}|object at "
)


def judged(read: Read, folder: Path) -> tuple[str, str]:
    """Return what came of reading a folder (`value`, `error`, `python`, `traceback`), and the words of it."""
    from nh2st_pipe.core.errors import NH2STError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except NH2STError as error:
        return ("python" if _PYTHON.search(str(error)) else "error"), str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    return "value", ""


def work(door: str, seeds: range, where: Path, pipe: Any) -> None:
    """Judge inputs of a door, saying of each that it begins and what came of it."""
    import logging

    logging.disable(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 -- for as long as the process lives
    whole, folder = where / "whole" / door, where / f"{os.getpid()}" / "input"
    of = DOORS[door]
    shutil.copytree(whole, folder)
    files = sorted(file for file in folder.glob(of.files) if file.is_file() and "/.leases" not in str(file))
    for seed in seeds:
        rng = random.Random(f"{door} {seed}")
        file = rng.choice(files)
        original = file.read_bytes()
        file.write_bytes(damaged(original, rng, file.name))
        pipe.send(("begins", seed, file.relative_to(folder).as_posix()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, words = judged(of.read, folder)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if most > before and most * 1024 > _MOST_BYTES:
            outcome, words = "memory", f"{most * 1024 / 1e9:.1f} GB"
        pipe.send((outcome, seed, words))
        file.write_bytes(original)
        if outcome == "memory":
            break  # what it took counts for ever
    shutil.rmtree(folder.parent, ignore_errors=True)


def make_all(doors: list[str], where: Path) -> None:
    """Make the whole inputs of doors, and see that each is read."""
    for name in doors:
        DOORS[name].make(where / "whole" / name)
        outcome, words = judged(DOORS[name].read, Path(shutil.copytree(where / "whole" / name, where / "try" / name)))
        if outcome != "value":
            sys.exit(f"the whole input of {name} is refused: {words}")


class Hand:
    """A process at work on a few inputs of a door."""

    def __init__(self, door: str, seeds: range, where: Path) -> None:
        self.door, self._seeds = door, seeds
        self._pipe, other = mp.Pipe(duplex=False)
        self._process = processes.Process(target=work, args=(door, seeds, where, other), daemon=True)
        self._process.start()
        other.close()
        self._at: tuple[int, str] | None = None
        self._since = time.monotonic()

    def look(self) -> tuple[list[tuple[str, int, str, str]], bool]:
        """Return outcomes (what, seed, file, words) since the last look, and whether it is at an end."""
        found = list[tuple[str, int, str, str]]()
        try:
            while self._pipe.poll(0.02):
                what, seed, words = self._pipe.recv()
                if what == "begins":
                    self._at, self._since = (seed, words), time.monotonic()
                else:
                    assert self._at is not None
                    found.append((what, seed, self._at[1], words))
                    self._at = None
        except EOFError:
            self._process.join()
            if self._at is not None:
                found.append(("crash", *self._at, f"the process ended with status {self._process.exitcode}"))
            return found, True
        if self._at is not None and time.monotonic() - self._since > _MOST_SECONDS:
            self._process.kill()
            self._process.join()
            found.append(("hang", *self._at, f"over {_MOST_SECONDS:.0f} s"))
            return found, True
        return found, False


def keep(door: str, seed: int, where: Path, kept: Path, file: str) -> Path:
    """Write the damaged file of a finding to `kept`, and return where."""
    rng = random.Random(f"{door} {seed}")
    whole = where / "whole" / door
    files = sorted(each for each in whole.glob(DOORS[door].files) if each.is_file() and "/.leases" not in str(each))
    path = kept / f"{door.replace(' ', '-').replace(',', '')}-{seed}-{Path(file).name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damaged(rng.choice(files).read_bytes(), rng, Path(file).name))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, default=0, help="end after so many, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; others make other inputs")
    parser.add_argument("--doors", default="", help="those whose names hold this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    given = parser.parse_args()
    doors = [name for name in DOORS if given.doors in name]
    processes.set_forkserver_preload(["nh2st_pipe.embedding.run", "nh2st_pipe.training.run"])
    counted, shown, took = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as held:
        where = Path(held)
        for name in doors:
            (where / "whole" / name).mkdir(parents=True)
        made = processes.Process(target=make_all, args=(doors, where))  # torch's threads stay there
        made.start()
        made.join()
        if made.exitcode:
            sys.exit("an input that is whole is refused")
        until, begun, hands = time.monotonic() + 60 * given.minutes, 0, list[Hand]()
        while True:
            going = time.monotonic() < until and not (given.inputs and begun * _EACH >= given.inputs)
            while going and len(hands) < given.jobs:
                first = given.seed + begun // len(doors) * _EACH
                hands.append(Hand(doors[begun % len(doors)], range(first, first + _EACH), where))
                begun += 1
            for hand in list(hands):
                outcomes, over = hand.look()
                for what, seed, file, words in outcomes:
                    counted[what] += 1
                    took[hand.door] += 1
                    last = words.strip().splitlines()[-1] if what == "traceback" else words
                    kind = f"{hand.door}, {what}: {re.sub(r'[0-9]+', '0', last)[-120:]}"
                    if what not in ("value", "error"):
                        shown[kind] += 1
                        if shown[kind] <= 1:
                            path = keep(hand.door, seed, where, given.keep, file)
                            print(f"{what} at {hand.door} ({file}, seed {seed}): {last[-300:]}\n  {path}", flush=True)
                            if what == "traceback":
                                path.with_suffix(".trace.txt").write_text(words)
                if over:
                    hands.remove(hand)
            if not hands and not going:
                break
    print(json.dumps({"inputs": sum(counted.values()), **counted, "doors": dict(took)}))
    sys.exit(any(what not in ("value", "error") for what in counted))


if __name__ == "__main__":
    main()
