"""The her2st importer: on a generated folder of that layout, and on the real sections where they are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import polars as pl
import pytest
from PIL import Image

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.datasets import import_dataset
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.training.run import train


def layout(folder: Path, section: str = "B1") -> Path:
    """A section of three spots, wider than high, so that a transposed reading would leave the image."""
    (folder / "ST-imgs/B" / section).mkdir(parents=True)
    (folder / "ST-cnts").mkdir(exist_ok=True)
    (folder / "ST-spotfiles").mkdir(exist_ok=True)
    Image.new("RGB", (900, 300), "pink").save(folder / f"ST-imgs/B/{section}/slide.jpg")
    with gzip.open(folder / f"ST-cnts/{section}.tsv.gz", "wt") as file:
        file.write("\tG1\tG2\n8x1\t1\t0\n2x2\t0\t7\n5x1\t3\t4\n9x9\t1\t1\n")
    (folder / f"ST-spotfiles/{section}_selection.tsv").write_text(
        "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
        "2\t2\t2.0\t2.0\t200.0\t200.0\t1\n5\t1\t5.0\t1.0\t500.0\t100.0\t1\n8\t1\t8.0\t1.0\t800.0\t100.0\t1\n"
        "3\t3\t3.0\t3.0\t300.0\t300.0\t1\n"
    )
    return folder


def test_spots_are_joined_by_name_and_x_is_the_width(tmp_path: Path) -> None:
    said: list[str] = []
    import_dataset("her2st", layout(tmp_path / "data"), tmp_path / "out/manifest.csv", said.append)
    (row,) = read_manifest(tmp_path / "out/manifest.csv")
    assert (row.slide_id, row.patient) == ("B1", "B")
    assert row.mpp == pytest.approx(2.0)  # 200 µm over 100 px
    assert row.expression is not None
    data = anndata.read_h5ad(row.expression)
    assert list(data.obs_names) == ["8x1", "2x2", "5x1"]
    assert data.X.toarray().tolist() == [[1, 0], [0, 7], [3, 4]]
    assert data.obsm["spatial"].tolist() == [[800, 100], [200, 200], [500, 100]]
    assert data.obs["array_col"].tolist() == [8, 2, 5]
    assert data.obs["array_row"].tolist() == [1, 2, 1]
    words = "1 with counts and without places left out; 1 with places and without counts left out; 2.0000 µm per px"
    assert f"3 spots × 2 genes; {words}" in said[0]
    summary = embed(tmp_path / "out/manifest.csv", encoder="fake", store=tmp_path / "s.zarr")
    assert summary.failed == {}  # a transposed reading would put spots outside the image


def test_what_an_operating_system_leaves_is_no_data_and_a_section_is_read_once(tmp_path: Path) -> None:
    folder, said = layout(tmp_path / "data"), list[str]()
    for name in ("ST-cnts/._B1.tsv.gz", "ST-cnts/._B1.tsv", "ST-imgs/B/B1/._slide.jpg", "ST-imgs/B/B1/.DS_Store"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "ST-imgs/.Trashes/B1").mkdir(parents=True)
    (folder / "ST-imgs/.Trashes/B1/old.jpg").touch()
    (folder / "ST-cnts/B1.tsv").write_text("\tG1\n8x1\t9\n")
    import_dataset("her2st", folder, tmp_path / "out/manifest.csv", said.append)
    (row,) = read_manifest(tmp_path / "out/manifest.csv")
    assert row.expression is not None
    assert anndata.read_h5ad(row.expression).shape == (3, 2)
    assert said[0] == "B1.tsv is passed over: B1.tsv.gz is the same section"
    assert list((tmp_path / "out/expression").iterdir()) == [row.expression]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def attempt() -> None:
        import_dataset("her2st", tmp_path, tmp_path / "m.csv", lambda _: None)

    layout(tmp_path)
    (tmp_path / "ST-spotfiles/B1_selection.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(ExpressionError, match="lacks the columns pixel_x"):
        attempt()
    (tmp_path / "ST-spotfiles/B1_selection.tsv").unlink()
    with pytest.raises(ExpressionError, match=r"B1_selection\.tsv is missing"):
        attempt()
    (tmp_path / "ST-imgs/B/B1/slide.jpg").unlink()
    with pytest.raises(ExpressionError, match="no image for section B1"):
        attempt()
    assert not (tmp_path / "m.csv").exists()


@pytest.fixture(scope="module")
def real(her2st: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("her2st")
    import_dataset("her2st", her2st, folder / "manifest.csv", lambda _: None)
    return folder


@pytest.mark.timeout(300)
def test_the_real_sections_import_embed_and_train(real: Path, her2st: Path) -> None:
    rows = read_manifest(real / "manifest.csv")
    assert [(r.slide_id, r.patient) for r in rows] == [(s, "C") for s in ("C2", "C3", "C4", "C5")]
    summary = embed(real / "manifest.csv", encoder="fake", store=real / "s.zarr", tile_px=224)
    assert (summary.encoded_tiles, summary.failed) == (187 + 180 + 184 + 181, {})
    store = open_store(real / "s.zarr")
    for slide_id in ("C2", "C5"):
        data = store.read(slide_id)
        raw = pl.read_csv(her2st / f"ST-cnts/{slide_id}.tsv.gz", separator="\t")
        spot = data.barcodes[17]
        expected = raw.filter(pl.col(raw.columns[0]) == spot).drop(raw.columns[0]).row(0)
        assert data.counts is not None
        assert data.counts[17].toarray().ravel().tolist() == list(expected)
        assert data.genes == raw.columns[1:]
    # Colours alone, with context, say something about expression: the joins are right from end to end.
    run = train(
        real / "s.zarr",
        recipe="ridge-context",
        folds="slide",
        out=real / "run",
        settings=["head.alpha=300", "choose={}", "baselines=[mean]"],
    )
    assert run.metrics["summary"]["pcc"] > 0.2
    assert run.metrics["summary"]["mse"] < run.metrics["baselines"]["mean"]["summary"]["mse"]


def test_real_embeddings_of_a_section_are_timms(
    real: Path, her2st: Path, lite0_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corner of C2 through the whole of stage one, against timm on tiles cut by hand."""
    import timm
    import torch
    from safetensors.torch import load_file

    row = read_manifest(real / "manifest.csv")[0]
    assert row.expression is not None
    few = anndata.read_h5ad(row.expression)[:6].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    (tmp_path / "m.csv").write_text(f"slide_id,slide,expression\nC2,{row.slide},few.h5ad\n")
    embed(
        tmp_path / "m.csv", encoder="efficientnet-lite0", weights=lite0_weights, store=tmp_path / "s.zarr", tile_px=224
    )
    data = open_store(tmp_path / "s.zarr").read("C2")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    image = np.asarray(Image.open(row.slide))
    model: Any = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(lite0_weights))
    model.reset_classifier(0)
    for i, (x, y) in enumerate(data.xy):
        left, top = round(x - 112), round(y - 112)
        tile = torch.from_numpy(image[top : top + 224, left : left + 224].copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model(tile / 127.5 - 1)[0]
        assert np.allclose(data.views[i, 0], expected, atol=5e-3)
    assert np.allclose(data.xy[:, 0], few[data.barcodes].obsm["spatial"][:, 0])
