from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.blocks import cut, part_of
from nh2st_pipe.data.folds import checked_folds, hold_out, kfold, make_folds, on_both_sides
from nh2st_pipe.tiles.neighbours import nearest_spots
from tests.conftest import slide

patients_of = st.lists(st.sampled_from("ABCDE"), min_size=2, max_size=9)


@given(n=st.integers(2, 40), k=st.integers(2, 8), seed=st.integers(0, 9999))
def test_folds_of_a_number_cut_everything_once(n: int, k: int, seed: int) -> None:
    parts = kfold(n, min(k, n), seed)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_folds_of_a_number_are_scikit_learns() -> None:
    # [test.tolist() for _, test in KFold(3, shuffle=True, random_state=42).split(range(10))]
    assert kfold(10, 3, 42) == [[0, 1, 5, 8], [2, 7, 9], [3, 4, 6]]
    # the same for KFold(8, shuffle=True, random_state=2021) over 23 patients, first and last fold
    assert (kfold(23, 8, 2021)[0], kfold(23, 8, 2021)[-1]) == ([8, 9, 14], [20, 21])


@given(patients=patients_of, by=st.sampled_from(["patient", "2", "slide"]), seed=st.integers(0, 99))
def test_no_slide_or_patient_is_on_both_sides(patients: list[str], by: str, seed: int) -> None:
    slides = [slide(f"s{i}", patient) for i, patient in enumerate(patients)]
    if by != "slide" and len(set(patients)) < 2:
        with pytest.raises(TrainError, match="need at least"):
            make_folds(slides, by, seed)
        return
    folds = make_folds(slides, by, seed)
    patient = {s.slide_id: s.patient for s in slides}
    assert sorted(s for fold in folds for s in fold.test) == sorted(patient)
    for fold in folds:
        assert not set(fold.train) & set(fold.test)
        assert set(fold.train) | set(fold.test) == set(patient)
        if by != "slide":
            assert not {patient[s] for s in fold.train} & {patient[s] for s in fold.test}


def test_too_few_groups_and_wrong_words() -> None:
    one_patient = [slide("a", "P"), slide("b", "P")]
    with pytest.raises(
        TrainError, match=r"folds by patient need at least two patients, and there is one \(P\).*--folds slide"
    ):
        make_folds(one_patient, "patient", 0)
    with pytest.raises(TrainError, match=r"folds by slide need at least two slides, and there is one"):
        make_folds(one_patient[:1], "slide", 0)
    with pytest.raises(TrainError, match="3 folds of patients need at least 3 patients, and there are 2"):
        make_folds([slide("a", "P"), slide("b", "Q")], "3", 0)
    for wrong in ("section", "1", "-2", "2.5", "patient:1", "slide:x"):
        with pytest.raises(UsageError, match=r"a column of the manifest \(this store has none\); .* Not"):
            make_folds(one_patient, wrong, 0)
    with pytest.raises(UsageError, match="this store has centre, site"):
        make_folds([slide("a", extra={"site": "x"}), slide("b", extra={"centre": "y"})], "sote", 0)
    assert make_folds(one_patient, "none", 0) == []


def test_folds_by_a_column_and_of_whole_groups() -> None:
    sites = {"a": "X", "b": "Y", "c": "X", "d": "Z"}
    slides = [slide(name, f"P{name}", extra={"site": site}) for name, site in sites.items()]
    assert [(f.name, f.test) for f in make_folds(slides, "site", 0)] == [
        ("X", ("a", "c")),
        ("Y", ("b",)),
        ("Z", ("d",)),
    ]
    two = make_folds(slides, "site:2", 0)
    assert sorted(name for fold in two for name in fold.test) == ["a", "b", "c", "d"]
    assert all(("a" in fold.test) == ("c" in fold.test) for fold in two)
    assert [len(fold.test) for fold in make_folds(slides, "slide:2", 0)] == [2, 2]
    assert make_folds(slides, "patient:3", 7) == make_folds(slides, "3", 7)
    slides[3].extra.clear()
    with pytest.raises(TrainError, match="slide d has nothing in the column 'site'"):
        make_folds(slides, "site", 0)
    assert on_both_sides(slides, two) == []
    shared = [slide("a", "P", extra={"site": "X"}), slide("b", "P", extra={"site": "Y"})]
    assert on_both_sides(shared, make_folds(shared, "site", 0)) == ["P"]


def test_blocks_have_as_many_spots_each_and_end_at_their_borders() -> None:
    rng = np.random.default_rng(0)
    n = 41
    xy = rng.uniform(0, 100, (n, 2))
    whole = slide(counts=np.arange(n * 3).reshape(n, 3), xy=xy, neighbours=nearest_spots(xy, 5)[0])
    blocks = cut(whole)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(n))
    assert {len(block) for block in blocks} == {10, 11}
    left, right = xy[np.concatenate(blocks[:2]), 0], xy[np.concatenate(blocks[2:]), 0]
    assert left.max() < right.min()
    for rows in blocks:
        part = part_of(whole, rows, 1)
        assert (part.slide_id, part.block, part.name) == ("s", 1, "s, block 1")
        assert part.counts is not None
        assert np.array_equal(part.counts.toarray(), whole.counts.toarray()[rows])  # type: ignore[union-attr]
        assert part.neighbours.max() < len(rows)
        for i, row in enumerate(rows):
            inside = [list(rows).index(j) for j in whole.neighbours[row] if j in rows]
            assert [j for j in part.neighbours[i] if j >= 0] == inside
    with pytest.raises(TrainError, match="has 15 spots, and folds by block need 16"):
        cut(slide(counts=np.ones((15, 3)), xy=np.zeros((15, 2))))


def test_what_is_held_out_is_a_patient_where_there_are_several() -> None:
    slides = [slide("a", "P"), slide("b", "Q"), slide("c", "P")]
    assert {hold_out(slides, seed) for seed in range(8)} == {("a", "c"), ("b",)}
    assert len(hold_out([slide("a", "P"), slide("b", "P")], 0)) == 1
    assert hold_out([slide("a", "P")], 0) == ()


def test_what_is_left_out_by_default_follows_what_there_is() -> None:
    two, one, alone = [slide("a", "P"), slide("b", "Q")], [slide("a", "P"), slide("b", "P")], [slide("a", "P")]
    assert checked_folds(two, None, "patient", 0) == ("patient", "")
    by, why = checked_folds(one, None, "patient", 0)
    assert (by, why.split(":")[0]) == ("slide", "all 2 slides are of one patient")
    assert checked_folds(alone, None, "patient", 0)[0] == "block"
    assert checked_folds(alone, "block", "patient", 0) == ("block", "")
    with pytest.raises(TrainError, match="folds by patient need at least two patients"):
        checked_folds(one, "patient", "patient", 0)  # asked for
    with pytest.raises(TrainError, match="8 folds of patients need at least 8"):
        checked_folds(two, None, "8", 0)
