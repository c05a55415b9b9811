"""A coarse index finds what comparing each tile finds, nearly always, and reads few of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.searching import coarse
from nh2st_pipe.searching.coarse import coarse_of
from nh2st_pipe.searching.index import Index, IndexedSlide, Space
from nh2st_pipe.searching.scan import Found, nearest_tiles

DIM, EACH = 32, 500


def slide_of(folder: Path, number: int, made_of: str = "first") -> IndexedSlide:
    """Tiles about common kinds of tissue, of length 1."""
    kinds = np.random.default_rng(0).standard_normal((40, DIM))
    rng = np.random.default_rng([number, len(made_of)])
    values = kinds[rng.integers(40, size=EACH)] + 0.4 * rng.standard_normal((EACH, DIM))
    file = folder / f"s{number}.npy"
    np.save(file, (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16))
    return IndexedSlide(f"s{number}", f"P{number}", EACH, DIM, file, made_of)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setattr(coarse, "EXACT_UP_TO", 2 * EACH)
    monkeypatch.setattr(coarse, "_COMPARED", 100)
    slides = {f"s{i}": slide_of(tmp_path, i) for i in range(4)}
    return Index(tmp_path, Space(np.zeros(DIM, np.float32), np.zeros((0, DIM), np.float32)), slides)


def recall(found: list[Found], exact: list[Found]) -> float:
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len({hit[1:] for hit in a} & {hit[1:] for hit in b}) / len(b) for a, b in pairs]))


def test_nearly_the_same_tiles_are_found_with_the_same_likeness(index: Index) -> None:
    made = coarse_of(index)
    assert made is not None
    every = list(index.slides.values())
    queries = np.array(every[0].vectors()[:50])
    found, exact = made.nearest(queries, every, 10), nearest_tiles(queries, every, 10)
    assert recall(found, exact) >= 0.95
    for number, (mine, whole) in enumerate(zip(found, exact, strict=True)):
        assert mine[0] == pytest.approx(whole[0]) if mine[0][1:] == whole[0][1:] else True
        assert mine[0][1:] == ("s0", number)
        of = {hit[1:]: hit[0] for hit in whole}
        assert all(like == pytest.approx(of.get((name, row), like), abs=1e-5) for like, name, row in mine)
        assert [hit[0] for hit in mine] == sorted((hit[0] for hit in mine), reverse=True)


def test_tiles_that_may_not_be_found_are_not(index: Index) -> None:
    made = coarse_of(index)
    assert made is not None
    some = [index.slides[name] for name in ("s1", "s2", "s3")]
    queries = np.array(index.slides["s0"].vectors()[:20])

    def mask_of(slide: IndexedSlide) -> np.ndarray | None:
        return np.arange(EACH) % 5 > 0 if slide.slide_id == "s2" else None

    found = made.nearest(queries, some, 10, mask_of)
    assert {name for hits in found for _, name, _ in hits} <= {"s1", "s2", "s3"}
    assert all(row % 5 for hits in found for _, name, row in hits if name == "s2")
    assert recall(found, nearest_tiles(queries, some, 10, mask_of)) >= 0.95
    few = some[:1]  # so few that each is looked at
    assert made.nearest(queries, few, 10) == nearest_tiles(queries, few, 10)


def test_a_slide_that_has_changed_is_taken_out_and_in_again(index: Index, tmp_path: Path) -> None:
    first = coarse_of(index)
    assert first is not None
    stamp = (tmp_path / "coarse.faiss").stat().st_mtime_ns
    assert coarse_of(index) is not None
    assert (tmp_path / "coarse.faiss").stat().st_mtime_ns == stamp  # nothing to do
    slides = {name: slide for name, slide in index.slides.items() if name != "s3"}
    slides |= {"s1": slide_of(tmp_path, 1, "changed"), "s4": slide_of(tmp_path, 4)}
    later = replace(index, slides=slides)
    made = coarse_of(later)
    assert made is not None
    assert made.cells.ntotal == 4 * EACH
    assert {name: span.start // EACH for name, span in made.spans.slides.items()} == {
        "s0": 0,
        "s2": 2,
        "s1": 4,
        "s4": 5,
    }
    every = list(slides.values())
    queries = np.concatenate([np.array(slide.vectors()[:10]) for slide in every])
    found = made.nearest(queries, every, 10)
    assert recall(found, nearest_tiles(queries, every, 10)) >= 0.95
    assert {name for hits in found for _, name, _ in hits} == {"s0", "s1", "s2", "s4"}


def test_few_tiles_need_none_and_a_damaged_one_is_named(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coarse_of(index) is not None
    (tmp_path / "coarse.faiss").write_bytes(b"no index")
    with pytest.raises(StoreError, match=r"coarse\.faiss is damaged; nh2st-pipe index --anew makes it again"):
        coarse_of(index)
    monkeypatch.setattr(coarse, "EXACT_UP_TO", 4 * EACH)
    assert coarse_of(index) is None
