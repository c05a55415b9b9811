"""Stores of every format so far are read, upgraded and gone on with; what is damaged or too new is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pydantic
import pytest

from nh2st_pipe.core.errors import DamageError, ResourceError, StoreError
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.store.format import KEY, Resolved, SlideState, signed
from nh2st_pipe.store.graph import graph_of, table_of
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.upgrade import upgrade
from nh2st_pipe.store.verify import verify
from nh2st_pipe.tiles.neighbours import nearest_spots
from tests.conftest import Study

STORES = Path(__file__).parents[1] / "stores"
MANIFEST = STORES / "v1" / "slides" / "manifest.csv"


@pytest.fixture(params=["v1", "v2"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORES / request.param, tmp_path / request.param))


def test_a_store_of_an_earlier_format_is_read_as_it_is_and_upgraded(old: Path) -> None:
    whole = old / "whole"
    before = {name: open_store(whole).read(name) for name in ("s0", "s1")}
    assert upgrade(whole) == ["s0", "s1"]
    assert upgrade(whole) == []
    with pytest.raises(StoreError, match="there is no store at"):
        upgrade(old / "none")
    assert not (old / "none").exists()
    fresh = old / "fresh"
    embed(MANIFEST, encoder="fake", store=fresh, tile_px=48, views=8, device="cpu")
    for store in (open_store(whole), open_store(fresh)):
        assert store.format == 3
        assert not verify(store.location).damaged
        for name, then in before.items():
            now = store.read(name)
            assert (now.patient, now.extra, now.genes, now.barcodes) == (
                then.patient,
                {"site": "breast"},
                then.genes,
                then.barcodes,
            )
            for element in ("xy", "neighbours", "array_row", "array_col"):
                assert np.array_equal(getattr(now, element), getattr(then, element)), element
            if store.location.path == whole:
                assert np.array_equal(now.views, then.views)
            else:  # encoded anew, on a processor that may add up in another order
                assert np.allclose(now.views.astype(np.float32), then.views, atol=2e-3)
            assert now.counts is not None
            assert then.counts is not None
            assert np.array_equal(now.counts.toarray(), then.counts.toarray())
    summary = embed(MANIFEST, store=whole, device="cpu")
    lacking = ["s0", "s1"] if old.name == "v1" else []  # format 1 did not have them
    assert (summary.encoded_tiles, summary.stain_shifts) == (0, lacking)
    assert embed(MANIFEST, store=whole, device="cpu").kept == ["s0", "s1"]
    for name in ("s0", "s1"):
        # Columns of obs that were there stay: format 1 had them twice.
        assert len(files_of(whole / "slides" / name)) + 1 <= (51 if old.name == "v1" else 45)


def test_what_an_earlier_format_kept_in_uns_is_in_the_record(old: Path) -> None:
    whole = old / "whole"
    then = open_store(whole).read("s0").uns
    upgrade(whole)
    store = open_store(whole)
    record, now = store.record("s0"), store.read("s0").uns
    assert record is not None
    assert record.resolved == Resolved(
        width=200, height=200, mpp=0.5, mpp_source="manifest", tile_level0_px=48.0, reader=""
    )
    (pictures,) = then["spatial"]["s0"]["images"].values()
    assert np.array_equal(now["spatial"]["s0"]["images"]["hires"], pictures)
    assert now["image"]["fingerprint"] == then["image"].get("fingerprint", now["image"]["fingerprint"])
    assert "/" not in now["image"]["path"]  # nothing of the machine it was made on


def test_a_slide_that_was_cut_short_before_its_first_tile_is_begun_anew_after_an_upgrade(tmp_path: Path) -> None:
    store = Path(shutil.copytree(STORES / "v2", tmp_path / "v2")) / "interrupted"
    record = store / "slides/s1/zarr.json"
    state = json.loads(record.read_text())["attributes"][KEY]["state"]
    change(record, {"state": {**state, "ready": False, "partial": 0}}, sign=True)
    shutil.rmtree(store / "slides/s1/embedding/uns")
    assert upgrade(store) == ["s0"]
    assert embed(MANIFEST, store=store, device="cpu").encoded_tiles == 16


@pytest.mark.parametrize("where", ["SlideFiles", "as_png"])
def test_a_disk_that_is_full_is_no_damage_of_a_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whose folder nobody should delete for it."""
    old = Path(shutil.copytree(STORES / "v2", tmp_path / "v2")) / "whole"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"nh2st_pipe.store.upgrade.{where}", full)
    with pytest.raises(ResourceError, match=r"slide s0 could not be upgraded for want of resources: .*No space left"):
        upgrade(old)
    monkeypatch.undo()
    assert upgrade(old) == ["s0", "s1"]
    assert not verify(old).damaged


