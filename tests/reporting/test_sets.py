"""Gene sets: a map each, of the genes that are there and may be believed, by known values."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import zscore
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.reporting import maps
from nh2st_pipe.reporting.page import report
from nh2st_pipe.reporting.sets import GeneSet, read_gmt, score_of
from tests.exporting.made import genes_of, prediction
from tests.reporting.test_page import make_run

GMT = "UP\tof MSigDB\tG0\tG1\tG9\tX\nONE\t\tG2\tY\n\nDOUBTED\t-\tG3\tG4\tG0\n"


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def map_of(data: dict[str, Any], gene: str, plane: str = "predicted") -> Any:
    """Return a gene's values as the page unpacks them."""
    (slide,) = data["slides"]
    place = slide["genes"].index(data["genes"]["names"].index(gene))
    at = next(i for i, each in enumerate(slide["planes"]) if each["key"] == plane)
    raw = np.frombuffer(zlib.decompress(base64.b64decode(slide["values"])), np.uint8)
    steps = raw.reshape(len(slide["planes"]), len(slide["genes"]), slide["n"])[at, place].astype(float)
    low, high = slide["planes"][at]["low"][place], slide["planes"][at]["high"][place]
    return np.where(steps == 255, np.nan, low + steps / slide["levels"] * (high - low))


def test_a_set_is_the_mean_of_its_standardised_genes(tmp_path: Path) -> None:
    trusted = {**dict.fromkeys(genes_of(10), True), "G3": False}
    (tmp_path / "p").mkdir()
    values = prediction(tmp_path / "p/s1.h5ad", side=6, genes=genes_of(10), trusted=trusted)
    (tmp_path / "sets.gmt").write_text(GMT)
    data = data_of(report(tmp_path / "p", gene_sets=tmp_path / "sets.gmt"))
    names = data["genes"]["names"]
    assert [name for name in names if name.startswith("set: ")] == ["set: UP", "set: DOUBTED"]
    assert data["sets"] == {
        str(names.index("set: UP")): "3 of its 4 genes",
        str(names.index("set: DOUBTED")): "2 of its 3 genes, 1 left out that are not to be trusted",
    }
    for name, columns in (("UP", [0, 1, 9]), ("DOUBTED", [4, 0])):
        for plane in ("predicted", "target"):  # what was measured is what was predicted, and one more
            expected = zscore(values[:, columns], axis=0).mean(axis=1)
            np.testing.assert_allclose(map_of(data, f"set: {name}", plane), expected, atol=0.02)
    assert any("No map of ONE: fewer than two of its genes" in words for words in data["warnings"])
    (slide,) = data["slides"]
    assert slide["pcc"][:2] == [1.0, 1.0]
    assert slide["half_width"][:3] == [None, None, 0.25]
    np.testing.assert_allclose(map_of(data, "G7"), values[:, 7], atol=0.02)


def test_sets_are_kept_where_not_all_genes_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad", side=6, genes=genes_of(40))
    (tmp_path / "sets.gmt").write_text(GMT)
    monkeypatch.setattr(maps, "_MOST_BYTES", 700)
    data = data_of(report(tmp_path / "p", gene_sets=tmp_path / "sets.gmt"))
    (slide,) = data["slides"]
    shown = [data["genes"]["names"][gene] for gene in slide["genes"]]
    assert shown[:2] == ["set: UP", "set: DOUBTED"]
    assert 2 < len(shown) < 42


def test_a_gene_that_does_not_vary_or_has_no_values_counts_as_not_there() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 4)).astype(np.float32)
    values[:, 1], values[4, 2] = 3, np.nan
    scores = score_of(values, {"a": [0, 1, 2], "none": [1, 2], "both": [0, 3]})
    np.testing.assert_allclose(scores[:, 0], zscore(values[:, 0]), rtol=1e-5)
    assert np.isnan(scores[:, 1]).all()
    np.testing.assert_allclose(scores[:, 2], zscore(values[:, [0, 3]], axis=0).mean(axis=1), rtol=1e-4, atol=1e-6)
    assert score_of(values[:0], {"a": [0]}).shape == (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("UP\tx\tG0\nUP\tx\tG1\n", "line 2: there is a gene set UP already"),
        ("UP\tx\tG0\nDOWN\tx\n", "line 2, is no gene set"),
        ("G0,G1\n", "line 1, is no gene set"),
        ("\n", "holds no gene set"),
    ],
)
def test_what_is_no_gene_set_is_named_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "sets.gmt").write_text(text)
    with pytest.raises(UsageError, match=re.escape(words)):
        read_gmt(tmp_path / "sets.gmt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_gmt(tmp_path / "nothing.gmt")


def test_sets_of_a_run_follow_its_verdicts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "sets.gmt").write_text("BOTH\tx\tACTB\tKRT19\tACTB\n")
    done = CliRunner().invoke(app, ["report", str(run), "--gene-sets", str(tmp_path / "sets.gmt")])
    assert done.exit_code == 0, done.output
    data = data_of(run / "report.html")
    assert list(data["sets"].values()) == ["2 of its 2 genes"]
    assert GeneSet("x", ("A", "B", "C")).of(["C", "A"], {"A"}) == (
        [],
        "1 of its 3 genes, 1 left out that are not to be trusted",
    )
