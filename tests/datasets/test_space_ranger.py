"""Space Ranger's output as people have it: without the image, of every version, with more than genes in it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import ExpressionError, UsageError
from nh2st_pipe.datasets.generated import GENES, Tissue, visium
from nh2st_pipe.tiles.manifest import read_manifest
from tests.datasets.test_layouts import bring, spots
from tests.slides.test_omezarr import write_ome_zarr


def matrix(path: Path, counts: NDArray[Any], barcodes: list[str], genes: list[str], types: list[str] | None) -> None:
    """10x's HDF5 of n × g counts."""
    by_spot = sp.csr_matrix(counts)
    path.unlink(missing_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for key, values in (("data", by_spot.data), ("indices", by_spot.indices), ("indptr", by_spot.indptr)):
            group[key] = values
        group["shape"], group["barcodes"] = [len(genes), len(barcodes)], np.array(barcodes, "S")
        group["features/name"] = np.array(genes, "S")
        group["features/id"] = np.array([f"ENSG{i:011d}" for i in range(len(genes))], "S")
        if types is not None:
            group["features/feature_type"] = np.array(types, "S")


BARCODES = [f"AC{i:04d}-1" for i in range(len(Tissue(3)))]


@pytest.mark.parametrize(
    "types", [["Antibody Capture", "CRISPR Guide Capture"], ["Custom", "Multiplexing Capture"], None]
)
def test_only_genes_are_genes(tmp_path: Path, types: list[str] | None) -> None:
    """A protein often has a gene's name, and counts a hundred times as large."""
    folder, counts = visium(tmp_path / "data"), Tissue(3).counts
    more = np.column_stack((counts, 500 + counts[:, :2]))
    extra = ["G0", "G1"] if types is not None else ["NegControlProbe_1", "BLANK_0002"]
    of = None if types is None else ["Gene Expression"] * len(GENES) + types
    matrix(folder / "A1/outs/filtered_feature_bc_matrix.h5", more, BARCODES, [*GENES, *extra], of)
    said = list[str]()
    made = bring("visium", folder, look=False, said=said)
    data = spots(made, "A1")
    assert data.var_names.tolist() == GENES
    place = [BARCODES.index(name) for name in data.obs_names]
    assert (data.X.toarray() == counts[place]).all()
    names = "2 control probes" if types is None else f"1 {types[0]}, 1 {types[1]}"
    assert f"features that are no genes left out: {names}" in said[0]


def test_only_genes_are_genes_in_a_matrix_of_text(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data", version=1)
    features = folder / "A1/outs/filtered_feature_bc_matrix/features.tsv.gz"
    lines = gzip.decompress(features.read_bytes()).decode().split("\n")
    lines[0] = lines[0].replace("Gene Expression", "Antibody Capture")
    features.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert spots(bring("visium", folder, look=False), "A1").var_names.tolist() == GENES[1:]


def test_a_matrix_without_genes_is_refused_by_name(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data")
    path = folder / "A1/outs/filtered_feature_bc_matrix.h5"
    matrix(path, Tissue(3).counts, BARCODES, GENES, ["Antibody Capture"] * len(GENES))
    with pytest.raises(ExpressionError, match=r"none of its 12 features is a gene \(Antibody Capture\)"):
        bring("visium", folder, look=False)


HEADER = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"


def _saved(text: str) -> dict[str, Callable[[Path], object]]:
    quoted = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())
    bare = text.split("\n", 1)[1]

    def parquet(name: str) -> Callable[[Path], object]:
        return lambda folder: pl.read_csv(text.encode()).write_parquet(folder / name)

    def as_text(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content)

    return {
        "commas": as_text("tissue_positions.csv", text.encode()),
        "quoted by R": as_text("tissue_positions.csv", quoted.encode()),
        "semicolons": as_text("tissue_positions.csv", text.replace(",", ";").encode()),
        "tabs": as_text("tissue_positions.csv", text.replace(",", "\t").encode()),
        "Windows": as_text("tissue_positions.csv", text.replace("\n", "\r\n").encode("utf-8-sig")),
        "UTF-16": as_text("tissue_positions.csv", text.encode("utf-16")),
        "gzipped": as_text("tissue_positions.csv.gz", gzip.compress(text.encode())),
        "gzipped under another name": as_text("tissue_positions.csv", gzip.compress(text.encode())),
        "a blank line first": as_text("tissue_positions.csv", b"\n" + text.encode()),
        "names with blanks": as_text("tissue_positions.csv", text.replace(",", " , ", 5).encode()),
        "no header": as_text("tissue_positions_list.csv", bare.encode()),
        "no header, a new name": as_text("tissue_positions.csv", bare.encode()),
        "a header, the old name": as_text("tissue_positions_list.csv", text.encode()),
        "Parquet": parquet("tissue_positions.parquet"),
        "Parquet under another name": parquet("tissue_positions.csv"),
    }


@pytest.mark.parametrize("way", _saved(f"{HEADER}\n"))
def test_positions_are_read_however_they_are_saved(tmp_path: Path, way: str) -> None:
    folder = visium(tmp_path / "data")
    path = folder / "A1/outs/spatial/tissue_positions.csv"
    expected = spots(bring("visium", folder, look=False), "A1")
    text = path.read_text()
    path.unlink()
    _saved(text)[way](path.parent)
    found = spots(bring("visium", folder, look=False), "A1")
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert np.array_equal(found.obsm["spatial"], expected.obsm["spatial"])
    assert found.obs.equals(expected.obs)


@pytest.mark.parametrize("missing", ["NA", "", "nan", "#N/A", "NULL", "left"])
def test_a_position_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    folder = visium(tmp_path / "data")
    path = folder / "A1/outs/spatial/tissue_positions.csv"
    lines = path.read_text().splitlines()
    lines[4] = ",".join([*lines[4].split(",")[:5], missing])
    path.write_text("\n".join(lines))
    words = r"tissue_positions\.csv: pxl_col_in_fullres or pxl_row_in_fullres is no number in 1 rows"
    with pytest.raises(ExpressionError, match=words):
        bring("visium", folder, look=False)


def test_what_is_in_one_of_two_files_alone_is_counted_from_both_sides(tmp_path: Path) -> None:
    folder, said = visium(tmp_path / "data"), list[str]()
    path = folder / "A1/outs/spatial/tissue_positions.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-3], "ZZ-1,1,9,9,5,5", "ZY-1,1,9,8,5,5"]))
    bring("visium", folder, look=False, said=said)
    assert "3 with counts and without a position in tissue left out" in said[0]
    assert "2 with a position in tissue and without counts left out" in said[0]


# --- the microscope's image ------------------------------------------------------------------------------------------


def elsewhere(tmp_path: Path, names: dict[str, str]) -> Path:
    """Outs of sections, each with its image at a place of its own."""
    for number, (section, image) in enumerate(names.items()):
        visium(tmp_path / "data", section, version=3 - number % 2)
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / section / "he.tif").rename(tmp_path / image)
    return tmp_path / "data"


NAMINGS: dict[str, tuple[dict[str, str], str]] = {
    "a folder": ({"S1": "scans/S1.tif", "S10": "scans/S10.tif"}, "{0}/scans"),
    "more around the name": ({"S1": "scans/2021_HE S1 (40x).tif", "S10": "scans/2021_HE S10 (40x).tif"}, "{0}/scans"),
    "folders below": ({"S1": "scans/S1/he.tif", "S10": "scans/S10/he.tif"}, "{0}/scans"),
    "a pattern": ({"S1": "scans/a/S1.tif", "S10": "scans/b/S10.tif"}, "{0}/scans/*/*.tif"),
    "a pattern with the name": ({"S1": "scans/x_S1_he.tif", "S10": "scans/x_S10_he.tif"}, "{0}/scans/*_{{}}_*.tif"),
    "other letters": ({"s-1 A": "scans/S_1_a.tif", "s-1 B": "scans/S_1_b.tif"}, "{0}/scans"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_images_are_found_by_a_folder_or_a_pattern(tmp_path: Path, naming: str) -> None:
    names, where = NAMINGS[naming]
    made = bring("visium", elsewhere(tmp_path, names), images=where.format(tmp_path))
    assert {row.slide for row in made.rows} == {(tmp_path / image).resolve() for image in names.values()}
    assert (made.failed, made.doubts) == ({}, {})  # each is its own: another's tissue would not lie under the spots
    assert [row.slide_id for row in read_manifest(tmp_path / "out/manifest.csv")] == [row.slide_id for row in made.rows]


def test_images_are_found_by_a_table(tmp_path: Path) -> None:
    names = {"S1": "scans/one.tif", "S2": "other/two.tif"}
    folder = elsewhere(tmp_path, names)
    table = tmp_path / "images.csv"
    table.write_text(f"section,image\nS1,scans/one.tif\nS2,{tmp_path}/other/two.tif\n")
    made = bring("visium", folder, images=str(table), look=False)
    assert [row.slide.name for row in made.rows] == ["one.tif", "two.tif"]
    table.write_text("sample,path\nS1,scans/one.tif\n")
    made = bring("visium", folder, images=str(table), look=False)
    assert [row.slide_id for row in made.rows] == ["S1"]
    assert "images.csv has no row for section S2" in made.failed["S2"]
    for rows, words in (
        ("section,image\nS1,gone.tif\n", r"images\.csv, row 2: there is no image at .*gone\.tif"),
        ("section,image\nS1,scans/one.tif\nS1,other/two.tif\n", "row 3: section S1 stands there twice"),
        ("a,b\nS1,scans/one.tif\n", r"images\.csv lacks the columns section and image \(it has a, b\)"),
    ):
        table.write_text(rows)
        with pytest.raises(UsageError, match=words):
            bring("visium", folder, images=str(table), look=False)


def test_an_image_that_is_not_the_only_one_of_its_name_is_not_guessed(tmp_path: Path) -> None:
    folder = elsewhere(tmp_path, {"S1": "scans/S1 a.tif", "S2": "scans/S2.tif"})
    shutil.copy(tmp_path / "scans/S1 a.tif", tmp_path / "scans/S1 b.tif")
    made = bring("visium", folder, images=f"{tmp_path}/scans", look=False)
    assert [row.slide_id for row in made.rows] == ["S2"]
    assert "2 images are named after section S1 (S1 a.tif, S1 b.tif); one is expected" in made.failed["S1"]
    with pytest.raises(UsageError, match=r"--images .*nowhere: there is no image there"):
        bring("visium", folder, images=f"{tmp_path}/nowhere", look=False)


def test_without_an_image_it_is_said_where_it_was_looked_for_and_what_to_do(tmp_path: Path) -> None:
    folder = elsewhere(tmp_path, {"S1": "scans/S1.tif"})
    (folder / "S1/outs/spatial/cytassist_image.tiff").write_bytes(b"")
    shutil.copy(tmp_path / "scans/S1.tif", folder / "S1/CytAssist_image.tif")
    (folder / "S1/scan.vsi").write_bytes(b"vsi")
    with pytest.raises(ExpressionError) as error:
        bring("visium", folder, look=False)
    for words in (
        "no image of the microscope in",
        "Space Ranger copies it nowhere",
        "beside it as S1{.tif, .tiff, .btf, …}",
        "CytAssist has an image of its own",
        "--images FOLDER",
        "scan.vsi is of the format that Olympus and Evident write",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "beside",
    [
        ["CytAssist_FFPE_image.tif"],
        ["aligned_fiducials.jpg", "detected_tissue_image.jpg", "tissue_hires_image.png", "aligned_tissue_image.jpg"],
        ["sample_image.tif", "../tissue_image"],
    ],
)
def test_the_microscopes_image_is_told_from_others(tmp_path: Path, beside: list[str]) -> None:
    folder = visium(tmp_path / "data")
    own = folder / "A1/he.tif"
    if "../tissue_image" in beside:
        own = own.rename(own.with_name("sample_tissue_image.tif"))
    for name in beside:
        if not name.startswith(".."):
            shutil.copy(own, own.with_name(name))
    (row,) = bring("visium", folder, look=False).rows
    assert row.slide == own.resolve()


@pytest.mark.parametrize("place", ["as it was called", "beside the section", "in the section"])
def test_the_image_that_space_ranger_was_given_is_taken_by_its_own_record(tmp_path: Path, place: str) -> None:
    folder = elsewhere(tmp_path, {"A1": "lab/scan 7.tif"})
    given = tmp_path / "lab/scan 7.tif"
    if place != "as it was called":
        given = Path(shutil.move(given, folder / ("" if place.startswith("beside") else "A1") / "scan 7.tif"))
    (folder / "A1/_invocation").write_text(
        f'call SPATIAL(\n    sample_id = "A1",\n    tissue_image_paths = ["{tmp_path}/lab/scan 7.tif"],\n    x = 1)\n'
    )
    (row,) = bring("visium", folder, look=False).rows
    assert row.slide == given.resolve()
    given.unlink()
    with pytest.raises(ExpressionError, match=r"Space Ranger was given scan 7\.tif"):
        bring("visium", folder, look=False)


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_raw_matrix_is_taken_where_it_is_asked_for_or_alone(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data")
    outs = folder / "A1/outs"
    shutil.copy(outs / "filtered_feature_bc_matrix.h5", outs / "raw_feature_bc_matrix.h5")
    matrix(outs / "raw_feature_bc_matrix.h5", Tissue(3).counts * 2, BARCODES, GENES, None)
    whole = spots(bring("visium", folder, look=False), "A1").X.sum()
    assert spots(bring("visium", folder, look=False, where={"matrix": "raw"}), "A1").X.sum() == 2 * whole
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    assert spots(bring("visium", folder, look=False), "A1").X.sum() == 2 * whole


@pytest.mark.parametrize("alone", [False, True])
def test_segmented_cells_are_gathered_into_squares(tmp_path: Path, alone: bool) -> None:
    """Version 4 of Space Ranger: cells in place of bins, at the centre of their outlines."""
    tissue, folder = Tissue(4), visium(tmp_path / "data", "H1", bin_um=8, version=4)
    outs, mpp, um = folder / "H1/outs", 0.4, 20
    cells = outs / "segmented_outputs"
    (cells / "spatial").mkdir(parents=True)
    (cells / "spatial/scalefactors_json.json").write_text(json.dumps({"microns_per_pixel": mpp}))
    names, features = list[str](), list[dict[str, Any]]()
    for number, (x, y) in enumerate(tissue.xy.tolist(), start=1):
        ring = [[x - 3, y - 2], [x + 3, y - 2], [x + 3, y + 2], [x - 3, y + 2], [x - 3, y - 2]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "properties": {"cell_id": number}, "geometry": geometry})
        names.append(f"cellid_{number:09d}-1")
    features = [*reversed(features[1:]), {**features[0], "properties": {"cell_id": 777}}]  # one without counts
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (cells / "cell_segmentations.geojson").write_text(text)
    matrix(cells / "filtered_feature_cell_matrix.h5", tissue.counts, names, GENES, ["Gene Expression"] * len(GENES))
    if alone:
        shutil.rmtree(outs / "binned_outputs")
    said = list[str]()
    made = bring("visium", folder, where={} if alone else {"cells_um": str(um)}, look=False, said=said)
    um = 55 if alone else um
    data = spots(made, "H1")
    assert data.X.sum() == tissue.counts[1:].sum()
    square = np.floor(tissue.xy[1:] * mpp / um).astype(int)
    assert {(c, r) for c, r in square.tolist()} == set(zip(data.obs["array_col"], data.obs["array_row"], strict=True))
    first = (data.obs["array_col"] == square[0, 0]) & (data.obs["array_row"] == square[0, 1])
    same = (square == square[0]).all(axis=1)
    assert np.array_equal(data[first.to_numpy()].X.toarray()[0], tissue.counts[1:][same].sum(axis=0))
    assert np.allclose(data[first.to_numpy()].obsm["spatial"][0], (square[0] + 0.5) * um / mpp)
    assert f"{len(tissue) - 1} cells in squares of {um} µm; 1 with counts and without an outline left out" in said[0]


def test_matrices_of_several_genomes_are_refused_by_name(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data", version=2)
    with h5py.File(folder / "A1/outs/filtered_feature_bc_matrix.h5", "a") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(ExpressionError, match="it holds 2 matrices, of the genomes GRCh38, mm10"):
        bring("visium", folder, look=False)


# --- names -----------------------------------------------------------------------------------------------------------


def test_what_the_importer_writes_its_reader_takes_whatever_a_folder_is_called(tmp_path: Path) -> None:
    names = ["Patient 1 (rep2)", "Patient_1_rep2", "Prøve/Å".replace("/", "-"), "-", "患者", "x" * 150]
    said = list[str]()
    for name in names:
        visium(tmp_path / "data", name)
    made = bring("visium", tmp_path / "data", look=False, said=said)
    rows = read_manifest(tmp_path / "out/manifest.csv")
    assert len(rows) == len(names) == len({row.slide_id.lower() for row in rows})
    assert {row.patient for row in rows} == set(names)
    assert made.failed == {}
    assert "section 'Patient 1 (rep2)' is called Patient_1_rep2 in the manifest" in said


@pytest.mark.parametrize(
    "way", ["{0}/data/S1", "{0}/data/S1/", "{0}/data/../data/S1", ".", "data/S1/outs/..", "{0}/link"]
)
def test_a_folder_may_be_named_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    visium(tmp_path / "data", "S1")
    (tmp_path / "link").symlink_to(tmp_path / "data/S1")
    monkeypatch.chdir(tmp_path / "data/S1" if way == "." else tmp_path)
    folder = Path(way.format(tmp_path))
    from nh2st_pipe.datasets import import_dataset

    (row,) = import_dataset("visium", folder, tmp_path / "out/manifest.csv", lambda words: None, look=False).rows
    assert (row.slide_id, row.slide) == ("S1", (tmp_path / "data/S1/he.tif").resolve())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into any folder")
def test_a_folder_that_may_not_be_looked_into_is_left_out_alone(tmp_path: Path) -> None:
    visium(visium(tmp_path / "data", "S1"), "S2")
    (tmp_path / "data/S1").chmod(0)
    made = bring("visium", tmp_path / "data", look=False)
    assert ([row.slide_id for row in made.rows], list(made.failed)) == (["S2"], ["S1"])


def test_a_fault_of_one_section_leaves_out_that_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visium(visium(visium(tmp_path / "data", "S1"), "S2"), "S3")
    (tmp_path / "data/S1/outs/filtered_feature_bc_matrix.h5").write_bytes(b"no HDF5")
    (tmp_path / "data/S2/outs/spatial/scalefactors_json.json").write_text("{")
    made = bring("visium", tmp_path / "data", look=False)
    assert [row.slide_id for row in made.rows] == ["S3"]
    assert "filtered_feature_bc_matrix.h5 is no matrix of Space Ranger" in made.failed["S1"]
    assert "scalefactors_json.json cannot be read: it is no JSON" in made.failed["S2"]


@pytest.mark.parametrize("version", [1, 3])
def test_files_may_have_the_datasets_name_before_theirs(tmp_path: Path, version: int) -> None:
    folder = visium(tmp_path / "data", version=version)
    outs = folder / "A1/outs"
    (matrix_file,) = outs.glob("filtered_*")
    matrix_file.rename(outs / f"Human_Tonsil_{matrix_file.name}")
    assert len(spots(bring("visium", folder, look=False), "A1")) == len(Tissue(version)) - 1


def test_what_was_downloaded_and_not_unpacked_is_said(tmp_path: Path) -> None:
    (tmp_path / "data/S1").mkdir(parents=True)
    (tmp_path / "data/S1/Mouse_Brain_binned_outputs.tar.gz").write_bytes(b"")
    with pytest.raises(ExpressionError, match=r"Unpack Mouse_Brain_binned_outputs\.tar\.gz first"):
        bring("visium", tmp_path / "data", look=False)


def test_spots_outside_of_tissue_may_lie_outside_of_the_image(tmp_path: Path) -> None:
    """Space Ranger gives all 4,992 spots of a slide places, some of them negative."""
    folder = visium(tmp_path / "data")
    path = folder / "A1/outs/spatial/tissue_positions.csv"
    path.write_text(path.read_text() + "GTCACTTCCTTCTAGA-1,0,0,0,-1567,2629\n")
    made = bring("visium", folder)
    assert (made.failed, made.doubts, len(spots(made, "A1"))) == ({}, {}, len(Tissue(3)) - 1)


@pytest.mark.parametrize("ending", [".btf", ".tiff", ".TIF", ".png", ".webp", ".ome.tif", ".jp2", ".zarr"])
def test_an_image_may_be_of_any_kind_that_is_read(tmp_path: Path, ending: str) -> None:
    folder = visium(tmp_path / "data")
    own = folder / "A1/he.tif"
    image = own.with_name(f"A1_tissue_image{ending}")
    with Image.open(own) as opened:
        pixels = np.asarray(opened)
    if ending == ".zarr":
        write_ome_zarr(image, pixels, axes="yxc", levels=1, mpp=2.5)
    elif ending.lower().endswith((".tif", ".tiff", ".btf")):
        tifffile.imwrite(image, pixels, photometric="rgb", bigtiff=ending == ".btf", ome="ome" in ending)
    else:
        Image.fromarray(pixels).save(image)
    own.unlink()
    made = bring("visium", folder)
    assert (made.failed, made.doubts, made.rows[0].slide) == ({}, {}, image.resolve())