def test_no_count_of_a_record_is_below_zero() -> None:
    assert SlideState(tiles=0, rows=0, partial=0).tiles == 0
    for key in ("tiles", "rows", "partial"):
        with pytest.raises(pydantic.ValidationError):
            SlideState(**{"tiles": 1, key: -1})


def test_a_damaged_slide_is_not_upgraded(tmp_path: Path) -> None:
    old = Path(shutil.copytree(STORES / "v2", tmp_path / "v2")) / "whole"
    file = old / "slides/s1/embedding/obs/barcode/c/0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match="slide s1 is damaged: embedding/obs/barcode/c/0 has"):
        upgrade(old)
    store = open_store(old)
    assert (store.format, len(store.read("s0"))) == (2, 16)


def test_an_interrupted_store_of_an_earlier_format_is_upgraded_and_gone_on_with(old: Path) -> None:
    store = old / "interrupted"
    assert (open_store(store).slides(), open_store(store).incomplete()) == (["s0"], ["s1"])
    with pytest.raises(StoreError, match=rf"format {old.name[1]}; nh2st-pipe upgrade .*interrupted makes it format 3"):
        embed(MANIFEST, store=store, device="cpu")
    upgrade(store)
    assert embed(MANIFEST, store=store, device="cpu").encoded_tiles == 16 - 6
    embed(MANIFEST, encoder="fake", store=old / "fresh", tile_px=48, views=1, device="cpu")
    for name in ("s0", "s1"):
        assert np.array_equal(open_store(store).read(name).views, open_store(old / "fresh").read(name).views)


def test_an_encoder_field_that_did_not_exist_yet_has_its_default(tmp_path: Path) -> None:
    store = Path(shutil.copytree(STORES / "v1", tmp_path / "v1")) / "whole"
    meta = json.loads((store / "zarr.json").read_text())
    contract = meta["attributes"][KEY]
    assert contract["identity"].pop("interpolation") == "bicubic"  # the default
    (store / "zarr.json").write_text(json.dumps(meta))
    upgrade(store)
    assert embed(MANIFEST, encoder="fake", store=store, device="cpu").encoded_tiles == 0
    contract["identity"]["input_px"] = 96
    contract["format"] = 3
    (store / "zarr.json").write_text(json.dumps({**meta, "attributes": {KEY: signed(contract)}}))
    with pytest.raises(StoreError, match="encoder fake with input_px 96, not 64"):
        embed(MANIFEST, encoder="fake", store=store, device="cpu")


def change(path: Path, what: dict[str, object], *, sign: bool) -> None:
    meta = json.loads(path.read_text())
    values = {**meta["attributes"][KEY], **what}
    values.pop("check")
    meta["attributes"][KEY] = signed(values) if sign else {**values, "check": "00000000"}
    path.write_text(json.dumps(meta))


def test_a_newer_or_damaged_root_is_refused(study: Study) -> None:
    study.embed()
    root = study.folder / "store.zarr" / "zarr.json"
    text = root.read_text()
    change(root, {"format": 4}, sign=True)
    with pytest.raises(StoreError, match="store format 4, and this version of nh2st-pipe reads format 3 and older"):
        open_store(study.folder / "store.zarr")
    root.write_text(text.replace('"size_level0_px": 48', '"size_level0_px": 49'))
    with pytest.raises(StoreError, match="its root's attribute 'nh2st_pipe' does not have the checksum"):
        open_store(study.folder / "store.zarr")
    root.write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="is not an embedding store"):
        open_store(study.folder / "store.zarr")
    root.write_text(text.replace('"zarr_format": 3', '"zarr_format": 2'))
    with pytest.raises(StoreError, match="no Zarr v3 group"):
        open_store(study.folder / "store.zarr")


