"""What is said of genes that were left out, on slides whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nh2st_pipe.evaluation.judged import Judged
from nh2st_pipe.evaluation.unseen import (
    ALL,
    NEAREST,
    QUERY,
    SEEN,
    gene_rows,
    in_words,
    unseen_figures,
    verdict_in_words,
)
from tests.evaluation.known import study


def those(slides: list[Judged], kept: list[int]) -> list[Judged]:
    """The same slides with some of their genes, in that order."""
    return [
        replace(
            each,
            genes=tuple(each.genes[i] for i in kept),
            **{name: getattr(each, name)[kept] for name in ("pcc", "mse", "mae", "mean", "null_spread")},
        )
        for each in slides
    ]


KEPT = [7, 3, 11, 20, 1]


def known(slides: int, query: float = 0.5, nearest: float = 0.2) -> tuple[list[Judged], dict[str, list[Judged]]]:
    seen = study(0, slides, 0.7, points=0)
    of = {QUERY: query, NEAREST: nearest, ALL: 0.1}
    return seen, {name: those(study(i, slides, tie, points=0), KEPT) for i, (name, tie) in enumerate(of.items(), 1)}


def test_all_are_held_against_each_other_on_the_genes_that_were_left_out() -> None:
    seen, unseen = known(8)
    found = unseen_figures(seen, unseen, 5, "v.csv")
    rows = {row["by"]: row for row in found["rows"]}
    assert rows[SEEN]["pcc"] == pytest.approx(np.mean([each.pcc[KEPT].mean() for each in seen]))
    assert rows[QUERY]["pcc"] == pytest.approx(np.mean([each.pcc.mean() for each in unseen[QUERY]]))
    assert rows[QUERY]["pcc_low"] < rows[QUERY]["pcc"] < rows[QUERY]["pcc_high"]
    assert (found["genes"], found["folds"], found["unit"], found["units"]) == (5, 5, "slide", 8)
    assert found["against"][NEAREST]["mean"] == pytest.approx(rows[QUERY]["pcc"] - rows[NEAREST]["pcc"])
    assert verdict_in_words(found, NEAREST) == "better"
    assert verdict_in_words(found, SEEN) == "worse"
    words = in_words(found)
    assert words.startswith("5 genes that were left out, with vectors of v.csv, reached a mean PCC of ")
    assert f"{rows[SEEN]['pcc']:.3f} where the head was trained on them" in words


def test_chance_is_no_verdict() -> None:
    said = [verdict_in_words(unseen_figures(*known(8, 0.3, 0.3), 5, ""), NEAREST)]
    few = unseen_figures(*known(4), 5, "")
    assert said == ["not distinguishable"]
    assert verdict_in_words(few, NEAREST) == "ahead on 4 of 4 slides; too few to rule out chance"


def test_slides_of_a_patient_are_one_unit() -> None:
    seen, unseen = known(6)
    patients = ["A", "A", "A", "B", "B", "C"]

    def of(slides: list[Judged]) -> list[Judged]:
        return [replace(each, patient=patient) for each, patient in zip(slides, patients, strict=True)]

    found = unseen_figures(of(seen), {name: of(slides) for name, slides in unseen.items()}, 5, "")
    each = [slide.pcc.mean() for slide in unseen[QUERY]]
    assert found["units"] == 3
    assert found["rows"][1]["pcc"] == pytest.approx(np.mean([np.mean(each[:3]), np.mean(each[3:5]), each[5]]))


def test_rows_of_genes_and_what_a_slide_lacks() -> None:
    seen, unseen = known(6)
    unseen[QUERY][2].pcc[1] = np.nan  # its map does not vary there
    seen[2].pcc[KEPT[1]] = np.nan
    rows = gene_rows(seen, unseen)
    assert [row["gene"] for row in rows] == sorted(
        (row["gene"] for row in rows), key=lambda gene: -{r["gene"]: r["pcc_by_query"] for r in rows}[gene]
    )
    row = next(row for row in rows if row["gene"] == f"g{KEPT[1]}")
    assert row["pcc_by_query"] == pytest.approx(np.mean([s.pcc[1] for i, s in enumerate(unseen[QUERY]) if i != 2]))
    assert {row["gene"] for row in rows} == {f"g{i}" for i in KEPT}
