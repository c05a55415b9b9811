from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nh2st_pipe.core.errors import DamageError, StoreError
from nh2st_pipe.store.format import (
    Contract,
    ImageSource,
    ManifestRow,
    Picture,
    Resolved,
    WeightsOf,
    counts_fingerprint,
    fingerprint,
)
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import verify
from nh2st_pipe.store.write import SlideWriter, StoreWriter
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.spots import Spots
from tests.conftest import Study

CONTRACT = Contract(
    encoder={"name": "e", "dim": 6},
    identity={"name": "e", "dim": 6, "input_px": 64},
    weights=WeightsOf(sha256="ab" * 32, source="w"),
    precision="float32",
    tile={"size_um": 112.0, "size_level0_px": None},
    views=8,
)
IMAGE = ImageSource(image="1-a")
RESOLVED = Resolved(width=9, height=8, mpp=0.5, mpp_source="file", tile_level0_px=224.0, reader="a 1.0")
ROW = ManifestRow(slide_id="s", slide="s.tif", patient="p")


def spots(n: int, genes: int = 0) -> Spots:
    rng = np.random.default_rng(n)
    counts = sp.csr_matrix(rng.poisson(0.3, (n, genes))) if genes else None
    return Spots(
        [f"b{i}" for i in range(n)],
        rng.random((n, 2)) * 1e5,
        np.arange(n),
        np.arange(n) * 2,
        counts,
        [f"g{i}" for i in range(genes)] if genes else None,
    )


def values(n: int, views: int = 8) -> Any:
    return np.random.default_rng(1).normal(size=(n, views, 6)).astype(np.float16)


PICTURE = np.zeros((4, 5, 3), np.uint8), Picture(scale=0.1, spot_px=50.0)


def finish(writer: SlideWriter, n: int) -> None:
    writer.finish(*nearest_spots(spots(n).xy, 9), *PICTURE)


def test_what_is_written_is_read_back_by_us_and_by_anndata(tmp_path: Path) -> None:
    where, x = spots(300, genes=7), values(300)
    store = StoreWriter(tmp_path / "s.zarr", CONTRACT)
    writer = store.slide(ROW, IMAGE, where, RESOLVED, "1-e")
    for start in range(0, 300, 70):
        writer.append(x[start : start + 70])
    finish(writer, 300)
    data = open_store(tmp_path / "s.zarr").read("s")
    assert np.array_equal(data.views, x)
    assert data.barcodes == where.barcodes
    assert np.array_equal(data.xy, where.xy)
    assert where.counts is not None
    assert data.counts is not None
    assert np.array_equal(data.counts.toarray(), where.counts.toarray())
    assert data.genes == where.genes
    first = open_store(tmp_path / "s.zarr").read("s", first_view_only=True)
    assert np.array_equal(first.views, x[:, :1])

    embedding = anndata.read_zarr(tmp_path / "s.zarr/slides/s/embedding")
    assert embedding.X is not None
    assert np.array_equal(embedding.X, x[:, 0])
    assert embedding.obsm["views"].shape == (300, 8, 6)
    assert {"spatial", "views"} == set(embedding.obsm)
    assert {"spatial_distances"} == set(embedding.obsp)
    assert list(embedding.obs_names) == where.barcodes
    assert {"array_row", "array_col"} == set(embedding.obs)
    expression = anndata.read_zarr(tmp_path / "s.zarr/slides/s/expression")
    assert np.array_equal(sp.csr_matrix(expression.X).toarray(), where.counts.toarray())
    assert list(expression.obs_names) == where.barcodes


