"""Domains: spots of like expression, found in what was measured, predicted, and in the embeddings, and how they match.

Found by k-means on principal components. Two maps of domains match by the adjusted Rand index (Hubert & Arabie, J.
Classification 2, 1985), beside what it is on maps that were moved over the slide: tissue is smooth, and so are domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.evaluation.null import moves

__all__ = ["MOST_DOMAINS", "check_domains", "compared", "domains_of"]

MOST_DOMAINS = 8
"""As many as there are colours that can be told apart."""

_COMPONENTS, _SPOTS_EACH, _SEED = 20, 8, 2021


def check_domains(number: int) -> int:
    """Return a number of domains. Raises UsageError where it is none that can be shown."""
    if not 2 <= number <= MOST_DOMAINS:
        raise UsageError(f"--domains takes 2 to {MOST_DOMAINS}, not {number}")
    return number


def domains_of(values: NDArray[Any], number: int) -> NDArray[np.int64] | None:
    """Return the domain of each spot from n × G values, 0 the largest; None where there are too few spots or columns
    with values that vary.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    some = values[:, np.isfinite(values).all(axis=0)].astype(np.float64) if len(values) else np.zeros((0, 0))
    if len(some) < _SPOTS_EACH * number or not some.shape[1]:
        return None
    spread = some.std(axis=0)
    some = (some - some.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    if not some.shape[1]:
        return None
    components = PCA(min(_COMPONENTS, *some.shape), random_state=_SEED).fit_transform(some)
    labels = KMeans(number, n_init=10, random_state=_SEED).fit_predict(components)
    rank = np.argsort(np.argsort(-np.bincount(labels, minlength=number), kind="stable"), kind="stable")
    return np.asarray(rank[labels], np.int64)


def compared(
    of: Mapping[str, NDArray[np.int64] | None], xy: NDArray[np.float64], number: int
) -> dict[str, dict[str, Any]]:
    """Return, for the page, the domains of each kind, and how they match those that were `measured`.

    Kinds without domains are left out. Domains are numbered as those measured ones which they share most spots with.
    """
    found: dict[str, dict[str, Any]] = {}
    measured = of.get("measured")
    for kind, labels in of.items():
        if labels is None:
            continue
        entry: dict[str, Any] = {"labels": labels.tolist()}
        if measured is not None and kind != "measured":
            entry["labels"] = _renumbered(labels, measured, number).tolist()
            entry["match"] = round(_rand(labels, measured), 4)
            by_chance = [_rand(labels[rows], measured[onto]) for rows, onto in moves(xy, _SEED)]
            entry["chance"] = round(float(np.mean(by_chance)), 4) if by_chance else None
        found[kind] = entry
    return found


def _rand(one: NDArray[np.int64], two: NDArray[np.int64]) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(one, two))


def _renumbered(labels: NDArray[np.int64], like: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((number, number), np.int64)
    np.add.at(shared, (labels, like), 1)
    own, theirs = linear_sum_assignment(shared, maximize=True)
    renamed = np.empty(number, np.int64)
    renamed[own] = theirs
    return renamed[labels]
