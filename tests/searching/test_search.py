"""Search: the same as holding everything against everything; the asker's own patient left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import RunError, StoreError, UsageError
from nh2st_pipe.searching import scan
from nh2st_pipe.searching.index import Space, index_of
from nh2st_pipe.searching.scan import nearest_tiles, slide_distance
from nh2st_pipe.searching.search import Query, search
from nh2st_pipe.store.arrays import SlideArrays, write_store
from nh2st_pipe.store.read import open_store
from tests.exporting.made import genes_of, prediction
from tests.reporting.test_regions import feature, write

PATIENTS = {"a1": "A", "a2": "A", "b1": "B", "c1": "C"}
Y, X = (axis.ravel() for axis in np.mgrid[:4, :4])
XY = np.column_stack((X, Y)) * 50.0 + 100
NAMES = [f"AA-{i}" for i in range(16)]


def embeddings(name: str) -> NDArray[np.float32]:
    """Two kinds of tissue on each slide, the left half and the right, and all of them far from 0."""
    rng = np.random.default_rng(list(PATIENTS).index(name))
    kinds = np.random.default_rng(99).normal(size=(2, 24))
    values = 5 + kinds[(X >= 2).astype(int)] + 0.2 * rng.normal(size=(16, 24))
    return np.asarray(values, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    slides = [
        SlideArrays(name, embeddings(name), XY, mpp=0.5, patient=patient, barcodes=NAMES)
        for name, patient in PATIENTS.items()
    ]
    write_store(tmp_path / "store.zarr", slides, encoder="mine", tile_um=20.0)
    return tmp_path / "store.zarr"


def compared() -> dict[str, NDArray[np.float64]]:
    """Each slide's tiles as they are compared, by the definition."""
    held = {name: embeddings(name).astype(np.float16).astype(np.float64) for name in PATIENTS}
    mean = np.mean([values.mean(axis=0) for values in held.values()], axis=0)
    return {name: (v - mean) / np.linalg.norm(v - mean, axis=1, keepdims=True) for name, v in held.items()}


def test_the_likest_tiles_are_found_and_not_those_of_the_askers_patient(store: Path) -> None:
    held = compared()
    found = search(store, Query(slide="a1", tile="AA-5", k=6))
    assert found.searched == 32
    every = sorted(
        ((float(held["a1"][5] @ held[name][row]), name, row) for name in ("b1", "c1") for row in range(16)),
        reverse=True,
    )
    for hit, (like, name, row) in zip(found, every, strict=False):
        assert hit.likeness == pytest.approx(like, abs=2e-3)
        assert (hit.slide_id, hit.tile, hit.x, hit.y) == (name, f"AA-{row}", *XY[row])
    assert "1 more slide of patient A is left out" in found.notices[0]
    own = search(store, Query(slide="a1", at=(151.0, 152.0), k=40, same_patient=True))
    assert {hit.slide_id for hit in own} == {"a2", "b1", "c1"}
    assert own.searched == 48
    assert own.frame().shape[0] == 40


def test_a_region_and_a_slide_are_searched_for(store: Path) -> None:
    region = write(store.parent / "r/left.geojson", feature(70, 70, 170, 270, kind="Left"))
    found = search(store, Query(slide="a1", region=region, k=16))
    assert {hit.x for hit in found} == {100.0, 150.0}  # the other slides' left half
    slides = search(store, Query(slide="a1", k=9, same_patient=True))
    held = compared()
    expected = {name: float(np.median(1 - (held["a1"] @ held[name].T).max(axis=1))) for name in ("a2", "b1", "c1")}
    assert [hit.slide_id for hit in slides] == sorted(expected, key=lambda name: expected[name])
    for hit in slides:
        assert hit.tile is None
        assert 1 - (hit.likeness or 0) == pytest.approx(expected[hit.slide_id], abs=2e-3)