@given(
    n=st.integers(1, 700), cuts=st.lists(st.integers(1, 300), max_size=6), stop=st.integers(0, 6), safe=st.booleans()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
def test_batches_and_interruptions_do_not_change_the_result(
    tmp_path_factory: pytest.TempPathFactory, n: int, cuts: list[int], stop: int, safe: bool
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.zarr"
    x = values(n)
    store = StoreWriter(path, CONTRACT)
    writer = store.slide(ROW, IMAGE, spots(n), RESOLVED)
    for number, size in enumerate([*cuts, n]):
        if number == stop:  # killed here, after a checkpoint or before it
            if safe:
                before = writer.rows
                writer.checkpoint()
            writer = store.slide(ROW, IMAGE, spots(n), RESOLVED)
            if safe:
                assert writer.rows == before
        if writer.rows < n:
            writer.append(x[writer.rows : writer.rows + size])
    if writer.rows < n:
        writer.append(x[writer.rows :])
    finish(writer, n)
    assert np.array_equal(open_store(path).read("s").views, x)
    assert "partial" not in zarr.open_group(path, mode="r")["slides/s"]  # type: ignore[operator]


def test_values_that_cannot_be_are_found_on_reading_whatever_their_checksums_say(tmp_path: Path) -> None:
    """Written so by a fault of ours: every file is as it was written."""

    def written(name: str, x: Any, neighbours: Any = None) -> Any:
        writer = StoreWriter(tmp_path / name, CONTRACT).slide(ROW, IMAGE, spots(20), RESOLVED)
        writer.append(x)
        indices, distances = nearest_spots(spots(20).xy, 9)
        writer.finish(indices if neighbours is None else neighbours, distances, *PICTURE)
        return open_store(tmp_path / name).read

    assert written("good.zarr", values(20))("s").views.shape == (20, 8, 6)
    broken = values(20)
    broken[7, 3, 2] = np.nan
    with pytest.raises(DamageError, match="embeddings that are not numbers"):
        written("nan.zarr", broken)("s")


def test_neighbours_beyond_the_slide_are_found_on_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path / "s.zarr", CONTRACT).slide(ROW, IMAGE, spots(20), RESOLVED)
    writer.append(values(20))
    finish(writer, 20)
    read = open_store(tmp_path / "s.zarr").read
    table = read("s").neighbours
    for place, wrong in (((3, 4), 20), ((3, 4), -2), ((5, 0), 4)):
        changed = table.copy()
        changed[place] = wrong
        monkeypatch.setattr("nh2st_pipe.store.read.table_of", lambda _, changed=changed: changed)
        with pytest.raises(DamageError, match="its neighbours are not spots of it"):
            read("s")


def test_after_a_write_that_failed_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory may be ahead of the disk then, or behind it; the next run begins from the disk."""
    writer = StoreWriter(tmp_path / "s.zarr", CONTRACT).slide(ROW, IMAGE, spots(300), RESOLVED)
    writer.append(values(300)[:100])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nh2st_pipe.store.write.RecordFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.append(values(300)[100:])
    monkeypatch.undo()
    before = {file: file.read_bytes() for file in (tmp_path / "s.zarr").rglob("*") if file.is_file()}
    writer.checkpoint()
    with pytest.raises(StoreError, match="an earlier write failed; open the slide anew"):
        writer.append(values(1))
    with pytest.raises(StoreError, match="0 of 300 tiles are written"):
        finish(writer, 300)
    assert {file: file.read_bytes() for file in (tmp_path / "s.zarr").rglob("*") if file.is_file()} == before


def test_a_slide_without_its_mark_is_not_there(tmp_path: Path) -> None:
    store = StoreWriter(tmp_path / "s.zarr", CONTRACT)
    store.slide(ROW, IMAGE, spots(20), RESOLVED).append(values(20))
    opened = open_store(tmp_path / "s.zarr")
    assert opened.slides() == []
    assert opened.incomplete() == ["s"]
    with pytest.raises(StoreError, match="holds no complete slide s; run nh2st-pipe embed again"):
        opened.read("s")
    store = StoreWriter(tmp_path / "t.zarr", CONTRACT)
    begun = store.slide(ROW, IMAGE, spots(20), RESOLVED)
    with pytest.raises(StoreError, match="0 of 20 tiles are written"):
        finish(begun, 20)


def test_another_source_begins_anew(tmp_path: Path) -> None:
    store = StoreWriter(tmp_path / "s.zarr", CONTRACT)
    writer = store.slide(ROW, IMAGE, spots(20), RESOLVED)
    writer.append(values(10))
    writer.checkpoint()
    assert store.slide(ROW, IMAGE, spots(20), RESOLVED).rows == 10
    assert store.slide(ROW, ImageSource(image="2-b"), spots(20), RESOLVED).rows == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": {"name": "f"}}, "encoder e, not f"),
        ({"identity": {**CONTRACT.identity, "input_px": 96}}, "encoder e with input_px 64, not 96"),
        ({"weights": WeightsOf(sha256="cd" * 32, source="w")}, "weights with SHA-256 abababababab…, not cdcdcdcdcdcd…"),
        ({"tile": {"size_um": None, "size_level0_px": 224.0}}, "tiles of 112 µm, not 224 px"),
        ({"views": 1}, "8 views, not 1"),
        ({"precision": "bfloat16"}, "precision float32, not bfloat16"),
    ],
)
def test_stores_of_two_kinds_do_not_mix(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    StoreWriter(tmp_path / "s.zarr", CONTRACT)
    with pytest.raises(StoreError) as error:
        StoreWriter(tmp_path / "s.zarr", CONTRACT.model_copy(update=change))
    assert words in str(error.value)


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="is not an embedding store"):
        open_store(tmp_path / "other.zarr")
    StoreWriter(tmp_path / "s.zarr", CONTRACT)
    meta = tmp_path / "s.zarr" / "zarr.json"
    text = json.loads(meta.read_text())
    text["attributes"]["nh2st_pipe"]["format"] = 99
    meta.write_text(json.dumps(text))
    with pytest.raises(StoreError, match="format 99, and this version of nh2st-pipe reads format 3 and older"):
        open_store(tmp_path / "s.zarr")


def test_damage_is_named_not_returned(study: Study) -> None:
    study.embed(views=8)
    path = study.folder / "store.zarr"
    chunk = next(p for p in (path / "slides/s1/embedding/obsm/views/c").rglob("*") if p.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    chunk.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match="slide s1 is damaged"):
        open_store(path).read("s1")
    assert len(open_store(path).read("s0")) == 25


def test_a_store_has_few_files_and_consolidated_metadata(study: Study) -> None:
    study.embed(views=8)
    path = study.folder / "store.zarr"
    counted = [file for file in (path / "slides/s0").rglob("*") if file.is_file()]
    assert len(counted) <= 45
    assert sum(not {"expression", "stain_shift"} & {*file.parts} for file in counted) <= 30
    assert "consolidated_metadata" in json.loads((path / "slides/s0/embedding/zarr.json").read_text())
    x = zarr.open_array(path / "slides/s0/embedding/obsm/views", mode="r")
    assert x.shards == (32, 8, 96)  # no larger than there are tiles


def test_fingerprints_follow_content_not_name_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * (1 << 25))
    b.write_bytes(b"x" * (1 << 25))
    assert fingerprint(a) == fingerprint(b)
    with b.open("r+b") as file:
        file.seek((1 << 25) - 10)
        file.write(b"y")
    assert fingerprint(a) != fingerprint(b)
    with b.open("r+b") as file:  # between two samples
        file.seek((1 << 25) - 10)
        file.write(b"x")
        file.seek((1 << 20) + 10)
        file.write(b"y")
    assert fingerprint(a) == fingerprint(b)
    assert counts_fingerprint(a) != counts_fingerprint(b)


def test_all_of_a_folder_of_counts_is_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(40):
        (tmp_path / "outs").mkdir(exist_ok=True)
        (tmp_path / "outs" / f"{number:02d}").write_bytes(bytes([number]) * 9)
    before = counts_fingerprint(tmp_path / "outs")
    seen = set()
    for number in range(40):  # as many bytes, in another place: no sample would see all of them
        file = tmp_path / "outs" / f"{number:02d}"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"x")
        seen.add(counts_fingerprint(tmp_path / "outs"))
        file.write_bytes(whole)
    assert len(seen) == 40
    assert before not in seen
    (tmp_path / "outs" / ".DS_Store").write_bytes(b"")
    assert counts_fingerprint(tmp_path / "outs") == before


def test_the_manifest_follows_the_slides(make_study: Callable[..., Study]) -> None:
    study = make_study(2, patients=["P", "Q"])
    study.embed()
    store = open_store(study.folder / "store.zarr")
    assert [store.read(s).patient for s in store.slides()] == ["P", "Q"]
    assert str(study.folder) not in (study.folder / "store.zarr/slides/s1/zarr.json").read_text()
    study.manifest.write_text(study.manifest.read_text().replace(",Q,", ",R,"))
    assert study.embed().encoded_tiles == 0
    assert open_store(study.folder / "store.zarr").read("s1").patient == "R"


def test_what_a_killed_write_left_behind_is_swept(study: Study) -> None:
    study.embed(stain_shift="off")
    store = study.folder / "store.zarr"
    inside = [
        store / "slides/s1" / name
        for name in ("zarr.aa.partial", "embedding/zarr.bb.partial", "embedding/X/c/0.cc.partial")
    ]
    old, young = store / "zarr.dd.partial", store / "zarr.ee.partial"
    beside = store / "slides/zarr.ff.partial"
    for file in (*inside, old, young, beside):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{")
    for file in (old, beside):
        os.utime(file, (0, 0))
    before = open_store(store)["s1"].views
    study.embed()  # finds the stain shift, and so finishes the slide once more, under its lease
    assert [file.exists() for file in (*inside, old, beside)] == [False] * 5
    assert young.exists()  # another process may be writing it
    assert np.array_equal(open_store(store)["s1"].views, before)


def test_a_slide_that_was_begun_with_unequal_shards_is_gone_on_with(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions laid them: views had fewer tiles a shard than view 0, and not a whole part of them."""
    from nh2st_pipe.store import write
    from nh2st_pipe.store.elements import sharded

    study = make_study(1, side=12)  # 144 tiles
    study.embed(store=study.folder / "plain.zarr", views=8, batch_size=16, device="cpu")
    plain = write._skeleton

    def unequal(contract: Any, spots: Any) -> Iterator[tuple[str, bytes]]:
        n, d = len(spots), contract.dim
        yield from plain(contract, spots)
        yield from sharded("embedding/X", (n, d), "float16", 32, 96)
        yield from sharded("embedding/obsm/views", (n, 8, d), "float16", 32, 64)

    monkeypatch.setattr(write, "_skeleton", unequal)
    study.embed(store=study.folder / "store.zarr", views=8, batch_size=16, device="cpu")
    one, two = (open_store(study.folder / name) for name in ("plain.zarr", "store.zarr"))
    assert np.array_equal(one.read("s0").views, two.read("s0").views)
    assert not verify(study.folder / "store.zarr").damaged
    files = {file.name for file in (study.folder / "store.zarr/slides/s0/embedding/obsm/views/c").iterdir()}
    assert files == {"0", "1", "2"}
