"""The three plots: what is drawn is what the file holds, and what is not to be trusted says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection

from nh2st_pipe import pl
from nh2st_pipe.core.errors import RunError, UsageError
from nh2st_pipe.prediction import predict
from nh2st_pipe.training.run import train
from tests.conftest import Study


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def made(unlike: tuple[int, ...] = (), picture: bool = False) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    var = pd.DataFrame({"trusted": [True, False, False], "judged": [True, True, False]}, index=["A", "B", "C"])
    obs = pd.DataFrame(index=[f"s{i}" for i in range(9)])
    obs["unlike"] = pd.Categorical(["yes" if i in unlike else "no" for i in range(9)])
    data = anndata.AnnData(rng.random((9, 3)).astype(np.float32), obs=obs, var=var)
    data.layers["target"] = data.X + 0.1 * rng.random((9, 3)).astype(np.float32)
    data.obsm["spatial"] = np.column_stack((np.tile([100, 200, 300], 3), np.repeat([100, 200, 300], 3))).astype(float)
    data.uns["nh2st_pipe"] = {"unit": "log10(counts scaled to 10,000 per spot + 1)"}
    if picture:
        factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 60.0}
        data.uns["spatial"] = {"s": {"images": {"hires": np.zeros((40, 50, 3), np.uint8)}, "scalefactors": factors}}
    return data


def dots(ax: Axes) -> Any:
    (found,) = (each for each in ax.collections if isinstance(each, EllipseCollection))
    return found


@pytest.mark.parametrize(("of", "layer"), [("predicted", None), ("measured", "target"), ("target", "target")])
def test_a_map_shows_the_genes_values_where_they_are(of: str, layer: str | None) -> None:
    data = made()
    ax = pl.map(data, "B", of=of)
    values = data.X[:, 1] if layer is None else data.layers[layer][:, 1]
    assert np.allclose(dots(ax).get_array(), values)
    assert np.allclose(dots(ax).get_offsets(), data.obsm["spatial"])
    assert ax.get_title() == f"B, {of} (not trusted)"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # y goes down, as on the slide
    assert np.allclose(dots(ax).get_widths(), 90)  # of a pitch of 100


def test_a_thumbnail_lies_beneath_in_its_own_scale() -> None:
    ax = pl.map(made(picture=True), "A", ax=plt.subplots()[1])
    (image,) = ax.get_images()
    pixels: Any = image.get_array()
    assert pixels.shape[:2] == (40, 50)
    assert np.allclose(dots(ax).get_offsets(), made().obsm["spatial"] * 0.1)
    assert np.allclose(dots(ax).get_widths(), 6)
    assert ax.get_title() == "A, predicted"
    assert not pl.map(made(picture=True), "A", image=False).get_images()


def test_tiles_that_are_unlike_are_crosses() -> None:
    ax = pl.map(made(unlike=(2, 7)), "C")
    assert len(dots(ax).get_offsets()) == 7
    (crosses,) = (
        each for each in ax.collections if not isinstance(each, EllipseCollection) and np.size(each.get_offsets())
    )
    assert np.allclose(crosses.get_offsets(), made().obsm["spatial"][[2, 7]])
    assert crosses.get_clim() == dots(ax).get_clim()
    assert ax.get_title() == "C, predicted (not judged)"


def test_pairs_have_the_pcc_of_this_slide() -> None:
    data = made()
    ax = pl.pairs(data, "A")
    pcc = np.corrcoef(data.X[:, 0], data.layers["target"][:, 0])[0, 1]
    assert ax.get_title() == f"A: PCC {pcc:.2f}"
    assert np.allclose(ax.collections[0].get_offsets(), np.column_stack((data.X[:, 0], data.layers["target"][:, 0])))
    data.layers["target"][:, 0] = 1.0
    assert pl.pairs(data, "A").get_title() == "A: PCC undefined"


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made()
    with pytest.raises(UsageError, match="no gene AA; did you mean 'A'"):
        pl.map(data, "AA")
    with pytest.raises(UsageError, match=r"no low values \(there are predicted, measured\)"):
        pl.map(data, "A", of="low")
    del data.layers["target"]
    with pytest.raises(UsageError, match="no measured values"):
        pl.pairs(data, "A")
    with pytest.raises(RunError, match=r"none\.h5ad"):
        pl.map(tmp_path / "none.h5ad", "A")
    with pytest.raises(UsageError, match="no prediction"):
        pl.maps([], "A")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(UsageError, match=r"pip install 'nh2st-pipe\[plot\]'"):
        pl.map(data, "A")


def test_several_slides_are_drawn_on_one_scale() -> None:
    one, two = made(), made()
    two.X = two.X * 3
    figure = pl.maps([("s1", one), ("s2", two)], "A", columns=1)
    low = min(one.X[:, 0].min(), two.X[:, 0].min())
    for ax in figure.axes:
        if ax.get_title():
            assert dots(ax).get_clim() == pytest.approx((low, two.X[:, 0].max()))
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["s1: A, predicted", "s2: A, predicted"]


def test_what_a_run_and_its_predictions_show_in_a_notebook(study: Study) -> None:
    study.stored()
    run = train(study.folder / "store.zarr", recipe="ridge", genes=5, settings=["baselines=[mean]", "choose={}"],
                out=study.folder / "run")  # fmt: skip
    assert run.table()["head"].to_list() == ["ridge", "mean"]
    assert run.table()["pcc"][0] == run.metrics["summary"]["pcc"]
    assert run.genes.shape[0] == 5
    assert set(run.genes["head"]) == {"ridge"}
    page = run.report()
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!')
    assert Path(page).is_file()
    text = run._repr_html_()
    assert f"<td>ridge</td><td>{run.metrics['summary']['pcc']:.4f}</td>" in text
    assert "3 folds by patient" in text
    ax = pl.calibration(run)
    points = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert len(points) == 4
    assert points[-1].get_markerfacecolor() == "white"  # 95 % is more than three can promise
    done = predict(run.path, embeddings=study.folder / "store.zarr", out=study.folder / "p")
    assert done["s1"].shape == (25, 5)
    assert len([ax for ax in done.maps(run.genes["gene"][0]).axes if ax.get_title()]) == 3
    assert re.search(r"3 slides predicted.*s0: trained on this slide", done._repr_html_())
    alone = train(study.folder / "store.zarr", recipe="mean", folds="none", genes=5, out=study.folder / "alone")
    assert "nothing is judged" in alone._repr_html_()
    assert alone.genes.is_empty()
    with pytest.raises(RunError, match="no intervals"):
        pl.calibration(alone)


def test_names_are_shown_and_never_run() -> None:
    from nh2st_pipe.runs.shown import predictions_html

    text = predictions_html({}, {"<script>": "<b>"}, ["<i>"] * 30)
    assert "<script>" not in text
    assert "&lt;script&gt;: failed, &lt;b&gt;" in text
    assert "and 11 more" in text
