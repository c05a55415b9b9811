from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.folds import hold_out, kfold, make_folds
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
    for wrong in ("section", "1", "-2", "2.5"):
        with pytest.raises(UsageError, match="--folds takes patient, slide, none or a number"):
            make_folds(one_patient, wrong, 0)
    assert make_folds(one_patient, "none", 0) == []


def test_what_is_held_out_is_a_patient_where_there_are_several() -> None:
    slides = [slide("a", "P"), slide("b", "Q"), slide("c", "P")]
    assert hold_out(slides, 0) in (("a", "c"), ("b",))
    assert len(hold_out([slide("a", "P"), slide("b", "P")], 0)) == 1
    assert hold_out([slide("a", "P")], 0) == ()