def test_it_is_the_same_block_by_block(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(open_store(store))
    slides = list(index.slides.values())
    queries = np.array(slides[0].vectors()[:3])
    whole = nearest_tiles(queries, slides, 7)
    far = [slide_distance(queries, slide) for slide in slides]
    masks = {"a1": np.arange(16) % 3 == 0, "b1": np.zeros(16, bool)}
    masked = nearest_tiles(queries, slides, 64, lambda slide: masks.get(slide.slide_id))
    for rows in (1, 5, 20, 33):
        monkeypatch.setattr(scan, "_ROWS", rows)
        again = nearest_tiles(queries, slides, 7)
        for one, two in zip(whole, again, strict=True):
            assert [each[1:] for each in one] == [each[1:] for each in two]
        assert [slide_distance(queries, slide) for slide in slides] == pytest.approx(far, abs=1e-6)
        assert [len(each) for each in nearest_tiles(queries, slides, 64, lambda s: masks.get(s.slide_id))] == [38] * 3
    assert {row for _, name, row in masked[0] if name == "a1"} == {0, 3, 6, 9, 12, 15}
    assert not [name for _, name, _ in masked[0] if name == "b1"]


def test_a_large_slide_is_stood_for_by_tiles_of_each_kind(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.searching import search as searching

    monkeypatch.setattr(searching, "_REPRESENTATIVES", 4)
    slide = index_of(open_store(store)).slides["a1"]
    some, every = searching._representatives(slide), np.array(slide.vectors())
    rows = [int(np.flatnonzero((every == one).all(axis=1))[0]) for one in some]
    assert len(set(rows)) == len(rows) == 4
    assert {bool(X[row] >= 2) for row in rows} == {True, False}
    like = every.astype(float) @ some.T.astype(float)
    assert like.max(axis=1).min() > 0.5  # each tile has one that is like it


def test_the_directions_of_stains_are_taken_out() -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(24, 2)))[0].T.astype(np.float32)
    space = Space(np.zeros(24, np.float32), directions)
    values = rng.normal(size=(10, 24)).astype(np.float32)
    stained = values + 3 * rng.normal(size=(10, 2)).astype(np.float32) @ directions
    like = (space.of(values).astype(float) * space.of(stained)).sum(axis=1)
    assert like == pytest.approx(np.ones(10), abs=2e-3)
    plain = Space(np.zeros(24, np.float32), directions[:0])
    assert (plain.of(values).astype(float) * plain.of(stained)).sum(axis=1).mean() < 0.9


def test_an_index_is_renewed_by_what_has_changed(store: Path) -> None:
    opened = open_store(store)
    first = index_of(opened)
    assert (first.path, len(first), first.renewed) == (store.with_name("store.zarr.search"), 64, tuple(PATIENTS))
    assert index_of(opened).renewed == ()
    kept = {name: slide.file.stat().st_mtime_ns for name, slide in first.slides.items()}
    changed = SlideArrays("b1", embeddings("c1"), XY, mpp=0.5, patient="B", barcodes=NAMES)
    more = SlideArrays("d1", embeddings("a1"), XY, mpp=0.5, patient="D", barcodes=NAMES)
    write_store(store, [changed, more], encoder="mine", tile_um=20.0, redo_changed=True)
    shutil.rmtree(store / "slides/c1")
    again = index_of(open_store(store))
    assert sorted(again.renewed) == ["b1", "d1"]
    assert sorted(again.slides) == ["a1", "a2", "b1", "d1"]
    assert not list(again.path.glob("slides/c1*"))
    assert again.slides["a1"].file.stat().st_mtime_ns == kept["a1"]
    assert np.array_equal(again.space.mean, first.space.mean)
    hit = next(iter(search(store, Query(slide="d1", tile="AA-5", k=1))))
    assert (hit.slide_id, hit.tile, round(hit.likeness or 0, 2)) == ("a1", "AA-5", 1.0)
    assert not np.array_equal(index_of(open_store(store), anew=True).space.mean, first.space.mean)


def test_an_index_of_another_store_or_a_damaged_one_is_refused(store: Path, tmp_path: Path) -> None:
    path = index_of(open_store(store)).path
    other = SlideArrays("a1", embeddings("a1"), XY, mpp=0.5, barcodes=NAMES)
    write_store(tmp_path / "other.zarr", [other], encoder="another", tile_um=20.0)
    with pytest.raises(StoreError, match="is the index of another store"):
        index_of(open_store(tmp_path / "other.zarr"), path)
    whole = json.loads((path / "index.json").read_text())
    (store.parent / "mine.npy").write_text("mine")
    for said in (
        "{",
        "[]",
        json.dumps({**whole, "slides": {**whole["slides"], "a1": 3}}),
        json.dumps({**whole, "slides": {"../../mine": whole["slides"]["a1"]}}),  # a slide that is gone: it is deleted
    ):
        (path / "index.json").write_text(said)
        with pytest.raises(StoreError, match=r"is damaged; nh2st-pipe index --anew"):
            index_of(open_store(store))
    assert (store.parent / "mine.npy").exists()
    (path / "index.json").write_text(json.dumps(whole))
    for mean in (np.zeros(5, np.float32), np.full(24, np.nan, np.float32)):
        np.savez(path / "space.npz", mean=mean, taken_out=np.zeros((0, 24), np.float32))
        with pytest.raises(StoreError, match=r"is damaged; nh2st-pipe index --anew"):
            index_of(open_store(store))
    assert len(index_of(open_store(store), anew=True)) == 64
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.txt").write_text("x")
    with pytest.raises(StoreError, match="is there already and is no index"):
        index_of(open_store(store), tmp_path / "mine")
    with pytest.raises(StoreError, match="is there already and is no index"):
        index_of(open_store(store), tmp_path / "mine", anew=True)  # which would have deleted it
    assert (tmp_path / "mine/file.txt").read_text() == "x"


