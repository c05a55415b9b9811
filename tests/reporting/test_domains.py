"""Domains: found where they are known, and matched beside what chance gives on maps as smooth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nh2st_pipe.core.errors import RunError, UsageError
from nh2st_pipe.reporting.domains import compared, domains_of
from nh2st_pipe.reporting.page import report
from nh2st_pipe.store.arrays import SlideArrays, write_store
from tests.exporting.made import genes_of, prediction
from tests.reporting.test_sets import data_of

SIDE = 14
Y, X = (axis.ravel() for axis in np.mgrid[:SIDE, :SIDE])
XY = np.column_stack((X, Y)) * 50.0 + 100


def of_known(known: NDArray[np.int64], noise: float, seed: int = 0) -> NDArray[np.float32]:
    """Return values of 12 genes, a profile for each of the known domains."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(9).normal(size=(int(known.max()) + 1, 12))
    return (profiles[known] + noise * rng.normal(size=(len(known), 12))).astype(np.float32)


def test_known_domains_are_found_and_numbered_by_size() -> None:
    known = np.where(X < 7, 0, np.where(Y < 9, 1, 2))
    labels = domains_of(of_known(known, 0.3), 3)
    assert labels is not None
    assert (labels == known).all()  # the largest is 0
    other = domains_of(of_known(known, 0.3, seed=1), 3)
    assert other is not None
    turned = (other + 1) % 3
    found = compared({"measured": labels, "predicted": turned}, XY, 3)
    assert found["predicted"]["labels"] == labels.tolist()  # numbered as those they share most with
    assert found["predicted"]["match"] == 1.0
    assert found["predicted"]["chance"] < 0.5


def test_smooth_domains_without_any_tie_match_no_better_than_moved_ones() -> None:
    """Whose adjusted Rand index is not 0 all the same: that is what stands beside it."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        fields = (gaussian_filter(rng.normal(size=(SIDE, SIDE)), 2.5) for _ in range(2))
        one, two = ((field > np.median(field)).astype(np.int64).ravel() for field in fields)
        found.append(compared({"measured": one, "predicted": two}, XY, 2)["predicted"])
    match, chance = (np.array([each[key] for each in found]) for key in ("match", "chance"))
    assert match.std() > 0.05
    assert abs((match - chance).mean()) < 0.05


def test_too_little_for_domains_gives_none() -> None:
    values = of_known(np.arange(196) % 2, 0.1)
    assert domains_of(values[:23], 3) is None
    assert domains_of(np.full((196, 3), np.nan, np.float32), 2) is None
    assert domains_of(np.ones((196, 3), np.float32), 2) is None
    values[:, 4] = np.nan
    assert domains_of(values, 2) is not None
    assert compared({"measured": None, "predicted": domains_of(values, 2)}, XY, 2)["predicted"].keys() == {"labels"}


def test_a_page_shows_what_was_measured_predicted_and_embedded(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad", side=8, genes=genes_of(6))
    names = [f"AA-{i}" for i in range(64)]
    y, x = (axis.ravel() for axis in np.mgrid[:8, :8])
    features = np.random.default_rng(3).normal(size=(64, 16)).astype(np.float32)

    def store(name: str, barcodes: list[str]) -> Path:
        slide = SlideArrays("s1", features, np.column_stack((x, y)) * 50.0 + 100, mpp=0.5, barcodes=barcodes)
        write_store(tmp_path / name, [slide], encoder="mine", tile_um=20.0)
        return tmp_path / name

    (slide,) = data_of(report(tmp_path / "p", domains=4, embeddings=store("a.zarr", names)))["slides"]
    domains: dict[str, Any] = slide["domains"]
    assert list(domains) == ["measured", "predicted", "embeddings"]
    assert {len(of["labels"]) for of in domains.values()} == {64}
    assert domains["predicted"]["match"] == 1.0  # measured is predicted, and one more
    assert abs(domains["embeddings"]["match"]) < 0.2
    assert data_of(report(tmp_path / "p"))["slides"][0]["domains"] == {}
    with pytest.raises(RunError, match="has other tiles than the prediction"):
        report(tmp_path / "p", domains=4, embeddings=store("b.zarr", names[::-1]))
    for number in (1, 9):
        with pytest.raises(UsageError, match="--domains takes 2 to 8"):
            report(tmp_path / "p", domains=number)
    with pytest.raises(UsageError, match="--domains 5 says how many"):
        report(tmp_path / "p", embeddings=tmp_path / "a.zarr")
