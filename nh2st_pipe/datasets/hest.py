"""HEST-1k (Jaume et al. 2024). INT, ZEN, Breast-ST1, Breast-ST2, Lung-ST and the tasks of its benchmark are its parts.

    wsis/<id>.tif           pyramidal TIFF
    st/<id>.h5ad            raw counts; obsm["spatial"] or obs pxl_col_in_fullres (x), pxl_row_in_fullres (y)
    metadata/<id>.json      patient, organ, species, st_technology, pixel_size_um_estimated, …
    patches/<id>.h5         optional: the spots on tissue, which are kept then
    HEST_v1_1_0.csv         optional: the same metadata of all samples, for choosing among them
    <task>/splits/test_<k>.csv, <task>/var_50genes.json    optional: folds and genes of tasks of HEST-Benchmark

`--where task=IDC` takes a task's samples, with the fold that each is judged in as the manifest's column `fold`.

Of the two columns that name pixels, the one of *columns* runs along the width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, listed, reason_of
from nh2st_pipe.core.h5ad import read_h5ad
from nh2st_pipe.core.hdf5 import opened_h5
from nh2st_pipe.datasets.common import Found, Section, files_of, needed, one_image, read_frame, whole_numbers

__all__ = ["find_hest"]

_ABOUT = (
    "patient",
    "organ",
    "species",
    "st_technology",
    "disease_state",
    "oncotree_code",
    "subseries",
    "dataset_title",
)


def find_hest(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """Find the samples whose .h5ad is there. Raises ExpressionError where none is."""
    files = files_of(folder, "st/*.h5ad")
    if not files:
        raise ExpressionError(f"there is no st/<id>.h5ad in {folder}; expected are wsis/, st/ and metadata/")
    table, tasks = _table(folder), _tasks(folder, say)
    found = []
    for file in files:
        about = {**table.get(file.stem, {}), **_json(folder / f"metadata/{file.stem}.json")}
        words = {key: str(about[key]) for key in _ABOUT if about.get(key) not in (None, "")}
        found.append(Found(file.stem, partial(_read, folder, file, about, words, {}), words))
        for task, folds in tasks.items():
            if file.stem in folds:
                read = partial(_read, folder, file, about, words, {"fold": folds[file.stem]})
                found.append(Found(file.stem, read, {**words, "task": task}, only_where=("task",)))
    for task, folds in tasks.items():
        lacking = sorted(set(folds).difference(file.stem for file in files))
        if lacking:
            say(f"task {task}: {len(lacking)} of its {len(folds)} samples are not in st/: {listed(lacking, 3)}")
        panel = next(iter(files_of(folder, f"**/{task}/var_50genes.json")), None)
        said = f" --genes {panel}" if panel else ""
        say(f"task {task}: --where task={task} takes its samples; then train with --folds fold{said}")
    return found


def _tasks(folder: Path, say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Return the tasks of HEST-Benchmark, each with the fold in which a sample is judged; without tasks that judge one
    in two folds.
    """
    tasks, twice = dict[str, dict[str, str]](), set[str]()
    for file in files_of(folder, "**/splits/test_*.csv"):
        fold = file.stem.removeprefix("test_")
        table = read_frame(file)
        needed(table, ("sample_id",), file)
        task = file.parent.parent.name
        of = tasks.setdefault(task, {})
        for sample in table["sample_id"].cast(str):
            if of.setdefault(sample, fold) != fold and task not in twice:
                twice.add(task)
                say(f"task {task} is passed over: {sample} is judged in the folds {of[sample]} and {fold}")
    return {task: of for task, of in tasks.items() if task not in twice}


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the metadata of all samples by id, from the table of them where it is there."""
    tables = files_of(folder, "HEST_v*.csv")
    if not tables:
        return {}
    rows = read_frame(tables[-1])
    return {str(row["id"]): row for row in rows.iter_rows(named=True)} if "id" in rows.columns else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # it is named when its sample is read
    return values if isinstance(values, dict) else {}


def _read(
    folder: Path, file: Path, about: Mapping[str, Any], words: Mapping[str, str], more: Mapping[str, str]
) -> Section:
    name = file.stem
    image = one_image(files_of(folder, f"wsis/{name}.*"), f"for {name} in {folder / 'wsis'}")
    if not about:
        raise ExpressionError(f"{folder / f'metadata/{name}.json'} is missing or no JSON; its resolution is not known")
    data = read_h5ad(file)
    notes = []
    barcodes = [_text(each) for each in data.obs_names]
    patches = folder / f"patches/{name}.h5"
    if patches.is_file():
        on_tissue = _barcodes(patches)
        kept = np.array([barcode in on_tissue for barcode in barcodes], bool)
        if not kept.any():
            raise ExpressionError(f"{patches} and {file} have no spot in common")
        if not kept.all():
            notes.append(f"{int((~kept).sum()):,} spots without a patch in {patches.parent.name}/ left out")
        lacking = len(on_tissue.difference(barcodes))
        if lacking:
            notes.append(f"{lacking:,} patches in {patches.parent.name}/ without counts")
        data, barcodes = data[kept], [barcode for barcode, keep in zip(barcodes, kept, strict=True) if keep]
    mpp = about.get("pixel_size_um_estimated") or about.get("pixel_size_um_embedded")
    ids = next((column for column in ("gene_ids", "gene_id", "ensembl_id") if column in data.var), None)
    return Section(
        image=image,
        counts=sp.csr_matrix(data.X),
        barcodes=barcodes,
        genes=[_text(each) for each in data.var_names],
        xy=_places(data, file),
        array_row=whole_numbers(data.obs["array_row"]) if "array_row" in data.obs else None,
        array_col=whole_numbers(data.obs["array_col"]) if "array_col" in data.obs else None,
        patient=words.get("patient", name),
        mpp=None if mpp is None else float(mpp),
        mpp_source="HEST-1k's metadata",
        gene_ids=None if ids is None else [_text(each) for each in data.var[ids]],
        notes=notes,
        extra={**{key: words[key] for key in ("organ", "species", "st_technology") if key in words}, **more},
    )


def _places(data: anndata.AnnData, file: Path) -> NDArray[np.float64]:
    """Return x and y: the px columns and rows in obs where they are there, else obsm."""
    named = ("pxl_col_in_fullres", "pxl_row_in_fullres")
    if all(name in data.obs for name in named):
        return np.column_stack([np.asarray(data.obs[name], np.float64) for name in named])
    if "spatial" in data.obsm:
        return np.asarray(data.obsm["spatial"], np.float64)
    raise ExpressionError(f"{file} says nowhere where its spots are: neither obs {', '.join(named)} nor obsm spatial")


def _barcodes(patches: Path) -> set[str]:

    try:
        with opened_h5(patches) as opened:
            key = "barcode" if "barcode" in opened else "barcodes"
            return {_text(each) for each in np.asarray(opened[key]).ravel()}
    except (OSError, KeyError) as error:
        raise ExpressionError(f"{patches} cannot be read: {reason_of(error)}") from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