@pytest.mark.parametrize("damage", ["cut", "other", "places"])
def test_vectors_that_are_damaged_are_named(store: Path, damage: str) -> None:
    index = index_of(open_store(store))
    file = index.slides["b1"].file
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "other":
        np.save(file, np.zeros((15, 24), np.float16))
    else:
        file.with_suffix(".tiles.npz").write_bytes(b"PK and so on")
    with pytest.raises(StoreError, match=r"b1(\.tiles)?\.np[yz] is damaged; nh2st-pipe index --anew makes it again"):
        search(store, Query(slide="a1", tile="AA-5", k=40))
    index_of(open_store(store), anew=True)
    assert len(search(store, Query(slide="a1", tile="AA-5", k=40))) == 32


def test_tiles_are_found_by_what_is_predicted_there(store: Path) -> None:
    (store.parent / "p").mkdir()
    verdicts = {"G0": True, "G1": True, "G2": False}
    values = {
        name: prediction(
            store.parent / f"p/{name}.h5ad", slide_id=name, genes=genes_of(3), seed=number, trusted=verdicts
        )
        for number, name in enumerate(("a1", "b1", "c1"))
    }
    found = search(store, Query(where="G1 > p80 and trusted and unlike < 60", k=5), predictions=store.parent / "p")
    bound = np.percentile(np.concatenate([v[:, 1] for v in values.values()]), 80)
    percentile = np.linspace(0, 90, 16)
    expected = sorted(
        (-float(v[row, 1]), name, row)
        for name, v in values.items()
        for row in range(16)
        if v[row, 1] > bound and percentile[row] < 60
    )
    assert [(hit.slide_id, hit.tile) for hit in found] == [(name, f"AA-{row}") for _, name, row in expected[:5]]
    assert "a2 are not predicted, and left out" in found.notices[-1]
    hit = found.hits[0]
    assert hit.values["G1"]["value"] == pytest.approx(-expected[0][0], rel=1e-5)
    assert hit.values["G1"]["low"] == pytest.approx(-expected[0][0] - 0.25, rel=1e-5)
    assert hit.likeness is None
    none = search(store, Query(where="G2 > p80 and trusted"), predictions=store.parent / "p")
    assert none.notices[1:] == [
        "trusted on no slide, as 'G2 > p80 and trusted' asks: G2",
        "no tile meets 'G2 > p80 and trusted'",
    ]
    both = search(
        store, Query(slide="a1", tile="AA-5", where="G1 > p80", genes=("G0",), k=99), predictions=store.parent / "p"
    )
    bound = np.percentile(np.concatenate([values[name][:, 1] for name in ("b1", "c1")]), 80)  # of what is searched
    assert len(both) == sum(int((values[name][:, 1] > bound).sum()) for name in ("b1", "c1"))
    assert list(both.hits[0].values) == ["G1", "G0"]
    likeness = [hit.likeness or 0 for hit in both]
    assert likeness == sorted(likeness, reverse=True)


def test_what_cannot_be_searched_for_is_said(store: Path) -> None:
    (store.parent / "p").mkdir()
    prediction(store.parent / "p/a1.h5ad", slide_id="a1", side=3)
    wrong: list[tuple[Query, Any, type[Exception], str]] = [
        (Query(), None, UsageError, "search for something"),
        (Query(slide="a9"), None, UsageError, "no complete slide a9; did you mean"),
        (Query(slide="a1", tile="AA-99"), None, UsageError, "has no tile AA-99"),
        (Query(slide="a1", at=(5000, 5000)), None, UsageError, "no tile of slide a1 is at 5000, 5000"),
        (Query(slide="a1", tile="AA-1", at=(1, 1)), None, UsageError, "--tile and --at ask for different things"),
        (Query(where="G0 > 1"), None, UsageError, "--predictions FOLDER says where they are"),
        (Query(where="G77 > 1"), "p", UsageError, "does not predict G77"),
        (Query(slide="a1", k=0), None, UsageError, "-k takes 1 and more"),
        (Query(tile="AA-1"), None, UsageError, "--tile says where on a slide"),
        (Query(at=(1, 1), where="G0 > 1"), "p", UsageError, "--at says where on a slide"),
        (Query(region="r.geojson", image="tile.png"), None, UsageError, "--region says where on a slide"),
        (Query(slide="a1", mpp=0.5), None, UsageError, "--mpp says the scale of a picture"),
        (Query(where="G0 > -9"), "p", RunError, "has other tiles than slide a1"),
    ]
    for query, folder, kind, words in wrong:
        with pytest.raises(kind, match=words):
            search(store, query, predictions=None if folder is None else store.parent / folder)


