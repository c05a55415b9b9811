"""Grids finer than the spots that were trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

from nh2st_pipe.data.pitch import overlap_for, parted, pitch_in_tiles, sublattice
from nh2st_pipe.prediction import predict
from nh2st_pipe.store.read import SlideData, open_store
from nh2st_pipe.training.run import train
from tests.conftest import Study, slide, write_spots


@pytest.mark.parametrize(
    ("pitch", "overlap"),
    [(None, None), (1.0, 0.0), (2.0, 0.0), (100 / 112, 0.1071), (200 / 112, 0.1071), (2.9, 0.0333)],
)
def test_the_widest_grid_without_gaps_that_the_pitch_is_a_multiple_of(
    pitch: float | None, overlap: float | None
) -> None:
    assert overlap_for(pitch) == overlap
    if pitch is not None and overlap is not None:
        assert pitch / (1 - overlap) == pytest.approx(round(pitch / (1 - overlap)), abs=1e-3)


def grid(side: int, pitch: float) -> SlideData:
    rows, cols = (axis.ravel() for axis in np.mgrid[:side, :side])
    return slide(
        counts=np.ones((side * side, 1)),
        genes=["a"],
        xy=np.column_stack((cols, rows)) * pitch,
        array_row=rows,
        array_col=cols,
        uns={"image": {"tile_level0_px": 40.0}},
    )


def test_a_finer_grid_is_parted_into_some_of_the_trained_pitch() -> None:
    fine = replace(grid(6, 20.0), counts=None, views=np.zeros((36, 1, 2), np.float16))
    assert pitch_in_tiles(fine) == 0.5
    step, parts = parted(fine, 1.0)
    assert step == 2
    assert sorted(np.concatenate(parts).tolist()) == list(range(36))
    assert len(parts) == 4
    for rows in parts:
        own = sublattice(fine, rows, step)
        assert pitch_in_tiles(own) == 1.0
        assert own.array_row is not None
        assert sorted(set(own.array_row.tolist())) == [0, 1, 2]
        assert own.neighbours.shape == (9, 9)
        away = np.abs(own.xy[own.neighbours[4]] - own.xy[4]).max(1)  # the middle one of nine
        assert sorted(away.tolist()) == [0.0] + [40.0] * 8
    assert [len(rows) for rows in parted(fine, 0.5)[1]] == [36]
    assert [len(rows) for rows in parted(fine, None)[1]] == [36]
    assert [len(rows) for rows in parted(grid(6, 20.0), 1.0)[1]] == [36]  # it has spots


@pytest.mark.parametrize("head", ["ridge-context", "nh2st-context"])
def test_a_tile_of_a_grid_is_predicted_as_the_spot_at_its_place(
    make_study: Callable[..., Study], tmp_path: Path, head: str
) -> None:
    study = make_study(3, side=6)
    store = study.folder / "store.zarr"
    study.embed(tile_px=20)  # spots are two tiles apart
    few = {"nh2st-context": ["head.network.epochs=2"]}.get(head, [])
    train(store, recipe=head, genes=5, folds="none", out=tmp_path / "run", settings=["baselines=[]", *few])
    new = make_study(1, side=7, expression=False, name="new")
    done = predict(tmp_path / "run", slides=new.manifest, out=tmp_path / "grid", any_mpp=True)
    assert not any("tiles see neighbours" in notice for notice in done.notices)
    made = anndata.read_h5ad(done.files["s0"])
    assert pitch_in_tiles(open_store(tmp_path / "grid/store.zarr").read("s0")) == pytest.approx(1.0)
    picked = (made.obs["array_row"] % 2 == 0) & (made.obs["array_col"] % 2 == 0)
    at = made[picked.to_numpy()]
    places = at.obs[["array_row", "array_col"]].to_numpy() // 2
    write_spots(new.folder / "s0.h5ad", np.asarray(at.obsm["spatial"]), grid=places)
    (new.folder / "spots.csv").write_text("slide_id,slide,expression\nspots,s0.png,s0.h5ad\n")
    spots = predict(tmp_path / "run", slides=new.folder / "spots.csv", out=tmp_path / "spots", any_mpp=True)
    theirs = anndata.read_h5ad(spots.files["spots"])
    assert theirs.obsm["spatial"].tolist() == at.obsm["spatial"].tolist()
    assert np.allclose(at.X, theirs.X, atol=1e-5)


def test_a_grid_whose_pitch_is_another_is_said_to_be(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(3, side=6)
    study.embed(tile_px=30)  # 1.33 tiles apart
    train(study.folder / "store.zarr", recipe="ridge", genes=5, folds="none", out=tmp_path / "run")
    new = make_study(1, expression=False, name="new")
    new.embed(tile_px=30)
    said = predict(tmp_path / "run", embeddings=new.folder / "store.zarr", out=tmp_path / "p", any_mpp=True).notices
    words = "s0: its tiles see neighbours 1.00 tiles away, and the head was trained on spots 1.33 apart"
    assert f"{words}; embed it with --overlap 0.3333" in said
    again = predict(tmp_path / "run", slides=new.manifest, out=tmp_path / "q", any_mpp=True).notices
    assert not any("tiles see neighbours" in each for each in again)
