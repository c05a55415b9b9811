"""Stores written from arrays: what embed would have written, with the same checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import nh2st_pipe
from nh2st_pipe.core.errors import EncoderError, NH2STError, SlideError, StoreError, UsageError
from nh2st_pipe.embedding.plan import recipe_of
from nh2st_pipe.embedding.repair import repair
from nh2st_pipe.encoders.weights import find_weights
from nh2st_pipe.store.arrays import SlideArrays, write_store
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import verify
from tests.conftest import Study

N = 30


def arrays(slide_id: str = "a", dim: int = 16, views: int = 1, **changes: Any) -> SlideArrays:
    rng = np.random.default_rng(sum(map(ord, slide_id)))
    shape = (N, dim) if views == 1 else (N, views, dim)
    xy = np.stack(np.meshgrid(np.arange(6), np.arange(5)), axis=-1).reshape(-1, 2) * 224.0 + 112
    values: dict[str, Any] = {
        "features": rng.normal(size=shape).astype(np.float32),
        "xy": xy,
        "array_row": np.repeat(np.arange(5), 6),
        "array_col": np.tile(np.arange(6), 5),
        "mpp": 0.5,
        "counts": sp.csr_matrix(rng.poisson(3.0, (N, 12))),
        "genes": [f"G{i}" for i in range(12)],
        **changes,
    }
    return SlideArrays(slide_id, **values)


def write(path: Path, *slides: SlideArrays, **changes: Any) -> Any:
    return write_store(path, slides, **{"encoder": "mine", "tile_um": 112, **changes})


@pytest.mark.parametrize("views", [1, 8])
def test_what_is_written_is_read_back(tmp_path: Path, views: int) -> None:
    one = arrays(views=views, slide_embeddings={"titan": np.arange(4.0)}, patient="P", extra={"site": "x"})
    done = write(tmp_path / "s.zarr", one, arrays("b", views=views))
    assert done.done == ["a", "b"]
    store = open_store(tmp_path / "s.zarr")
    assert (store.contract.origin, store.contract.views, store.contract.weights.sha256) == (
        "imported",
        views,
        "unknown",
    )
    read = store.read("a")
    assert np.array_equal(read.views, one.features.reshape(N, views, 16).astype(np.float16))
    assert np.array_equal(read.xy, one.xy)
    assert read.counts is not None
    assert (read.counts != one.counts).nnz == 0
    assert (read.patient, read.extra, read.mpp) == ("P", {"site": "x"}, 0.5)
    assert read.slide_vector is not None
    assert read.slide_vector.tolist() == [0, 1, 2, 3]
    assert store.read("b").slide_vector is None
    picture = read.uns["spatial"]["a"]["images"]["hires"]
    assert picture.shape == (640, 768, 3)  # 1,344 × 1,120 px
    assert (picture != 255).any()
    assert verify(tmp_path / "s.zarr").damaged == {}


def test_writing_again_keeps_what_is_the_same_and_refuses_what_is_not(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", arrays())
    again = write(tmp_path / "s.zarr", arrays(), arrays("b"))
    assert (again.kept, again.done) == (["a"], ["b"])
    other = replace(arrays(), features=arrays().features + 1)
    with pytest.raises(SlideError, match="a: features changed since it was written"):
        write(tmp_path / "s.zarr", other)
    assert write(tmp_path / "s.zarr", other, redo_changed=True).done == ["a"]
    assert np.array_equal(open_store(tmp_path / "s.zarr").read("a").views[:, 0], other.features.astype(np.float16))
    fewer = replace(other, counts=other.counts * 2)
    assert write(tmp_path / "s.zarr", fewer).done == ["a"]  # counts alone: the embeddings are the same
    assert (open_store(tmp_path / "s.zarr").read("a").counts != fewer.counts).nnz == 0


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.store.write import SlideWriter

    with monkeypatch.context() as broken:
        broken.setattr(SlideWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "s.zarr", arrays())
    assert open_store(tmp_path / "s.zarr").incomplete() == ["a"]
    assert write(tmp_path / "s.zarr", arrays()).done == ["a"]
    assert open_store(tmp_path / "s.zarr").slides() == ["a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"array_row": [1]}, "array_row has 1 values, and features 30 rows"),
        ({"xy": np.zeros((N - 1, 2))}, r"a: xy should be 30 × 2, a centre for each row of features, and is \(29, 2\)"),
        ({"features": np.full((N, 16), 1e6, np.float32)}, "no numbers in float16 .* in 30 rows: 0, 1"),
        ({"features": np.full((N, 16), np.nan, np.float32)}, "no numbers in float16"),
        ({"features": np.ones((N, 16), np.int64)}, "features are int64"),
        ({"features": np.zeros((1, N, 16), np.float32)}, "tiles × values"),
        ({"features": np.zeros((0, 16), np.float32)}, "it has no tiles"),
        ({"xy": np.ones((N, 2))}, "29 rows have the centre of another row: 1, 2"),
        ({"xy": np.full((N, 2), np.inf)}, "xy is not a number in 30 rows"),
        ({"size": (600, 600)}, r"14 tiles lie outside the slide of 600 × 600 px, the first at \(1008.0, 112.0\)"),
        ({"mpp": None}, "its mpp is needed"),
        ({"mpp": 0.0}, "mpp is 0; a number above 0 is expected"),
        ({"tile_level0_px": -3.0}, "tile_level0_px is -3"),
        ({"genes": None}, "counts and genes are given together"),
        ({"genes": ["G"] * 12}, "genes must be unique"),
        ({"counts": np.ones((N, 3))}, "counts should be 30 × 12"),
        ({"counts": -np.ones((N, 12))}, "counts are negative"),
        ({"barcodes": ["b"] * N}, "barcodes must be unique, .*: b"),
        ({"barcodes": ["b"]}, "barcodes has 1 values, and features 30 rows"),
    ],
)
def test_what_does_not_belong_together_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StoreError, match=words):
        write(tmp_path / "s.zarr", arrays("first"), arrays(**changes))
    assert open_store(tmp_path / "s.zarr").slides() == ["first"]


def test_an_encoder_is_held_against_its_recipe(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="features have 16 values, and encoder uni2-h gives 1,536"):
        write(tmp_path / "s.zarr", arrays(), encoder="uni2-h")
    assert not (tmp_path / "s.zarr").exists()
    said = write(tmp_path / "s.zarr", arrays(dim=1536), encoder="uni2h").notices
    assert "uni2-h" in said[0]
    with pytest.raises(EncoderError, match="known by its name alone"):
        find_weights(recipe_of(open_store(tmp_path / "s.zarr").contract), None)


def test_a_store_holds_what_one_tool_made(study: Study, tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", arrays(dim=96), encoder="fake")
    with pytest.raises(StoreError, match=r"features imported from arrays .*, not embeddings of embed"):
        study.embed(store=tmp_path / "s.zarr", tile_px=None, tile_um=112)
    with pytest.raises(StoreError, match=r"from arrays .*, not features imported from other"):
        write(tmp_path / "s.zarr", arrays("b", dim=96), encoder="fake", tool="other")
    with pytest.raises(StoreError, match="are 8 views of 96 values, and the store has 1 of 96"):
        write(tmp_path / "s.zarr", arrays("c", dim=96), arrays("b", dim=96, views=8), encoder="fake")
    with pytest.raises(UsageError, match="the side of a tile is above 0"):
        write(tmp_path / "s.zarr", arrays("b"), tile_um=0)
    with pytest.raises(UsageError, match="either tile_um or tile_px"):
        write(tmp_path / "s.zarr", arrays("b"), tile_px=224)


def test_a_head_learns_from_it_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", arrays("a"), arrays("b"), arrays("c"))
    nh2st_pipe.train(tmp_path / "s.zarr", recipe="ridge", settings=["baselines=[]"], out=tmp_path / "run")
    assert "trained on features imported from arrays" in (tmp_path / "run" / "metrics.json").read_text()
    done = nh2st_pipe.predict(tmp_path / "run", embeddings=tmp_path / "s.zarr", out=tmp_path / "p")
    assert sorted(done.files) == ["a", "b", "c"]
    assert done.failed == {}


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ({"titan": np.array([1, np.nan])}, "titan, a vector of the slide, is .* no number"),
        ({"titan": np.zeros(0)}, "titan, a vector of the slide"),
        ({"../embedding/X": np.zeros(3)}, r"a vector of the slide is called '\.\./embedding/X'"),
    ],
)
def test_vectors_of_slides_are_checked_before_anything_is_written(
    tmp_path: Path, vectors: dict[str, Any], words: str
) -> None:
    with pytest.raises(SlideError, match=words):
        write(tmp_path / "s.zarr", arrays("first"), arrays("second", slide_embeddings=vectors))
    assert open_store(tmp_path / "s.zarr").slides() == ["first"]
    assert open_store(tmp_path / "s.zarr").incomplete() == []


def test_what_was_imported_is_not_made_anew_from_slides(study: Study, tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", arrays("s0"))
    (tmp_path / "s.zarr/slides/s0/embedding/X/c/0/0").write_bytes(b"no embeddings")
    found = verify(tmp_path / "s.zarr")
    assert list(found.damaged) == ["s0"]
    with pytest.raises(StoreError, match=r"be made anew from slides: delete the folders of s0 in it, and import"):
        repair(found, study.manifest)
    assert (tmp_path / "s.zarr/slides/s0/zarr.json").is_file()


def test_a_head_trained_on_imported_features_predicts_slides(study: Study, tmp_path: Path) -> None:
    """Embedded here, with the encoder of that name; that the weights are the same nobody knows, and that is said."""
    write(tmp_path / "s.zarr", arrays("a", dim=96), arrays("b", dim=96), encoder="fake", tile_um=24)
    settings = ["baselines=[]"]
    nh2st_pipe.train(tmp_path / "s.zarr", recipe="ridge", settings=settings, folds="none", out=tmp_path / "run")
    card = (tmp_path / "run/model/README.md").read_text()
    assert "features imported from arrays (its encoder fake, values in float32), weights unknown" in card
    lines = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join([f"{lines[0]},mpp", f"{lines[1]},0.5"]) + "\n")
    done = nh2st_pipe.predict(tmp_path / "run", slides=study.manifest, out=tmp_path / "p", device="cpu")
    assert (list(done.files), done.failed) == (["s0"], {})
    assert any("and these are embeddings of embed: encoder, pooling" in words for words in done.notices)


def test_a_head_goes_across_tools_where_all_that_is_known_agrees(tmp_path: Path) -> None:
    write(tmp_path / "own.zarr", arrays("a", dim=96), arrays("b", dim=96), encoder="fake", tool="one")
    nh2st_pipe.train(
        tmp_path / "own.zarr", recipe="ridge", settings=["baselines=[]"], folds="none", out=tmp_path / "run"
    )
    write(tmp_path / "two.zarr", arrays("c", dim=96), encoder="fake", tool="two")
    said = nh2st_pipe.predict(tmp_path / "run", embeddings=tmp_path / "two.zarr", out=tmp_path / "p").notices
    assert any("whether the weights are the same cannot be told" in words for words in said)
    write(tmp_path / "three.zarr", arrays("c", dim=96), encoder="fake", tool="two", tile_um=128)
    with pytest.raises(NH2STError, match="tiles of 112 µm, not 128 µm"):
        nh2st_pipe.predict(tmp_path / "run", embeddings=tmp_path / "three.zarr", out=tmp_path / "q")
