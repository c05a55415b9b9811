"""What a head reaches on genes that it never saw, beside the same genes when it was trained on them, and baselines.

All are held against each other on the same slides and genes: those that were left out in some fold of genes. The unit
and the verdicts are those of `evaluation.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nh2st_pipe.evaluation.judged import Judged, by_unit, units_of
from nh2st_pipe.evaluation.metrics import mean_of_known
from nh2st_pipe.evaluation.statistics import Verdict, gene_figures, many, mean_interval, verdict

__all__ = ["ALL", "NEAREST", "QUERY", "SEEN", "gene_rows", "in_words", "unseen_figures", "verdict_in_words"]

SEEN, QUERY, NEAREST, ALL = "trained on", "by query", "nearest genes", "all genes"
"""What predicted a gene: the head that was trained on it; that which was not, by the gene's vector; the mean of the
predictions of the genes whose vectors are nearest; the mean of all genes' predictions."""


_IN_WORDS = (
    (SEEN, "where the head was trained on them"),
    (NEAREST, "by the mean of the nearest genes"),
    (ALL, "by that of all genes"),
)


@dataclass(frozen=True)
class _Slide:
    slide_id: str
    patient: str
    block: int | None


def unseen_figures(
    seen: Sequence[Judged], unseen: Mapping[str, Sequence[Judged]], folds: int, vectors: str
) -> dict[str, Any]:
    """Return the table's `rows` (PCC over units with its interval, by what predicted) and `against`, the verdicts on
    `by query` less each baseline and less `trained on`.

    `seen` are the same slides when the genes were trained on; `vectors` says in words where vectors are from.
    """
    by_name = {each.name: each for each in seen}
    places = [_Slide(each.slide_id, each.patient, each.block) for each in unseen[QUERY]]
    unit, units = units_of(places)
    own = [_same_genes(by_name[each.name], each) for each in unseen[QUERY]]
    of = {SEEN: own, **{name: [each.pcc for each in slides] for name, slides in unseen.items()}}
    means = {name: by_unit([mean_of_known(pcc) for pcc in found], units) for name, found in of.items()}
    rows = []
    for name, values in means.items():
        interval = mean_interval(values)
        low, high = (None, None) if interval is None else interval
        rows.append({"by": name, "pcc": mean_of_known(values), "pcc_low": low, "pcc_high": high})
    against = {name: verdict(means[QUERY] - means[name]).to_json() for name in (NEAREST, ALL, SEEN)}
    genes = {gene for each in unseen[QUERY] for gene in each.genes}
    return {
        "genes": len(genes),
        "folds": folds,
        "vectors": vectors,
        "unit": unit,
        "units": len(set(units)),
        "rows": rows,
        "against": against,
    }


def gene_rows(seen: Sequence[Judged], unseen: Mapping[str, Sequence[Judged]]) -> list[dict[str, Any]]:
    """Return one row per gene: its PCC over units by what predicted it, the best by query first."""
    names = {SEEN: "pcc_trained_on", QUERY: "pcc_by_query", NEAREST: "pcc_nearest_genes", ALL: "pcc_all_genes"}
    found = {of: {each.gene: each.pcc for each in gene_figures(list(slides))} for of, slides in unseen.items()}
    found[SEEN] = {each.gene: each.pcc for each in gene_figures(list(seen))}
    rows = [{"gene": gene, **{names[of]: found[of].get(gene) for of in names}} for gene in found[QUERY]]
    return sorted(rows, key=lambda row: (row["pcc_by_query"] is None, -(row["pcc_by_query"] or 0.0)))


def verdict_in_words(figures: Mapping[str, Any], baseline: str) -> str:
    """Say what can be said of `by query` beside a baseline."""
    of = Verdict(**{key: figures["against"][baseline][key] for key in Verdict.__dataclass_fields__})
    if of.side == "few":
        return f"ahead on {of.ahead} of {many(of.units, figures['unit'])}; too few to rule out chance"
    return {"more": "better", "less": "worse", "undefined": "undefined"}.get(of.side, "not distinguishable")


def in_words(figures: Mapping[str, Any]) -> str:
    """Say what was reached on genes that were left out, as a clause."""
    of = {row["by"]: row for row in figures["rows"]}
    if of[QUERY]["pcc"] is None:
        return "of none of the genes that were left out could it be told what they reach"
    said = [f"{of[name]['pcc']:.3f} {words}" for name, words in _IN_WORDS if of[name]["pcc"] is not None]
    return (
        f"{figures['genes']:,} genes that were left out, with vectors of {figures['vectors']}, reached a mean PCC of "
        f"{of[QUERY]['pcc']:.3f} on {many(figures['units'], figures['unit'])} held out ({', '.join(said)})"
    )


def _same_genes(slide: Judged, other: Judged) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a slide's PCC of the genes of another, in its order; NaN for those that it lacks."""
    place = {gene: i for i, gene in enumerate(slide.genes)}
    return np.array([slide.pcc[place[gene]] if gene in place else np.nan for gene in other.genes])
