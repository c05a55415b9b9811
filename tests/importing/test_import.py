"""Features of every tool, laid down as it lays them, into stores that stage two learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import nh2st_pipe
from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import NH2STError, StoreError, UsageError
from nh2st_pipe.importing import layouts
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section
from nh2st_pipe.importing.run import ImportSummary, import_features
from nh2st_pipe.recipes import plugins
from nh2st_pipe.store.format import fingerprint
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import verify
from tests.importing import made
from tests.importing.made import SIDE, TOOLS, Made

STORE = "store.zarr"


def bring(folder: Path, manifest: Path, given: dict[str, Any], **changes: Any) -> ImportSummary:
    given = {**given, **changes}
    return import_features(given.pop("at", folder), manifest, manifest.parent / STORE, **given)


@pytest.mark.parametrize("tool", TOOLS)
def test_features_of_every_tool_are_trained_on_and_predicted_from(tmp_path: Path, tool: str) -> None:
    manifest, every = made.slides(tmp_path / "study")
    if tool == "gigapath":  # whose encoder is known
        every = [replace(one, features=np.tile(one.features, (1, 128))) for one in every]
    given = TOOLS[tool](tmp_path / "features", every)
    summary = bring(tmp_path / "features", manifest, given)
    assert (summary.failed, summary.done) == ({}, ["c0", "c1"])
    assert any("each tile has one view" in words for words in summary.notices)
    store = open_store(manifest.parent / STORE)
    contract = store.contract
    assert contract.imported is not None
    assert contract.imported.tool.lower() == tool.partition("_")[0]
    assert contract.weights.sha256 == "unknown"
    assert contract.tile["size_um"] == SIDE * made.MPP
    for slide_id, one in zip(("c0", "c1"), every, strict=True):
        read = store.read(slide_id)
        order = {tuple(xy): row for row, xy in enumerate(one.centres)}
        rows = [order[tuple(xy)] for xy in read.xy]
        assert sorted(rows) == list(range(len(one.corner)))
        assert np.array_equal(read.views[:, 0], one.features[rows].astype(np.float16))
        assert [read.barcodes[i] for i in range(3)] == [one.barcodes[row] for row in rows[:3]]
        assert read.counts is not None
    assert verify(manifest.parent / STORE).damaged == {}
    settings = ["baselines=[]", "targets.smooth=none"]
    nh2st_pipe.train(manifest.parent / STORE, recipe="ridge", settings=settings, folds="none", out=tmp_path / "run")
    done = nh2st_pipe.predict(tmp_path / "run", embeddings=manifest.parent / STORE, out=tmp_path / "p")
    assert sorted(done.files) == ["c0", "c1"]
    again = bring(tmp_path / "features", manifest, given)
    assert (again.done, again.kept) == ([], ["c0", "c1"])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda one: one.moved(one.corner[:, ::-1]), "if they were with x and y swapped"),
        (lambda one: one.moved(one.corner + SIDE // 2), "if coordinates were of centres, not of corners"),
        (lambda one: one.moved(one.corner - SIDE // 2), "if coordinates were of corners, not of centres"),
        (lambda one: one.moved((one.corner * made.MPP).round().astype(int)), "if µm were taken for px of level 0"),
        (lambda one: one.moved(np.array([made.SIZE[0] - SIDE, 0]) + one.corner * [-1, 1]), "mirrored left to right"),
    ],
)
def test_coordinates_that_are_read_wrongly_are_named(tmp_path: Path, how: Any, words: str) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "features", [how(every[0]), every[1]])
    summary = bring(tmp_path / "features", manifest, {})
    assert summary.done == ["c1"]
    assert words in summary.failed["c0"]
    assert "--trust-places" in summary.failed["c0"]
    assert bring(tmp_path / "features", manifest, {}, trust_places=True).done == ["c0"]


def test_coordinates_beyond_the_slide_are_named(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    wrong = every[0].moved(every[0].corner * 2)
    made.trident(tmp_path / "features", [wrong, every[1]])
    summary = bring(tmp_path / "features", manifest, {}, trust_places=True)
    assert "tiles lie outside the slide of 800 × 600 px" in summary.failed["c0"]
    assert "if px of level 0 were taken for µm" in summary.failed["c0"]


def _damage(path: Path, **changes: Any) -> None:
    with h5py.File(path, "r+") as file:
        for name, values in changes.items():
            kept = dict(file[name].attrs)
            del file[name]
            file[name] = values
            file[name].attrs.update(kept)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def _with_inf(values: Any, row: int) -> Any:
    values = values.copy()
    values[row, 3] = np.inf
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path, one: _damage(path, coords=one.corner[:-1]), r"\d+ rows of features and \d+ of coordinates"),
        (lambda path, one: _cut(path), "cannot be used"),
        (
            lambda path, one: _damage(path, features=_with_inf(one.features, 7)),
            "no numbers in float16 .* in 1 rows: 7",
        ),
        (lambda path, one: _damage(path, features=np.zeros((0, 12), np.float32), coords=np.zeros((0, 2))), "no tiles"),
        (lambda path, one: _damage(path, features=np.zeros((2, 3, 4), np.float32)), "should be tiles × values"),
        (lambda path, one: _damage(path, features=np.zeros((len(one.corner), 12), np.int32)), "features are int32"),
        (
            lambda path, one: _damage(path, features=np.zeros((len(one.corner), 5), np.float32)),
            "features have 5 values",
        ),
        (lambda path, one: _damage(path, coords=np.zeros(9)), "coordinates should be tiles × 2"),
        (lambda path, one: _damage(path, coords=one.corner * 0), "stand twice or more"),
    ],
)
def test_a_slide_whose_features_cannot_be_used_is_passed_over(tmp_path: Path, change: Any, words: str) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "features", every)
    path = tmp_path / "features/20x_32px_0px_overlap/features_our_encoder/case-1.h5"
    change(path, every[1])
    summary = bring(tmp_path / "features", manifest, {"layout": "trident", "trust_places": True})
    assert summary.done == ["c0"]
    with pytest.raises(NH2STError, match=words):
        raise NH2STError(summary.failed["c1"])
    assert str(path) in summary.failed["c1"] or "stand twice" in words
    assert open_store(manifest.parent / STORE).slides() == ["c0"]


def test_a_file_that_cannot_be_read_is_its_slides_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "features", every)

    def forbidden(path: Path) -> str:
        if path.name == "case-1.h5":
            raise PermissionError(13, "Permission denied", str(path))
        return fingerprint(path)

    monkeypatch.setattr("nh2st_pipe.importing.run.fingerprint", forbidden)
    summary = bring(tmp_path / "features", manifest, {})
    assert summary.done == ["c0"]
    assert summary.failed["c1"].endswith("case-1.h5 cannot be read: Permission denied")


def test_what_has_no_other_side_is_named_both_ways(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", 3, expression=False)
    made.trident(tmp_path / "features", [every[0], every[1], Made("other", *list(vars(every[2]).values())[1:])])
    summary = bring(tmp_path / "features", manifest, {})
    assert summary.done == ["c0", "c1"]
    assert "holds no features of it" in summary.failed["c2"]
    assert summary.without_slide == ["other"]
    assert any("does not have: other" in words for words in summary.notices)


def test_names_with_an_id_behind_a_dot_are_told_apart(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", 3, expression=False)
    called = ["case-0.aa", "case-0.bb", "case-2.cc"]
    made.trident(tmp_path / "features", [replace(one, name=name) for one, name in zip(every, called, strict=True)])
    lines = manifest.read_text().splitlines()
    (manifest.parent / "case-1.png").rename(manifest.parent / "case-0.bb.png")
    manifest.write_text("\n".join([*lines[:2], lines[2].replace("case-1.png", "case-0.bb.png"), lines[3]]) + "\n")
    summary = bring(tmp_path / "features", manifest, {})
    assert summary.done == ["c1", "c2"]  # c2 by what stands before the dot, of which there is one
    assert "holds no features of it, as c0 or case-0" in summary.failed["c0"]
    assert summary.without_slide == ["case-0.aa"]


def test_what_the_files_do_not_tell_is_asked(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "two", every, "uni_v1")
    made.trident(tmp_path / "two", every, "conch_v1")
    with pytest.raises(UsageError, match="features of several encoders: choose with --encoder conch_v1 or uni_v1"):
        bring(tmp_path / "two", manifest, {})
    with pytest.raises(UsageError, match="holds no features of virchow; it has those of conch_v1, uni_v1"):
        bring(tmp_path / "two", manifest, {"encoder": "virchow"})
    with pytest.raises(StoreError, match="features have 12 values, and encoder uni gives 1,024"):
        bring(tmp_path / "two", manifest, {"encoder": "uni"})
    made.clam_1nd(tmp_path / "clam", every)
    with pytest.raises(UsageError, match="CLAM does not write which encoder made its features: give --encoder"):
        bring(tmp_path / "clam", manifest, {})
    with pytest.raises(UsageError, match="no file says how large its tiles are: give --coords"):
        bring(tmp_path / "clam", manifest, {"encoder": "mine"})
    made.tiatoolbox(tmp_path / "tia", every)
    with pytest.raises(UsageError, match="give --mpp-read"):
        bring(tmp_path / "tia", manifest, {"encoder": "mine"})
    with pytest.raises(UsageError, match="--tile-px takes a number above 0, not 0"):
        bring(tmp_path / "clam", manifest, {"encoder": "mine", "tile_px": 0})
    with pytest.raises(UsageError, match="--tile-um and --tile-px both say how large tiles are"):
        bring(tmp_path / "clam", manifest, {"encoder": "mine", "tile_px": 3, "tile_um": 3})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"looks like nothing that is known here .* it holds nothing"):
        bring(tmp_path / "empty", manifest, {})
    with pytest.raises(UsageError, match=r"--from tridnet: it is one of .*; did you mean 'trident'\?"):
        bring(tmp_path / "clam", manifest, {"layout": "tridnet"})
    assert not (manifest.parent / STORE).exists()


def test_known_encoders_are_known_by_the_tools_names(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    wide = [Made(one.name, one.corner, np.tile(one.features, (1, 128)), one.spots) for one in every]
    made.trident(tmp_path / "features", wide, "uni_v2")
    assert bring(tmp_path / "features", manifest, {}).encoder == "uni2-h"
    contract = open_store(manifest.parent / STORE).contract
    assert (contract.identity["name"], contract.identity["pooling"], contract.precision) == (
        "uni2-h",
        "cls",
        "bfloat16",
    )
    assert contract.imported is not None
    assert contract.imported.assumed == ("bfloat16 arithmetic",)
    with pytest.raises(StoreError, match=r"features imported from TRIDENT .*, not embeddings of embed"):
        nh2st_pipe.embed(manifest, store=manifest.parent / STORE)
    both = [Made(one.name, one.corner, np.tile(one.features, (1, 128)), one.spots) for one in every]
    made.stamp(tmp_path / "stamp", both)
    with pytest.raises(StoreError, match=r"from TRIDENT .*, not features imported from STAMP"):
        bring(tmp_path / "stamp", manifest, {})


def test_a_store_goes_on_in_the_arithmetic_that_it_was_begun_in(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "one", every[:1])
    made.trident(tmp_path / "two", every[1:])
    assert bring(tmp_path / "one", manifest, {"precision": "bfloat16"}).done == ["c0"]
    assert bring(tmp_path / "two", manifest, {}).done == ["c1"]
    with pytest.raises(StoreError, match="precision bfloat16, not float16"):
        bring(tmp_path / "two", manifest, {"precision": "float16"})


def test_spots_get_the_tile_that_covers_them(tmp_path: Path) -> None:
    from tests.conftest import write_spots

    manifest, every = made.slides(tmp_path / "study")
    one = every[0]
    spots = np.vstack((one.centres[::2] + np.array([10, -5]), [[750.0, 575.0]]))  # the last has no tile
    grid = np.column_stack((np.arange(len(spots)), np.zeros(len(spots), int)))
    write_spots(manifest.parent / "c0.h5ad", spots, grid=grid)
    made.trident(tmp_path / "features", every)
    summary = bring(tmp_path / "features", manifest, {})
    assert summary.done == ["c0", "c1"]
    said = " ".join(words for words in summary.notices if words.startswith("c0"))
    assert f"{len(spots) - 1} of {len(spots)} spots joined to tiles around them, and the others are left out" in said
    assert "tiles are not around spots: their centres are 35% of a tile's side away" in said
    read = open_store(manifest.parent / STORE).read("c0")
    assert len(read) == len(spots) - 1
    assert np.array_equal(read.views[:, 0], one.features[::2].astype(np.float16))
    assert np.array_equal(read.xy, spots[:-1])
    vector = open_store(manifest.parent / STORE).read("c0").slide_vectors["titan"]
    assert np.allclose(vector, one.features.mean(0))


def test_spots_of_another_section_are_refused(tmp_path: Path) -> None:
    from tests.conftest import write_spots

    manifest, every = made.slides(tmp_path / "study")
    write_spots(manifest.parent / "c0.h5ad", every[0].centres, barcodes=[f"x{name}" for name in every[0].barcodes])
    write_spots(manifest.parent / "c1.h5ad", every[1].centres + 150, barcodes=every[1].barcodes)
    given = made.hest(tmp_path / "features", every)
    summary = bring(tmp_path / "features", manifest, given)
    assert "none of" in summary.failed["c0"]
    assert "spots and features of the same barcode lie 212 level-0 px apart" in summary.failed["c1"]


def test_tiles_of_another_magnification_are_another_stores(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "features", every)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], lines[2].replace(",0.5,", ",0.53,")]) + "\n")
    summary = bring(tmp_path / "features", manifest, {})
    assert any("c1: its tiles are 16.96 µm wide, 6% off the store's 16" in words for words in summary.notices)
    manifest.write_text("\n".join([*lines[:2], lines[2].replace(",0.5,", ",0.25,")]) + "\n")
    summary = bring(tmp_path / "features", manifest, {"redo_changed": True})
    assert "its tiles are 8 µm wide, and the store's 16: another magnification?" in summary.failed["c1"]


def test_a_file_of_anything_but_tensors_runs_nothing(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.slide2vec(tmp_path / "features", every)
    torch.save({"a": print}, tmp_path / "features/tile_embeddings/case-0.pt")
    torch.save([1, 2], tmp_path / "features/tile_embeddings/case-1.pt")
    summary = bring(tmp_path / "features", manifest, {})
    assert "a file of tensors alone is expected" in summary.failed["c0"]
    assert "holds list, and a tensor is expected" in summary.failed["c1"]
    made.slide2vec(tmp_path / "features", every)
    (tmp_path / "features/tile_embeddings/case-1.meta.json").unlink()
    assert "it is unfinished" in bring(tmp_path / "features", manifest, {}).failed["c1"]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study", expression=False)
    made.trident(tmp_path / "features", every[:1])
    store = str(tmp_path / STORE)
    call = ["import-features", str(tmp_path / "features"), "--slides", str(manifest), "--store", store]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1
    assert "tiles of 1 slides from TRIDENT (our_encoder), 0 were there already, 1 failed" in done.output
    assert "c1: " in done.output
    said = CliRunner().invoke(app, [*call, "--json"])
    assert json.loads(said.stdout)["kept"] == ["c0"]
    seen = CliRunner().invoke(app, ["inspect", store])
    assert "features imported from TRIDENT (its encoder our_encoder, values in float32); assumed" in seen.output


class Mine:
    name = "mine"

    def knows(self, look: Look) -> bool:
        return "mine.npz" in look.names

    def find(self, folder: Path, asked: Asked) -> Found:
        @contextmanager
        def opened() -> Iterator[Features]:
            with np.load(folder / "mine.npz") as file:
                yield Features(file["features"], Places(file["xy"], float(SIDE), of="centre"))

        return Found("Mine", (Section("case-0", folder / "mine.npz", "our_encoder", opened),))


class Halved:
    name = "halved"


class Shadow(Mine):
    """Called as one of ours."""


def _plugged(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name = "clam" if what == "Shadow" else "mine"
    point = EntryPoint(name, f"tests.importing.test_import:{what}", plugins.FEATURES)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.FEATURES else [])
    layouts.layouts.cache_clear()


def test_a_package_may_know_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, every = made.slides(tmp_path / "study", 1, expression=False)
    (tmp_path / "features").mkdir()
    np.savez(tmp_path / "features/mine.npz", features=every[0].features, xy=every[0].centres)
    with monkeypatch.context() as plugged:
        _plugged(plugged, "Mine")
        assert bring(tmp_path / "features", manifest, {}).done == ["c0"]
        for what, words in (
            ("Halved", "has no knows, find"),
            ("Shadow", "registers 'clam' .*, which is the name of one of ours"),
            ("Absent", "cannot be loaded"),
        ):
            _plugged(plugged, what)
            with pytest.raises(UsageError, match=words):
                bring(tmp_path / "features", manifest, {})
    layouts.layouts.cache_clear()
    assert np.array_equal(open_store(manifest.parent / STORE).read("c0").xy, every[0].centres)


HEAD = """import torch
from nh2st_pipe.heads.base import Fit, HeadModel
from nh2st_pipe.recipes.train import PlugInHead