def test_the_command_tells_and_writes_what_it_found(store: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["index", str(store)])
    assert "64 tiles of 4 slides, 4 of them read now" in done.stdout
    asked = ["search", str(store), "--slide", "a1", "--at", "150,150", "-k", "3"]
    done = runner.invoke(app, [*asked, "--out", str(tmp_path / "hits.csv")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "3 found among 32 tiles"
    assert done.stdout.splitlines()[1].split() == ["slide_id", "patient", "likeness", "tile", "x", "y"]
    table = pl.read_csv(tmp_path / "hits.csv")
    said = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    assert table["tile"].to_list() == [hit["tile"] for hit in said["hits"]]
    assert isinstance(runner.invoke(app, [*asked[:-4], "--at", "150"]).exception, UsageError)
    (store.parent / "p").mkdir()
    prediction(store.parent / "p/a1.h5ad", slide_id="a1")
    nothing = ["--where", "G0 > 999", "--predictions", str(store.parent / "p"), "--out", str(tmp_path / "none.csv")]
    done = runner.invoke(app, ["search", str(store), *nothing])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "0 found among 0 tiles"
    assert pl.read_csv(tmp_path / "none.csv").columns == [*table.columns]
    alone = runner.invoke(app, [*asked, "--slides", "manifest.csv"]).exception
    assert isinstance(alone, UsageError)
    assert "--html FILE says which page" in str(alone)


def test_a_picture_of_ones_own_is_searched_for(make_study: Any, tmp_path: Path) -> None:
    from PIL import Image

    study = make_study(3)
    manifest = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join([f"{manifest[0]},mpp", *(f"{line},0.5" for line in manifest[1:])]) + "\n")
    study.embed(tile_px=None, tile_um=24.0, device="cpu")  # of 48 px
    store = study.folder / "store.zarr"
    data = open_store(store).read("s1")
    x, y = data.xy[12]
    with Image.open(study.folder / "s1.png") as slide:
        tile = slide.crop((int(x) - 24, int(y) - 24, int(x) + 24, int(y) + 24))
    tile.save(tmp_path / "tile.png")
    tile.resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "twice.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "small.png")
    found = search(store, Query(image=tmp_path / "tile.png", mpp=0.5, k=3), device="cpu")
    hit = found.hits[0]
    assert (hit.slide_id, hit.tile, round(hit.likeness or 0, 2)) == ("s1", data.barcodes[12], 1.0)
    assert found.searched == 75  # nobody is left out: whose it is is not known
    done = CliRunner().invoke(
        app,
        ["search", str(store), "--image", str(tmp_path / "twice.png"), "--mpp", "0.25", "--device", "cpu", "--json"],
    )
    assert json.loads(done.stdout)["hits"][0]["tile"] == data.barcodes[12]
    wrong: list[tuple[Query, type[Exception], str]] = [
        (Query(image=tmp_path / "tile.png"), UsageError, "does not say its scale"),
        (Query(image=tmp_path / "tile.png", mpp=0.0), UsageError, "a number above 0"),
        (Query(image=tmp_path / "tile.png", mpp=0.25), UsageError, "a tile of the store is 96 px wide"),
        (Query(image=tmp_path / "small.png", mpp=0.5), UsageError, "shows 30 × 30 px"),
        (Query(image=tmp_path / "tile.png", mpp=0.5, slide="s1"), UsageError, "--image and --slide"),
    ]
    for query, kind, words in wrong:
        with pytest.raises(kind, match=words):
            search(store, query, device="cpu")


def test_a_picture_cannot_be_held_against_features_of_another_tool(store: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "tile.png")
    with pytest.raises(StoreError, match="so a picture cannot be embedded alike"):
        search(store, Query(image=tmp_path / "tile.png", mpp=0.5))
