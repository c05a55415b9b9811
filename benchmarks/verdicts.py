"""What statements about figures take at size: intervals of values, and the verdicts on genes.

    python benchmarks/verdicts.py

Prints seconds and the peak memory above what the input takes, each against sorting the input once.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from nh2st_pipe.evaluation.intervals import intervals
from nh2st_pipe.evaluation.judged import Judged
from nh2st_pipe.evaluation.trust import trust


def peak() -> float:
    """Return the most memory the process has had, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(what: str, made: Callable[[], object], values: list[np.ndarray]) -> None:
    before = peak()
    began = time.perf_counter()
    made()
    seconds, memory = time.perf_counter() - began, peak() - before
    began = time.perf_counter()
    for each in values:
        np.sort(each, axis=-1)
    sort = time.perf_counter() - began
    print(f"{what}: {seconds:.1f} s, {seconds / sort:.1f} × sorting the input; {memory:.2f} GB", flush=True)


def judged(units: int, genes: int, shift: float, seed: int) -> list[Judged]:
    rng = np.random.default_rng(seed)
    names, null = tuple(f"g{i}" for i in range(genes)), np.full(genes, 0.1)
    found, none = [], np.empty(0, np.int64)
    for i in range(units):
        pcc = rng.normal(0.3 + shift, 0.15, genes)
        found.append(Judged(f"s{i}", f"s{i}", "", None, names, 1000, pcc, pcc, pcc, pcc, none, null, None, None))
    return found


def main() -> None:
    ours, theirs = judged(300, 18000, 0.0, 1), judged(300, 18000, -0.05, 2)
    timed(
        "trust beside a rival, 300 units × 18,000 genes",
        partial(trust, ours, theirs, rival_name="ridge-context"),
        [each.pcc for each in ours],
    )
    del ours, theirs
    rng = np.random.default_rng(0)
    for units, genes in ((80, 2000), (300, 2000), (4, 18000)):
        sketches = [np.sort(np.abs(rng.standard_normal((genes, 200), np.float32)), axis=1) for _ in range(units)]
        names = [f"g{i}" for i in range(genes)]
        timed(
            f"intervals, {units} units × {genes:,} genes",
            partial(intervals, "patient", sketches, names),
            sketches,
        )
        del sketches


if __name__ == "__main__":
    main()
