from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.folds import hold_out, kfold, make_folds
from nh2st_pipe.data.panels import choose_panel, read_gene_file
from nh2st_pipe.data.targets import targets
from nh2st_pipe.evaluation.metrics import gene_metrics, mean_of, summarise
from nh2st_pipe.recipes.train import TargetRecipe
from nh2st_pipe.store.read import SlideData


def slide(
    slide_id: str = "s", patient: str = "p", counts: Any = None, genes: list[str] | None = None, **more: Any
) -> SlideData:
    counts = np.ones((4, 3)) if counts is None else np.asarray(counts)
    n = len(counts)
    values: dict[str, Any] = {
        "extra": {},
        "barcodes": [f"b{i}" for i in range(n)],
        "xy": np.zeros((n, 2)),
        "array_row": np.arange(n),
        "array_col": np.zeros(n, int),
        "views": np.zeros((n, 1, 2), np.float16),
        "neighbours": np.zeros((n, 9), np.int32),
        **more,
    }
    return SlideData(slide_id, patient, counts=sp.csr_matrix(counts), genes=genes or ["a", "b", "c"], **values)


def test_the_panel_has_the_highest_mean_counts_over_all_spots() -> None:
    one = slide(counts=[[9, 1, 0]], genes=["a", "b", "c"])
    two = slide(counts=[[5, 0, 8], [5, 0, 8], [5, 0, 8]], genes=["c", "a", "b"])  # joined by name
    assert choose_panel([one, two], TargetRecipe(genes=2)) == ["b", "c"]
    assert choose_panel([one, two], TargetRecipe(genes=99)) == ["b", "c", "a"]
    tie = slide(counts=[[1, 1, 1]], genes=["z", "y", "x"])
    assert choose_panel([tie], TargetRecipe(genes=2)) == ["z", "y"]


def test_a_given_panel_is_kept_in_order_and_checked() -> None:
    assert choose_panel([slide()], TargetRecipe(genes=("c", "a"))) == ["c", "a"]
    with pytest.raises(TrainError, match="1 genes of the panel are in no training slide: nope"):
        choose_panel([slide()], TargetRecipe(genes=("a", "nope")))
    with pytest.raises(TrainError, match="no gene in common"):
        choose_panel([slide(), slide(genes=["x", "y", "z"])], TargetRecipe())


def test_targets_by_hand() -> None:
    data = slide(counts=[[1, 3, 6], [0, 0, 5]], array_row=np.array([0, 1]), array_col=np.array([0, 1]))
    raw = targets(data, ["b", "a"], TargetRecipe(smooth="none"))
    assert raw[0] == pytest.approx(np.log10([3 / 4 * 1e4 + 1, 1 / 4 * 1e4 + 1]))
    assert raw[1].tolist() == [0, 0]  # no counts in the panel
    smooth = targets(data, ["b", "a"], TargetRecipe())
    assert smooth == pytest.approx(np.tile(raw.mean(0), (2, 1)))
    assert targets(data, ["c"], TargetRecipe(smooth="none", log="none", scale_to=None)).ravel().tolist() == [6, 5]
    assert targets(data, ["c"], TargetRecipe(smooth="none", log="log1p", scale_to=None))[0, 0] == pytest.approx(
        np.log(7)
    )


def test_smoothing_takes_the_eight_grid_neighbours() -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:5, :5])
    counts = np.zeros((25, 1))
    counts[12] = 9
    data = slide(counts=counts, genes=["a"], array_row=rows, array_col=cols)
    got = targets(data, ["a"], TargetRecipe(scale_to=None, log="none")).reshape(5, 5)
    assert got[2, 2] == got[1, 1] == got[3, 2] == pytest.approx(1)
    assert got[0].sum() == 0
    corner = slide(counts=[[4], [0]], genes=["a"], array_row=np.array([0, 2]), array_col=np.array([0, 0]))
    assert targets(corner, ["a"], TargetRecipe(scale_to=None, log="none")).ravel().tolist() == [4, 0]


def test_smoothing_without_a_grid_says_what_to_do() -> None:
    with pytest.raises(TrainError, match=r"slide s has no array_row.*targets\.smooth=none"):
        targets(slide(array_row=None), ["a"], TargetRecipe())


def test_a_gene_that_is_missing_is_nan_not_zero() -> None:
    got = targets(slide(), ["a", "missing", "b"], TargetRecipe())
    assert np.isnan(got[:, 1]).all()
    assert np.isfinite(got[:, [0, 2]]).all()


def test_gene_files(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("# mine\nA\n\n B \n")
    assert read_gene_file(path) == ("A", "B")
    for text, message in (("A\nB\nA\n", "names genes twice: A"), ("#\n", "names no genes")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_gene_file(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_gene_file(tmp_path / "gone.txt")


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


patients_of = st.lists(st.sampled_from("ABCDE"), min_size=2, max_size=9)


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


def test_metrics_by_hand() -> None:
    truth = np.array([[1.0, 2, 5], [2, 2, 5], [3, 2, 6], [4, 2, 8]])
    guess = np.array([[1.0, 1, 9], [3, 2, 7], [2, 3, 7], [4, 4, 5]])
    genes = gene_metrics(guess, truth)
    assert genes["pcc"][0] == pytest.approx(np.corrcoef(guess[:, 0], truth[:, 0])[0, 1])
    assert np.isnan(genes["pcc"][1])  # the truth does not vary
    assert genes["mse"] == pytest.approx(((guess - truth) ** 2).mean(0))
    figures = summarise(guess, truth)
    assert figures["pcc"] == pytest.approx(np.nanmean(genes["pcc"]))
    assert figures["mae"] == pytest.approx(np.abs(guess - truth).mean())
    assert (figures["n_spots"], figures["n_genes"], figures["n_genes_pcc_undefined"]) == (4, 3, 1)


def test_top_50_are_the_best_genes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 80))
    guess = truth + rng.normal(size=(30, 80)) * np.linspace(0.1, 5, 80)
    each = gene_metrics(guess, truth)["pcc"]
    assert summarise(guess, truth)["pcc_top50"] == pytest.approx(np.sort(each)[-50:].mean())


def test_masked_genes_are_left_out_and_constants_have_no_correlation() -> None:
    truth = np.array([[1.0, np.nan], [2, np.nan], [4, np.nan]])
    figures = summarise(np.array([[1.0, 1], [2, 2], [3, 9]]), truth)
    assert figures["n_genes"] == 1
    assert figures["mse"] == pytest.approx(1 / 3)
    flat = summarise(np.full((3, 1), 0.1, np.float32), np.array([[1.0], [2], [3]]))
    assert flat["pcc"] is None
    assert flat["pcc_top50"] is None
    folds = [{**flat, "train_seconds": 1.0}, {**figures, "train_seconds": 2.0}]
    assert mean_of(folds)["pcc"] == figures["pcc"]
    assert mean_of(folds)["train_seconds"] == 3.0