class Of(PlugInHead):
    reads = ("slide_vector",)
    gain: float = 1.0

class Head(HeadModel):
    recipe = Of

    def __init__(self, genes, gain=1.0, about=None, kind=""):
        super().__init__()
        self.genes, self.about, self.kind, self.gain = list(genes), about or {}, kind, gain
        self.register_buffer("none", torch.zeros(1))

    @classmethod
    def build(cls, recipe, dim, genes, about):
        return cls(genes, **recipe.head.model_dump(), about=about)

    def fit(self, train, plan):
        return Fit()

    def forward_view(self, samples, rows, view):
        out = torch.zeros(len(rows), len(self.genes))
        for part in samples.parts:
            assert part.slide_vectors["titan"] is part.slide_vector
            own = (rows >= part.start) & (rows < part.stop)
            out[own] = float(part.slide_vector[0]) * self.gain
        return out
"""


def test_a_head_reads_vectors_of_whole_slides(tmp_path: Path) -> None:
    manifest, every = made.slides(tmp_path / "study")
    made.trident(tmp_path / "features", every)
    assert bring(tmp_path / "features", manifest, {}).failed == {}
    (tmp_path / "mine.py").write_text(HEAD)
    store, settings = manifest.parent / STORE, ["baselines=[]", "targets.smooth=none", "head.gain=2"]
    nh2st_pipe.train(store, recipe=f"{tmp_path}/mine.py:Head", settings=settings, folds="none", out=tmp_path / "run")
    done = nh2st_pipe.predict(tmp_path / "run", embeddings=store, out=tmp_path / "p")
    for slide_id, one in zip(("c0", "c1"), every, strict=True):
        values = anndata.read_h5ad(done.files[slide_id]).X
        assert np.allclose(values, 2 * one.features[:, 0].mean(), rtol=1e-3)
