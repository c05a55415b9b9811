"""Several stores searched as if they were one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nh2st_pipe.core.errors import StoreError, UsageError
from nh2st_pipe.searching.index import index_of
from nh2st_pipe.searching.page import write_page
from nh2st_pipe.searching.search import Query, search
from nh2st_pipe.searching.stores import together
from nh2st_pipe.store.arrays import SlideArrays, write_store
from tests.cli.test_commands import call
from tests.searching.test_search import NAMES, PATIENTS, XY, embeddings


def stored(path: Path, slides: list[str], rename: dict[str, str] | None = None, encoder: str = "mine") -> Path:
    named = [
        SlideArrays(
            (rename or {}).get(name, name), embeddings(name), XY, mpp=0.5, patient=PATIENTS[name], barcodes=NAMES
        )
        for name in slides
    ]
    write_store(path, named, encoder=encoder, tile_um=20.0)
    return path


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    return [stored(tmp_path / "one.zarr", ["a1", "b1"]), stored(tmp_path / "two.zarr", ["a2", "c1"])]


def test_two_stores_are_searched_as_one_with_all_slides(stores: list[Path], tmp_path: Path) -> None:
    whole = stored(tmp_path / "whole.zarr", ["a1", "b1", "a2", "c1"])
    for query in (Query(slide="a1", tile="AA-5", k=20), Query(slide="a1", k=3, same_patient=True)):
        one = search(whole, query)
        both = search(stores, query, index=tmp_path / "index")
        assert [(h.slide_id, h.tile, h.likeness) for h in both] == [(h.slide_id, h.tile, h.likeness) for h in one]
        assert both.searched == one.searched
        assert both.notices == one.notices
        assert {hit.slide_id: Path(hit.store).name for hit in both}["c1"] == "two.zarr"
        assert not any(hit.store for hit in one)
    turned = index_of(together(stores[::-1]), tmp_path / "index")
    assert turned.renewed == ()  # the same index whatever the order
    assert search(stores, Query(slide="c1", k=1, tile="AA-1"), index=tmp_path / "index").frame()["store"][0]


def test_slides_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one = stored(tmp_path / "one.zarr", ["a1", "b1"])
    two = stored(tmp_path / "two.zarr", ["c1", "a2"], {"c1": "a1"})
    with pytest.raises(UsageError, match="a1 is in several stores: it is one of a1@one, a1@two"):
        search([one, two], Query(slide="a1"), index=tmp_path / "index")
    hits = search([one, two], Query(slide="a1@two", tile="AA-3", k=40), index=tmp_path / "index")
    assert {(hit.slide_id, hit.patient) for hit in hits} == {("a1@one", "A"), ("b1", "B"), ("a2", "A")}
    write_page(tmp_path / "hits.html", hits, together([one, two]), None, "x", hits.asker)
    assert "a1@one" in (tmp_path / "hits.html").read_text()
    (tmp_path / "more").mkdir()
    three = stored(tmp_path / "more/two.zarr", ["b1"], {"b1": "a1"})
    assert set(together([one, two, three]).slides()) == {"a1@one", "b1", "a1@two-2", "a2", "a1@two-3"}


def test_a_store_that_is_taken_out_leaves_the_index(stores: list[Path], tmp_path: Path) -> None:
    both = index_of(together(stores), tmp_path / "index")
    assert set(both.slides) == {"a1", "b1", "a2", "c1"}
    assert set(json.loads((tmp_path / "index/index.json").read_text())["slides"]) == set(both.slides)
    alone = index_of(together([stores[0]]), tmp_path / "index")
    assert set(alone.slides) == {"a1", "b1"}
    assert alone.renewed == ()
    assert np.array_equal(alone.space.mean, both.space.mean)
    assert not (tmp_path / "index/slides/c1.npy").exists()


def test_what_cannot_be_searched_together_is_said(stores: list[Path], tmp_path: Path) -> None:
    other = stored(tmp_path / "other.zarr", ["c1"], encoder="another")
    with pytest.raises(StoreError, match=r"one\.zarr and .*other\.zarr cannot be searched together.*another"):
        search([stores[0], other], Query(slide="a1"), index=tmp_path / "index")
    with pytest.raises(UsageError, match=r"one\.zarr is named twice"):
        search([stores[0], stores[0]], Query(slide="a1"))
    with pytest.raises(UsageError, match="an index of several stores lies where --index FOLDER says"):
        search(stores, Query(slide="a1"))
    with pytest.raises(UsageError, match="name a store"):
        together([])


def test_the_commands_take_several(stores: list[Path], tmp_path: Path) -> None:
    index = tmp_path / "index"
    made = call("index", *stores, "--index", index)
    assert made.returncode == 0, made.stderr
    assert "64 tiles of 4 slides" in made.stdout
    found = call("search", *stores, "--index", index, "--slide", "a1", "--tile", "AA-5", "--html", tmp_path / "h.html")
    assert found.returncode == 0, found.stderr
    assert "two.zarr" in found.stdout
    assert "two.zarr" in (tmp_path / "h.html").read_text()