def test_a_damaged_record_hurts_its_slide_alone(study: Study) -> None:
    study.embed()
    path = study.folder / "store.zarr"
    record = path / "slides/s1/zarr.json"
    text = record.read_text()

    def damaged(message: str) -> None:
        store = open_store(path)
        assert (store.slides(), store.damaged()) == (["s0", "s2"], ["s1"])
        assert len(store["s0"]) == 25
        with pytest.raises(DamageError, match=f"slide s1 is damaged: {message}"):
            store.read("s1")
        summary = study.embed()
        assert summary.kept == ["s0", "s2"]
        assert "slide s1 is damaged" in summary.failed["s1"]

    record.write_text(text[: len(text) // 2])
    damaged("its zarr.json cannot be read")
    record.write_text(text.replace('"patient": "P1"', '"patient": "P2"'))
    damaged("its record does not have the checksum")
    record.write_text(text)
    change(record, {"colour": "blue"}, sign=True)
    damaged("its record colour: there is no such key")
    record.unlink()
    assert open_store(path).damaged() == ["s1"]
    assert study.embed().done == ["s1"]  # nothing says what lies there: begun anew
    assert open_store(path).slides() == ["s0", "s1", "s2"]


def files_of(slide: Path) -> list[Path]:
    return [file for file in sorted(slide.rglob("*")) if file.is_file() and file != slide / "zarr.json"]


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_a_slide_with_any_file_damaged_is_never_read(study: Study, how: str) -> None:
    """Every file of a slide, each in turn: named as damaged, or (chunks) refused by its own checksum."""
    study.embed(views=8)
    path = study.folder / "store.zarr"
    files = files_of(path / "slides/s1")
    assert len(files) > 40
    for file in files:
        whole = file.read_bytes()
        if how == "flipped":
            at = len(whole) // 2
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        elif how == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        else:
            file.unlink()
        with pytest.raises(DamageError, match="slide s1 is damaged"):  # view 0 is read where it alone is asked for
            open_store(path).read("s1", first_view_only="embedding/X" in file.as_posix())
        file.write_bytes(whole)
    assert len(open_store(path).read("s1")) == 25


def test_neighbours_go_through_squidpys_matrices_unchanged() -> None:
    rng = np.random.default_rng(0)
    for xy in (
        rng.random((40, 2)) * 1e5,
        np.repeat(rng.random((6, 2)), 3, axis=0),
        rng.random((4, 2)),
        np.zeros((1, 2)),
    ):
        table, distances = nearest_spots(xy, 9)
        connected, far = graph_of(table, distances)
        assert connected.shape == (len(xy), len(xy))
        assert (connected.indices == far.indices).all()
        assert not connected.diagonal().any()
        back = table_of(far)
        assert np.array_equal(back, table[:, : back.shape[1]])
        assert (table[:, back.shape[1] :] == -1).all()


def test_a_prediction_has_the_neighbours_of_its_store(study: Study) -> None:
    from nh2st_pipe.training.run import train

    study.embed()
    run = train(study.folder / "store.zarr", recipe="mean", out=study.folder / "run")
    kept = open_store(study.folder / "store.zarr").read("s0").anndata()
    predicted = anndata.read_h5ad(run.path / "predictions/s0.h5ad")
    for name in ("spatial_connectivities", "spatial_distances"):
        assert abs(predicted.obsp[name] - kept.obsp[name]).max() < 1e-9
    assert predicted.uns["spatial_neighbors"]["distances_key"] == "spatial_distances"


def test_a_store_says_nothing_of_the_machine_it_was_made_on(study: Study) -> None:
    study.embed(views=8)
    held = str(study.folder).encode()
    for file in (study.folder / "store.zarr").rglob("*"):
        assert not file.is_file() or held not in file.read_bytes(), file


def test_a_slide_is_what_squidpy_expects(study: Study) -> None:
    study.embed(views=8)
    data = open_store(study.folder / "store.zarr").read("s1").anndata()
    kept = anndata.read_zarr(study.folder / "store.zarr/slides/s1/embedding")
    for one, two in ((data.X, kept.X), (data.obsm["views"], kept.obsm["views"]), (data.obs, kept.obs)):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    assert abs(data.obsp["spatial_distances"] - kept.obsp["spatial_distances"]).max() < 1e-9
    note = data.uns["spatial_neighbors"]
    assert data.obsp[str(note["connectivities_key"])].sum() == 25 * 8
    nearest = data.obsp[str(note["distances_key"])].max(axis=1).toarray()
    assert nearest.min() >= 40
    picture = data.uns["spatial"]["s1"]
    assert picture["images"]["hires"].dtype == np.uint8
    assert "tissue_hires_scalef" in picture["scalefactors"]
