"""Each published layout, from a generated folder to a table; a transposed reading fails in each."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anndata
import numcodecs
import numpy as np
import polars as pl
import pytest
import zarr
from numcodecs.vlen import VLenUTF8
from PIL import Image
from zarr.codecs import VLenUTF8Codec
from zarr.registry import get_codec_class

from nh2st_pipe.core.codecs import texts_counted
from nh2st_pipe.core.errors import ExpressionError, UsageError
from nh2st_pipe.data.panels import read_gene_file
from nh2st_pipe.datasets import Imported, import_dataset
from nh2st_pipe.datasets.generated import (
    GENES,
    SECTIONS,
    Tissue,
    generate_layout,
    hest,
    original,
    repackaged,
    spared,
    spatialdata,
    stimage,
    visium,
    xenium,
)
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.training.run import train

STNET = ["BC23209_C1", "BC23209_C2", "BC23270_D1"]
SKIN = ["P2_ST_rep1", "P5_ST_rep1", "P9_ST_rep2"]
MAKERS: dict[str, Callable[[Path], Path]] = {
    "her2st": SECTIONS["her2st"],
    "stnet, original": lambda folder: original(folder, STNET),
    "skin, original": lambda folder: original(folder, SKIN, skin=True),
    "stnet": lambda folder: repackaged(folder, STNET, ".tif"),
    "skin": lambda folder: repackaged(folder, SKIN, ".jpg"),
    "stimage": lambda folder: stimage(folder, ["Human_Heart_A", "Human_Heart_B", "Human_Heart_C"]),
    "hest": lambda folder: hest(folder, ["INT1", "INT2", "INT3"]),
    "spatialdata": lambda folder: spatialdata(spatialdata(folder, ["A", "B"]), ["C"], version=2),
    "visium": lambda folder: visium(visium(visium(folder, "A1"), "B1", version=1), "C1", version=2),
}


def bring(layout: str, folder: Path, *, said: list[str] | None = None, **options: Any) -> Imported:
    say = (list[str]() if said is None else said).append
    return import_dataset(layout.split(",")[0], folder, folder.parent / "out/manifest.csv", say, **options)


def spots(made: Imported, slide_id: str) -> anndata.AnnData:
    (row,) = [row for row in made.rows if row.slide_id == slide_id]
    assert row.expression is not None
    return anndata.read_h5ad(row.expression)


@pytest.mark.parametrize("layout", sorted(MAKERS))
def test_each_layout_goes_from_its_files_to_a_table(layout: str, tmp_path: Path) -> None:
    made = bring(layout, MAKERS[layout](tmp_path / "data"))
    assert (len(made.rows), made.failed, made.doubts) == (3, {}, {})  # a transposed reading leaves the tissue
    rows = read_manifest(tmp_path / "out/manifest.csv")
    assert [row.slide_id for row in rows] == [row.slide_id for row in made.rows]
    for number, row in enumerate(rows):
        data = spots(made, row.slide_id)
        seed = {"visium": (3, 1, 2), "spatialdata": (0, 1, 0)}.get(layout, (0, 1, 2))[number]
        tissue = Tissue(seed, hexagonal=layout == "visium")
        at = {(x, y): i for i, (x, y) in enumerate(tissue.xy.tolist())}
        place = [at[x, y] for x, y in data.obsm["spatial"].tolist()]
        assert (data.X.toarray() == tissue.counts[place]).all()
        assert data.var_names.tolist() == GENES
        assert data.obs["array_row"].tolist() == tissue.row[place].tolist()
        assert data.obs["array_col"].tolist() == tissue.col[place].tolist()
        assert len(data) == len(tissue) - {"hest": 2, "visium": 1}.get(layout, 0)
    assert made.picture is not None
    with Image.open(made.picture) as picture_of_all:
        assert picture_of_all.width > 500
    store = tmp_path / "s.zarr"
    assert embed(tmp_path / "out/manifest.csv", encoder="fake", store=store, tile_px=40).failed == {}
    run = train(store, recipe="ridge", genes=6, folds="slide", out=tmp_path / "run")
    assert run.metrics["summary"]["pcc"] > 0.1  # colours tell counts: the joins are right


def test_patients_and_resolution_are_as_published(tmp_path: Path) -> None:
    made = bring("stnet", repackaged(tmp_path / "a/data", STNET, ".tif"))
    assert [row.patient for row in made.rows] == ["BC23209", "BC23209", "BC23270"]
    assert made.rows[0].mpp == pytest.approx(200 / 40, rel=1e-3)
    made = bring("skin", repackaged(tmp_path / "b/data", ["P10_ST_rep1", "P2_ST_rep3"], ".jpg"))
    assert [(row.patient, row.mpp) for row in made.rows] == [("P10", None), ("P2", None)]
    made = bring("hest", hest(tmp_path / "c/data", ["ZEN40", "ZEN41", "ZEN42"]))
    assert [row.patient for row in made.rows] == ["Patient 0", "Patient 0", "Patient 1"]
    assert {(row.mpp, row.extra["organ"]) for row in made.rows} == {(2.5, "Breast")}
    made = bring("visium", visium(tmp_path / "d/data", "H1", bin_um=8))
    assert [(row.slide_id, row.mpp) for row in made.rows] == [("H1", 0.4)]
    assert spots(made, "H1").var["gene_id"].iloc[0] == "ENSG00000000000"


def test_a_section_of_geo_whose_image_is_packed_is_unpacked(tmp_path: Path) -> None:
    folder = original(tmp_path / "data", SKIN, skin=True)
    packed = folder / "GSM4284301_P5_ST_rep1.jpg"
    packed.rename(packed.with_name(packed.name + ".gz"))
    plain = packed.with_name(packed.name + ".gz").read_bytes()
    made = bring("skin", folder, look=False)
    assert "cannot be unpacked" in made.failed["P5_ST_rep1"]
    assert [row.patient for row in made.rows] == ["P2", "P9"]
    packed.with_name(packed.name + ".gz").write_bytes(gzip.compress(plain))
    made = bring("skin", folder)
    assert (made.rows[1].slide.name, made.failed, made.doubts) == (packed.name, {}, {})
    assert made.rows[1].slide.read_bytes() == plain


def test_slides_of_spared_are_put_together_from_their_patches(tmp_path: Path) -> None:
    folder = spared(tmp_path / "data", ["A_1", "B_1", "C_1"])
    made = bring("spared", folder)
    assert (made.failed, made.doubts) == ({}, {})
    assert [(row.slide_id, row.patient, row.extra) for row in made.rows] == [
        ("A_1", "P0", {"split": "train"}),
        ("B_1", "P1", {"split": "train"}),
        ("C_1", "P2", {"split": "test"}),
    ]
    whole = anndata.read_h5ad(folder / "a_dataset/2024/adata.h5ad")
    for number, row in enumerate(made.rows):
        data, tissue = spots(made, row.slide_id), Tissue(number)
        assert (data.X.toarray() == tissue.counts).all()
        assert data.var_names.tolist() == GENES
        assert data.var["gene_id"].iloc[1] == "ENSG00000000001"
        own = np.asarray(whole[whole.obs["slide_id"] == row.slide_id].obsm["patches_scale_1.0"])
        slide = open_slide(row.slide)
        for i in (0, 17, 59):
            tile = read_tile(slide, tuple(data.obsm["spatial"][i]), 224, 224, "bicubic")
            assert np.array_equal(tile, own[i].reshape(224, 224, 3))
            x, y = (int(place) for place in tissue.xy[i])
            drawn = np.asarray(tissue.drawn().crop((x - 8, y - 8, x + 8, y + 8)), np.float64)
            assert np.abs(tile.mean(axis=(0, 1)) - drawn.mean(axis=(0, 1))).max() < 5
        step = np.diff(data.obsm["spatial"][:2], axis=0)[0]
        assert step.tolist() == [40 * 224 / 16, 0]
    assert [row.slide_id for row in bring("spared", folder, where={"split": "test"}, look=False).rows] == ["C_1"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("where", [{}, {"cells_um": "100"}])
def test_xenium_is_gathered_into_squares_on_its_image(turned: bool, where: dict[str, str], tmp_path: Path) -> None:
    made = bring("xenium", xenium(tmp_path / "data", turned=turned), where=where)
    assert (len(made.rows), made.failed, made.doubts) == (1, {}, {})
    assert made.rows[0].mpp == pytest.approx(2.5)
    data, tissue = spots(made, "A1"), Tissue(0)
    xy = np.column_stack((320 - tissue.xy[:, 1], tissue.xy[:, 0])) if turned else tissue.xy
    place = [np.abs(xy - at).sum(1).argmin() for at in data.obsm["spatial"]]
    assert np.allclose(xy[place], data.obsm["spatial"], atol=1e-6)
    assert (data[:, GENES].X.toarray() == tissue.counts[place]).all()
    assert sorted(data.var_names) == sorted(GENES)
    assert data.obs["array_col"].tolist() == (tissue.col[place] - 1).tolist()
    assert data.obs["array_row"].tolist() == (tissue.row[place] - 1).tolist()


def test_of_a_spatialdata_store_image_and_table_are_chosen(tmp_path: Path) -> None:
    folder = spatialdata(tmp_path / "data", ["A"])
    made = bring("spatialdata", folder / "A.zarr", where={"image": "a_low"}, look=False)
    assert made.rows[0].slide.name == "a_low"
    assert spots(made, "A").obsm["spatial"].tolist() == (Tissue(0).xy / 4 + (5, 10)).tolist()
    shutil.copytree(folder / "A.zarr/tables/table", folder / "A.zarr/tables/other")
    for where, image in (({"table": "other"}, "full"), ({"table": "other", "image": "a_low"}, "a_low")):
        (row,) = bring("spatialdata", folder, where=where, look=False).rows
        assert row.slide.name == image
    with pytest.raises(UsageError, match=r"--where leaves several readings of A: say one image and table"):
        bring("spatialdata", folder, where={"table": "*", "image": "*"}, look=False)
    (folder / "A.zarr/shapes/spots/shapes.parquet").unlink()
    with pytest.raises(ExpressionError, match=r"there is no .*shapes\.parquet"):
        bring("spatialdata", folder, look=False)


def test_squares_of_xenium_are_as_large_as_asked(tmp_path: Path) -> None:
    folder = xenium(tmp_path / "data", cells=False)
    made = bring("xenium", folder, where={"bin_um": "200"}, look=False)
    assert spots(made, "A1").X.sum() == Tissue(0).counts.sum()
    assert len(spots(made, "A1")) == 6 * 3
    for where, lost, words in (
        ({"cells_um": "50"}, "outs/cells.parquet", r"cells\.parquet is missing"),
        ({}, "A1_he_image.tif", "no image of H&E in"),
        ({}, "A1_he_imagealignment.csv", "no alignment of the H&E image"),
    ):
        (folder / "A1" / lost).unlink(missing_ok=True)
        with pytest.raises(ExpressionError, match=words):
            bring("xenium", folder, where=where, look=False)


def test_of_visium_hd_the_bin_is_chosen(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data", "H1", bin_um=8, version=4)
    visium(folder, "H1", bin_um=16, version=5)
    visium(folder, "H2", bin_um=2, version=6)
    for where, tissues in ({}, {"H1": 4, "H2": 6}), ({"bin_um": "16"}, {"H1": 5}):
        made = bring("visium", folder, where=where, look=False)
        assert sorted(row.slide_id for row in made.rows) == sorted(tissues)
        for name, seed in tissues.items():
            first, place = spots(made, name)[0], Tissue(seed).xy.tolist()
            at = place.index(first.obsm["spatial"][0].tolist())
            assert first.X.toarray().ravel().tolist() == Tissue(seed).counts[at].tolist()


def test_places_of_pcw_and_mouse_are_no_whole_numbers(tmp_path: Path) -> None:
    made = bring("stimage", stimage(tmp_path / "data", ["Human_Heart_PCW"], floats=True))
    data = spots(made, "Human_Heart_PCW")
    assert data.obs["array_row"].tolist() == Tissue(0).row.tolist()
    assert data.obs["array_col"].tolist() == Tissue(0).col.tolist()


def test_hest_is_chosen_from_by_what_is_known_of_its_samples(tmp_path: Path) -> None:
    folder = hest(hest(tmp_path / "data", ["INT1", "INT2"], organ="Kidney"), ["TENX99"], organ="Lung", table=True)
    for where, kept in (
        ({"organ": "kidney"}, ["INT1", "INT2"]),
        ({"id": "ten*"}, ["TENX99"]),
        ({"species": "Homo*", "organ": "Kidney", "patient": "Patient 0"}, ["INT1", "INT2"]),
    ):
        assert [row.slide_id for row in bring("hest", folder, where=where, look=False).rows] == kept
    with pytest.raises(UsageError, match=r"--where organ=Skin leaves no section; there is Kidney, Lung"):
        bring("hest", folder, where={"organ": "Skin"})
    with pytest.raises(UsageError, match=r"nothing is called 'organs'; did you mean 'organ'\?"):
        bring("hest", folder, where={"organs": "Skin"})


def test_a_task_of_the_hest_benchmark_brings_its_folds_and_genes(tmp_path: Path) -> None:
    folder = hest(tmp_path / "data", ["INT1", "INT2", "TENX99"])
    splits = folder / "bench/IDC/splits"
    splits.mkdir(parents=True)
    for fold, samples in enumerate((["TENX99"], ["INT2", "MISC1"])):
        rows = "".join(f"{name},patches/{name}.h5,adata/{name}.h5ad\n" for name in samples)
        (splits / f"test_{fold}.csv").write_text(f"sample_id,patches_path,expr_path\n{rows}")
    panel = splits.parent / "var_50genes.json"
    panel.write_text(json.dumps({"genes": GENES[3:8]}))
    said = list[str]()
    made = import_dataset("hest", folder, tmp_path / "out/manifest.csv", said.append, where={"task": "IDC"}, look=False)
    assert [(row.slide_id, row.extra["fold"]) for row in made.rows] == [("INT2", "1"), ("TENX99", "0")]
    assert "task IDC: 1 of its 3 samples are not in st/: MISC1" in said
    assert said[1] == f"task IDC: --where task=IDC takes its samples; then train with --folds fold --genes {panel}"
    store = tmp_path / "s.zarr"
    embed(tmp_path / "out/manifest.csv", encoder="fake", store=store, tile_px=40)
    run = train(store, recipe="ridge", genes=panel, folds="fold", out=tmp_path / "run", settings=["baselines=[]"])
    assert [fold["fold"] for fold in run.metrics["folds"]] == ["0", "1"]
    assert len(bring("hest", folder, look=False).rows) == 3  # without a task, each sample once
    said.clear()
    (splits / "test_2.csv").write_text("sample_id\nINT2\n")
    import_dataset("hest", folder, tmp_path / "b/manifest.csv", said.append, look=False)
    assert said[0] == "task IDC is passed over: INT2 is judged in the folds 1 and 2"
    panel.write_text("{")
    with pytest.raises(UsageError, match="no JSON with a list of genes"):
        read_gene_file(panel)


def test_stages_after_conception_are_read_from_names(tmp_path: Path) -> None:
    folder = stimage(tmp_path / "data", ["Human_Heart_4.5-5PCW_1", "Human_Heart_9PCW_2", "Human_Heart_A"])
    rows = bring("stimage", folder, look=False).rows
    assert [row.extra.get("stage", "") for row in rows] == ["4.5-5PCW", "9PCW", ""]
    assert len(bring("stimage", folder, where={"stage": "9*"}, look=False).rows) == 1


@pytest.mark.parametrize(
    ("layout", "lost", "words"),
    [
        ("stnet", "ST-spotfiles/BC23209_C2_selection.tsv", r"BC23209_C2_selection\.tsv is missing"),
        ("stnet", "ST-cnts/BC23209_C2_sub.parquet", r"BC23209_C2_sub\.parquet is missing"),
        ("stnet", "ST-imgs/BC23209_C2.tif", "no image for section BC23209_C2"),
        ("stnet, original", "spots_BC23209_C2.csv.gz", r"spots_BC23209_C2\.csv is missing"),
        ("stnet, original", "HE_BC23209_C2.jpg", "no image for section BC23209_C2"),
        ("skin, original", "GSM4284301_spot_data-selection-P5_ST_rep1.tsv.gz", r"spot_data-selection-P5_ST_rep1\.tsv"),
        ("stimage", "coord/Human_Heart_B_coord.csv", r"Human_Heart_B_coord\.csv is missing"),
        ("stimage", "gene_exp/Human_Heart_B_count.csv", r"Human_Heart_B_count\.csv is missing"),
        ("hest", "wsis/INT2.tif", "no image for INT2"),
        ("hest", "metadata/INT2.json", r"metadata.INT2\.json is missing"),
        ("visium", "B1/he.tif", "no image of the microscope"),
        ("visium", "B1/outs/spatial/tissue_positions_list.csv", "there is no tissue_positions"),
        ("visium", "B1/outs/filtered_feature_bc_matrix/matrix.mtx.gz", r"there is no matrix\.mtx\.gz"),
    ],
)
def test_a_missing_file_is_named_and_the_other_sections_go_on(
    layout: str, lost: str, words: str, tmp_path: Path
) -> None:
    folder = MAKERS[layout](tmp_path / "data")
    (folder / lost).unlink()
    made = bring(layout, folder, look=False)
    assert len(made.rows) == 2
    (cause,) = made.failed.values()
    assert re.search(words, cause), cause
    for stray in ("ST-cnts", "gene_exp", "st"):  # what macOS leaves on other systems' disks
        if (folder / stray).is_dir():
            (folder / stray / "._x.h5ad").write_bytes(b"\x00\x05\x16\x07")
    assert len(bring(layout, folder, look=False).rows) == 2


def test_names_that_do_not_match_are_shown_from_both_sides(tmp_path: Path) -> None:
    folder = stimage(tmp_path / "data", ["Human_Heart_A", "Human_Heart_B"])
    path = folder / "coord/Human_Heart_A_coord.csv"
    table = pl.read_csv(path)
    table.with_columns(pl.col(table.columns[0]).str.replace("Human", "human")).write_csv(path)
    made = bring("stimage", folder, look=False)
    assert "no spot in common: Human_Heart_A_1x1" in made.failed["Human_Heart_A"]
    assert "and 57 more in the one, human_Heart_A_12x5" in made.failed["Human_Heart_A"]
    for file in folder.glob("coord/*"):
        file.unlink()
    with pytest.raises(ExpressionError, match=r"none of 2 sections in .* can be used; Human_Heart_A: .* is missing"):
        bring("stimage", folder)


def test_genes_that_stand_twice_are_added_up_and_said(tmp_path: Path) -> None:
    folder = visium(tmp_path / "data", "A1")
    import h5py

    with h5py.File(folder / "A1/outs/filtered_feature_bc_matrix.h5", "r+") as file:
        names = GENES.copy()
        names[5] = "G2"
        file["matrix/features/name"][...] = np.array(names, "S")
    said = list[str]()
    made = import_dataset("visium", folder, tmp_path / "out/manifest.csv", said.append, look=False)
    data = spots(made, "A1")
    tissue, rest = Tissue(3), [i for i in range(len(Tissue(3))) if i != 7]
    assert data.var_names.tolist() == [gene for gene in GENES if gene != "G5"]
    assert data[:, "G2"].X.toarray().ravel().tolist() == (tissue.counts[rest, 2] + tissue.counts[rest, 5]).tolist()
    assert data.var["gene_id"].tolist()[2] == "ENSG00000000002"
    assert "counts of 1 genes that stand twice are added up (G2)" in said[0]


def test_spots_beside_their_tissue_are_doubted_and_drawn(tmp_path: Path) -> None:
    folder = hest(tmp_path / "data", ["INT1"])
    data = anndata.read_h5ad(folder / "st/INT1.h5ad")
    data.obs["pxl_col_in_fullres"], data.obs["pxl_row_in_fullres"] = (
        data.obs["pxl_row_in_fullres"].to_numpy(),
        data.obs["pxl_col_in_fullres"].to_numpy(),
    )
    data.write_h5ad(folder / "st/INT1.h5ad")
    made = bring("hest", folder)
    assert set(made.doubts) == {"INT1"}
    assert made.picture is not None
    assert made.picture.is_file()


def test_old_and_odd_h5ad_files_are_read(tmp_path: Path) -> None:
    folder = hest(tmp_path / "data", ["INT1", "INT2", "INT3"])
    dense = anndata.read_h5ad(folder / "st/INT1.h5ad")
    dense.X = dense.X.toarray()
    dense.obs = dense.obs.drop(columns=["pxl_row_in_fullres", "pxl_col_in_fullres", "array_row"])
    dense.write_h5ad(folder / "st/INT1.h5ad")
    (folder / "patches/INT1.h5").unlink()
    csc = anndata.read_h5ad(folder / "st/INT2.h5ad")
    csc.X = csc.X.tocsc()
    csc.write_h5ad(folder / "st/INT2.h5ad")
    (folder / "st/INT3.h5ad").write_bytes(b"junk")
    made = bring("hest", folder, look=False)
    assert spots(made, "INT1").X.toarray().tolist() == Tissue(0).counts.tolist()
    assert spots(made, "INT1").obsm["spatial"].tolist() == Tissue(0).xy.tolist()
    assert spots(made, "INT2").X.toarray().tolist() == Tissue(1).counts[2:].tolist()
    assert "INT3.h5ad cannot be read" in made.failed["INT3"]


def test_the_command_says_what_is_left_out_and_exits_with_1(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nh2st_pipe.cli.app import app

    folder = hest(tmp_path / "data", ["INT1", "INT2"])
    (folder / "wsis/INT2.tif").unlink()
    call = ["manifest", "hest", str(folder), "--out", str(tmp_path / "m.csv"), "--where", "id=INT*"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1
    assert "1 slides of 1 patient" in done.output
    assert "failed: INT2: no image for INT2" in done.output
    assert json.loads((folder / "metadata/INT1.json").read_text())["patient"] == "Patient 0"


@pytest.mark.parametrize("columns", [5, 6, 7])
def test_a_list_of_positions_without_a_header_may_have_more_columns_and_no_fewer(tmp_path: Path, columns: int) -> None:
    folder = visium(tmp_path / "data", "A1", version=1)
    (path,) = folder.rglob("tissue_positions_list.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("".join(",".join([*row, "more"][:columns]) + "\n" for row in rows))
    if columns == 5:
        with pytest.raises(ExpressionError, match=r"tissue_positions_list\.csv lacks"):
            bring("visium", folder)
    else:
        assert len(bring("visium", folder).rows) == 1


def test_a_spatialdata_store_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    folder = spatialdata(tmp_path / "data", ["A"], version=2)
    array = next(iter((folder / "A.zarr/tables").rglob(".zarray")))
    array.write_text(json.dumps({**json.loads(array.read_text()), "filters": [{"id": "pickle"}]}))
    with pytest.raises(ExpressionError, match="packed with the codec 'pickle', which runs code that it finds"):
        bring("spatialdata", folder)


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_that_declares_more_texts_than_it_holds_takes_no_memory_for_them(
    tmp_path: Path, version: Literal[2, 3]
) -> None:
    folder = spatialdata(tmp_path / "data", ["A"], version=version)
    key = folder / "A.zarr/tables/table/uns/spatialdata_attrs/instance_key"
    assert zarr.open_array(key, mode="r")[()] == "spot_id"
    compressors = json.loads((key / ".zarray").read_text())["compressor"] if version == 2 else {"id": "zstd"}
    codec = numcodecs.get_codec(compressors)
    (chunk,) = (path for path in key.rglob("*") if path.name == ("0" if version == 2 else "c"))
    plain = bytes(codec.decode(chunk.read_bytes()))
    chunk.write_bytes(codec.encode((268_435_457).to_bytes(4, "little") + plain[4:]))  # of eight bytes each: 2.1 GB
    with pytest.raises(ExpressionError, match=r"268,435,457 texts are declared in a chunk of 15 bytes \(at 'inst"):
        bring("spatialdata", folder)
    with texts_counted(), pytest.raises(ValueError, match="268,435,457 texts"):
        zarr.open_array(key, mode="r")[()]
    assert type(numcodecs.get_codec({"id": "vlen-utf8"})) is VLenUTF8  # elsewhere nothing is changed
    assert get_codec_class("vlen-utf8") is VLenUTF8Codec


@pytest.mark.parametrize("missing", ["", "NA", "nan", "NULL"])
def test_a_count_that_is_missing_is_no_count(tmp_path: Path, missing: str) -> None:
    folder = stimage(tmp_path / "data", ["Human_Heart_A"])
    path = folder / "gene_exp/Human_Heart_A_count.csv"
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, ",".join([*first.split(",")[:-1], missing]), *rest]) + "\n")
    with pytest.raises(ExpressionError, match=r"_count\.csv: values are missing in 1 columns \(G11\)"):
        bring("stimage", folder, look=False)


MINE = """from nh2st_pipe.datasets.spotfiles import find_her2st

def find(folder, say):
    say("found by a function of my own")
    return find_her2st(folder, say)

nothing = 3
"""


def test_a_layout_may_be_somebodys_own(tmp_path: Path) -> None:
    generate_layout("her2st", tmp_path / "data")
    (tmp_path / "mine.py").write_text(MINE)
    said = list[str]()
    made = import_dataset(f"{tmp_path}/mine.py:find", tmp_path / "data", tmp_path / "m.csv", said.append, look=False)
    ours = import_dataset("her2st", tmp_path / "data", tmp_path / "o.csv", said.append, look=False)
    assert [row.slide_id for row in made.rows] == [row.slide_id for row in ours.rows]
    assert "found by a function of my own" in said
    with pytest.raises(UsageError, match=r"mine\.py:nothing .* is no function"):
        import_dataset(f"{tmp_path}/mine.py:nothing", tmp_path / "data", tmp_path / "m.csv")
    with pytest.raises(UsageError, match="there is no absent in it"):
        import_dataset(f"{tmp_path}/mine.py:absent", tmp_path / "data", tmp_path / "m.csv")
