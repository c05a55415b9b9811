from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from PIL import Image

from nh2st_pipe.core.errors import EncoderError, HubError, StoreError, UsageError
from nh2st_pipe.core.lease import lease_on
from nh2st_pipe.embedding.plan import decide
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.embedding.work import readers_beside
from nh2st_pipe.encoders.encoder import Encoder, Underway
from nh2st_pipe.encoders.load import load_encoder
from nh2st_pipe.recipes.encoder import load_encoder_recipe
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.store.read import open_store
from tests.conftest import Study, grid_positions, picture, write_spots


def test_each_spot_has_the_embedding_of_its_own_tile(study: Study) -> None:
    summary = study.embed(views=8, batch_size=7)
    assert (summary.encoded_tiles, summary.done, summary.failed) == (75, ["s0", "s1", "s2"], {})
    data = open_store(study.folder / "store.zarr").read("s1")
    encoder = load_encoder(load_encoder_recipe("fake"), None)
    slide = open_slide(study.folder / "s1.png")
    for row in (0, 11, 24):
        tile = read_tile(slide, tuple(data.xy[row]), 48, 64, "bicubic")
        assert np.allclose(encoder.encode(tile[None], 8)[0], data.views[row], atol=1e-3)
    assert data.counts is not None
    import anndata

    original = anndata.read_h5ad(study.folder / "s1.h5ad")[data.barcodes]
    assert np.array_equal(original.obsm["spatial"], data.xy)
    assert (data.counts != original.X).nnz == 0
    assert set(data.neighbours[12]) <= set(range(25))


def test_a_second_run_encodes_nothing_and_needs_no_encoder(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.embed()
    monkeypatch.setattr("nh2st_pipe.encoders.load.load_encoder", None)
    again = embed(study.manifest, store=study.folder / "store.zarr")  # encoder, tile and views are the store's
    assert (again.encoded_tiles, again.kept) == (0, ["s0", "s1", "s2"])


def test_a_broken_slide_is_named_and_the_others_finish(study: Study) -> None:
    Image.fromarray(picture(240, 240, 9)).save(study.folder / "j.jpg")
    (study.folder / "s0.png").write_bytes((study.folder / "j.jpg").read_bytes()[:3000])
    (study.folder / "s1.png").write_text("no image at all")
    summary = study.embed()
    assert summary.done == ["s2"]
    assert set(summary.failed) == {"s0", "s1"}
    assert "is the file complete?" in summary.failed["s0"]
    assert "not an image" in summary.failed["s1"]
    Image.fromarray(picture(240, 240, 0)).save(study.folder / "s1.png")
    again = study.embed()
    assert (again.done, again.kept, set(again.failed)) == (["s1"], ["s2"], {"s0"})


def test_spots_outside_and_bad_expression_fail_their_slide_alone(study: Study) -> None:
    write_spots(study.folder / "s0.h5ad", np.array([[10.0, 9000.0], [10.0, 10.0]]))
    (study.folder / "s2.h5ad").write_bytes(b"junk")
    summary = study.embed()
    assert summary.done == ["s1"]
    assert "1 of 2 spots lie outside" in summary.failed["s0"]
    assert "cannot be read as an AnnData" in summary.failed["s2"]


@pytest.mark.parametrize("name", ["s1.png", "s1.h5ad"])
def test_a_file_that_vanishes_or_may_not_be_read_fails_its_slide_alone(
    study: Study, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.open

    def refusing(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refusing)
    failed = study.embed().failed
    assert set(failed) == {"s1"}
    assert f"{name} cannot be read: Permission denied" in failed["s1"]
    monkeypatch.undo()

    def vanishing(record: object, wanted: Any, redo: bool) -> Any:
        if wanted.row.slide_id == "s1":
            (study.folder / name).unlink(missing_ok=True)
        return decide(record, wanted, redo)  # type: ignore[arg-type]

    monkeypatch.setattr("nh2st_pipe.embedding.tiles.decide", vanishing)
    summary = study.embed()
    assert set(summary.failed) == {"s1"}
    assert name in summary.failed["s1"]
    assert summary.kept == ["s0", "s2"]


def test_a_changed_slide_is_noticed_and_redone_only_when_asked(study: Study) -> None:
    study.embed()
    before = open_store(study.folder / "store.zarr").read("s1").views
    Image.fromarray(picture(240, 240, 77)).save(study.folder / "s1.png")
    summary = study.embed()
    assert summary.failed == {"s1": summary.failed["s1"]}
    assert "its image changed since it was embedded" in summary.failed["s1"]
    assert np.array_equal(open_store(study.folder / "store.zarr").read("s1").views, before)
    redone = study.embed(redo_changed=True)
    assert (redone.done, redone.kept) == (["s1"], ["s0", "s2"])
    assert not np.array_equal(open_store(study.folder / "store.zarr").read("s1").views, before)


def test_an_unfinished_slide_that_changed_is_begun_anew(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.store.write import SlideWriter

    def interrupted(self: SlideWriter, *_: object) -> None:
        self.checkpoint()
        raise KeyboardInterrupt

    monkeypatch.setattr(SlideWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.embed()
    monkeypatch.undo()
    Image.fromarray(picture(240, 240, 77)).save(study.folder / "s0.png")
    assert study.embed().encoded_tiles == 75


def say_mpp(study: Study, slide_id: str, mpp: float) -> None:
    """Have a slide's expression file say its resolution, as its scale factors do."""
    path = study.folder / f"{slide_id}.h5ad"
    data = anndata.read_h5ad(path)
    data.uns["spatial"] = {"x": {"scalefactors": {"microns_per_pixel": mpp}}}
    data.write_h5ad(path)


def tile_of(study: Study, slide_id: str) -> float:
    record = open_store(study.folder / "store.zarr").record(slide_id)
    assert record is not None
    assert record.resolved is not None
    return record.resolved.tile_level0_px


def test_a_tile_that_came_to_be_another_is_refused_until_asked_for(study: Study) -> None:
    """Its size follows from the resolution, and that from the file of counts, which changes without the image."""
    options = {"tile_px": None, "tile_um": 24}
    say_mpp(study, "s0", 0.5)
    assert study.embed(only=["s0"], **options).done == ["s0"]
    assert tile_of(study, "s0") == 48
    before = open_store(study.folder / "store.zarr").read("s0").views
    say_mpp(study, "s0", 1.0)
    failed = study.embed(only=["s0"], **options).failed["s0"]
    assert "its tile (48 level-0 px, now 24) and mpp (0.5 by the spots, now 1 by the spots) changed" in failed
    assert (tile_of(study, "s0"), study.embed(only=["s0"], redo_changed=True, **options).encoded_tiles) == (48, 25)
    assert tile_of(study, "s0") == 24
    assert not np.array_equal(open_store(study.folder / "store.zarr").read("s0").views, before)


def test_tiles_of_two_sizes_or_readers_never_stand_in_one_slide(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.slides.raster import RasterSlide
    from nh2st_pipe.store.write import SlideWriter

    options: dict[str, Any] = {"tile_px": None, "tile_um": 24, "only": ["s0"], "batch_size": 10}
    append, decoded = SlideWriter.append, RasterSlide.__init__

    def cut_short() -> None:
        def interrupted(self: SlideWriter, values: Any) -> None:
            append(self, values)
            raise KeyboardInterrupt

        monkeypatch.setattr(SlideWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.embed(**options)
        monkeypatch.setattr(SlideWriter, "append", append)

    def another_version(self: RasterSlide, path: Path) -> None:
        decoded(self, path)
        self.reader += ".post1"

    say_mpp(study, "s0", 0.5)
    cut_short()
    assert study.embed(**options).encoded_tiles == 15  # what was kept is gone on with
    shutil.rmtree(study.folder / "store.zarr")
    cut_short()
    say_mpp(study, "s0", 1.0)
    assert study.embed(**options).encoded_tiles == 25
    shutil.rmtree(study.folder / "store.zarr")
    cut_short()
    monkeypatch.setattr(RasterSlide, "__init__", another_version)
    assert study.embed(**options).encoded_tiles == 25
    monkeypatch.setattr(RasterSlide, "__init__", decoded)
    say_mpp(study, "s0", 1.0 + 1e-9)  # the file is another, and what follows from it the same
    assert study.embed(**options).encoded_tiles == 0


def test_a_store_without_a_finished_slide_is_gone_on_with_as_it_was_begun(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.store.write import SlideWriter

    def interrupted(self: SlideWriter, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SlideWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.embed(views=8)
    monkeypatch.undo()
    store = open_store(study.folder / "store.zarr")
    assert (len(store), bool(store)) == (0, True)
    assert embed(study.manifest, store=study.folder / "store.zarr").done == [
        "s0",
        "s1",
        "s2",
    ]
    assert open_store(study.folder / "store.zarr").contract.views == 8


def test_another_encoder_or_tile_size_is_refused_before_any_work(study: Study, tmp_path: Path) -> None:
    study.embed()
    with pytest.raises(StoreError, match="tiles of 48 px, not 50 px"):
        study.embed(tile_px=50)
    mine = tmp_path / "mine.yaml"
    mine.write_text("{name: mine, kind: fake, dim: 96, input_px: 32}")
    with pytest.raises(StoreError, match="encoder fake, not mine"):
        study.embed(encoder=mine)
    with pytest.raises(UsageError, match="not both"):
        study.embed(tile_um=20)
    with pytest.raises(UsageError, match="1 or 8"):
        study.embed(views=4)


def test_weights_are_asked_for_when_there_is_something_to_encode(
    study: Study, lite0_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join(rows[:2]) + "\n")
    study.embed(encoder="efficientnet-lite0", weights=lite0_weights, stain_shift="off")

    def out_of_reach(*_: object, **__: object) -> None:
        raise HubError("the hub cannot be reached")

    monkeypatch.setattr("nh2st_pipe.core.hub.fetch", out_of_reach)
    assert study.embed(encoder=None, stain_shift="off").kept == ["s0"]
    study.manifest.write_text("\n".join(rows[:3]) + "\n")
    cause = r"cannot be reached; or give .* with --weights \(the store was made with tf_efficientnet_lite0\.safet"
    with pytest.raises(EncoderError, match=cause):
        study.embed(encoder=None, stain_shift="off")


def test_a_large_encoder_without_a_gpu_is_said_to_take_long(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("million parameters" in notice for notice in study.embed(device="cpu").notices)
    monkeypatch.setattr("nh2st_pipe.embedding.run._LARGE_MILLIONS", 0)
    again = study.embed(store=study.folder / "b.zarr", device="cpu")
    said = [notice for notice in again.notices if "million parameters" in notice]
    assert said == [
        "encoder fake has 0 million parameters, and there is no GPU: a tile takes seconds. "
        "nh2st-pipe encoders lists smaller ones"
    ]


@pytest.mark.parametrize("when", ["SlideWriter.append", "SlideWriter.finish", "StoreWriter.slide"])
def test_a_store_that_is_moved_away_is_not_begun_anew(
    make_study: Callable[..., Study], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.store import write

    study = make_study(1)  # no other slide is being written at that moment
    owner = getattr(write, when.partition(".")[0])
    whole, store = getattr(owner, when.partition(".")[2]), study.folder / "store.zarr"

    def after_the_move(self: object, *arguments: object, **more: object) -> object:
        if store.exists():
            store.rename(study.folder / "moved.zarr")
        return whole(self, *arguments, **more)

    monkeypatch.setattr(owner, when.partition(".")[2], after_the_move)
    with pytest.raises(StoreError, match=r"store\.zarr is gone: was it moved or deleted while it was written"):
        study.embed(batch_size=5)
    assert not (store / "slides").exists()
    monkeypatch.undo()
    assert study.embed(store=study.folder / "moved.zarr").failed == {}


def test_weights_that_do_not_fit_leave_no_store_behind(study: Study, lite0_weights: Path) -> None:
    with pytest.raises(EncoderError, match="does not fit encoder resnet50"):
        study.embed(encoder="resnet50", weights=lite0_weights)
    assert not (study.folder / "store.zarr").exists()


def test_tiles_in_um_use_the_manifests_resolution(study: Study) -> None:
    write_spots(study.folder / "s2.h5ad", grid_positions(5, 40.0)[0])  # of no array, whose pitch would say it
    text = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join([text[0] + ",mpp", text[1] + ",0.5", text[2] + ",1.0", text[3] + ","]) + "\n")
    summary = study.embed(tile_px=None, tile_um=24)
    store = open_store(study.folder / "store.zarr")
    assert [float(store.read(s).uns["image"]["tile_level0_px"]) for s in ("s0", "s1")] == [48, 24]
    assert set(summary.failed) == {"s2"}
    assert "give mpp in the manifest" in summary.failed["s2"]


def test_an_mpp_that_moves_by_less_than_a_thousandth_is_the_same(study: Study) -> None:
    rows = study.manifest.read_text().splitlines()

    def embedded(mpp: str) -> Any:
        study.manifest.write_text("\n".join([f"{rows[0]},mpp", *(f"{row},{mpp}" for row in rows[1:])]) + "\n")
        return study.embed()

    assert embedded("0.688098").encoded_tiles == 75
    again = embedded("0.688101")
    assert (again.encoded_tiles, again.failed) == (0, {})
    assert "its mpp changed since it was embedded" in embedded("0.69").failed["s0"]


def test_slides_without_spots_are_tiled_over_their_tissue(make_study: Callable[..., Study]) -> None:
    study = make_study(1, expression=False)
    pixels = np.full((300, 400, 3), 245, np.uint8)
    pixels[100:200, 200:300] = (190, 110, 160)
    Image.fromarray(pixels).save(study.folder / "s0.png")
    study.embed(tile_px=25)
    data = open_store(study.folder / "store.zarr").read("s0")
    assert data.counts is None
    assert 14 <= len(data) <= 18
    assert (np.abs(data.xy - [250, 150]) < 60).all()


SLOW = """
import sys, time
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.store import write
write._CHECKPOINT_SECONDS = 0.0
plain = Encoder.start
def slow(self, tiles, views=1, view=None):
    time.sleep(0.15)
    return plain(self, tiles, views, view)
Encoder.start = slow
embed(sys.argv[1], encoder="fake", store=sys.argv[2], tile_px=48, views=8, batch_size=2, device="cpu")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(study: Study, how: signal.Signals) -> None:
    path = study.folder / "store.zarr"
    study.embed(views=8, store=study.folder / "whole.zarr")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(study.manifest), str(path)], stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until the second slide is under way
        record = open_store(path).record("s1") if (path / "slides/s1/zarr.json").exists() else None
        if record is not None and record.state.partial >= 4:
            break
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(timeout=60)
    record = open_store(path).record("s1")
    assert record is not None
    assert not record.state.complete
    safe = record.state.rows + record.state.partial
    assert safe >= 4
    for left in (*path.glob("*.partial"), *path.glob("slides/*.partial")):
        os.utime(left, (0, 0))  # what another process may be writing is not touched before an hour is over
    summary = study.embed(views=8)
    assert summary.kept == ["s0"]
    assert summary.encoded_tiles == 25 - safe + 25
    other = ("zarr.json", "log.jsonl")
    arrays = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name not in other)
    whole = study.folder / "whole.zarr"
    assert arrays == sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name not in other)
    assert all((path / name).read_bytes() == (whole / name).read_bytes() for name in arrays)


def test_a_full_disk_ends_the_run_and_keeps_what_is_done(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.store.write import SlideWriter

    plain = SlideWriter.finish

    def full(self: SlideWriter, *arguments: Any) -> None:
        if "s1" in self._group.path:
            raise OSError(28, "No space left on device")
        plain(self, *arguments)

    monkeypatch.setattr(SlideWriter, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        study.embed()
    assert open_store(study.folder / "store.zarr").slides() == ["s0"]
    monkeypatch.undo()
    assert study.embed().kept == ["s0"]


def test_plain_images_are_open_two_at_a_time(make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.slides.raster import RasterSlide

    held = most = 0
    decode, close = RasterSlide._decoded, RasterSlide.close

    def counted(self: RasterSlide) -> Any:
        nonlocal held, most
        held += self._pixels is None
        most = max(most, held)
        return decode(self)

    def closed(self: RasterSlide) -> None:
        nonlocal held
        held -= self._pixels is not None
        close(self)

    monkeypatch.setattr(RasterSlide, "_decoded", counted)
    monkeypatch.setattr(RasterSlide, "close", closed)
    make_study(6, side=3).embed(batch_size=2, workers=1)
    assert most <= 2
    assert held == 0


def test_changed_counts_are_renewed_and_nothing_is_encoded(study: Study) -> None:
    study.embed(views=8)
    path = study.folder / "store.zarr"
    before = open_store(path).read("s1")
    data = anndata.read_h5ad(study.folder / "s1.h5ad")
    data.X = data.X * 3
    data.write_h5ad(study.folder / "s1.h5ad")
    summary = study.embed()
    assert (summary.encoded_tiles, summary.done, summary.kept) == (0, ["s1"], ["s0", "s2"])
    after = open_store(path).read("s1")
    assert np.array_equal(after.views, before.views)
    assert after.counts is not None
    assert before.counts is not None
    assert np.array_equal(after.counts.toarray(), before.counts.toarray() * 3)
    assert study.embed().kept == ["s0", "s1", "s2"]


def test_a_few_bytes_of_a_large_file_of_counts_are_seen_to_change(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie: of an image samples are looked at, of counts all."""
    from nh2st_pipe.embedding import plan
    from nh2st_pipe.store.format import fingerprint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "fingerprint", lambda path: "1-a" if path.suffix == ".h5ad" else fingerprint(path))
    monkeypatch.setattr(plan, "sampled_fingerprint", lambda path: "1-a")  # samples see nothing of what changes
    study.embed()
    assert study.embed().kept == ["s0", "s1", "s2"]
    data = anndata.read_h5ad(study.folder / "s1.h5ad")
    data.obsm["spatial"][0] += 3
    data.write_h5ad(study.folder / "s1.h5ad")
    assert "its spots" in study.embed().failed["s1"]


def test_a_record_of_an_earlier_version_knows_samples_of_its_counts(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.embedding.plan import Wanted
    from nh2st_pipe.store.format import fingerprint
    from nh2st_pipe.tiles.manifest import read_manifest

    study.embed()
    record = open_store(study.folder / "store.zarr").record("s0")
    assert record is not None
    small = Wanted.of(read_manifest(study.manifest)[0])
    assert small.sampled is None  # samples of a small file are all of it
    assert small.has_counts_of(record)
    assert not small.has_counts_of(record.model_copy(update={"expression": None}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("nh2st_pipe.store.format.LARGE", 1000)
    monkeypatch.setattr("nh2st_pipe.core.hashes.LARGE", 1000)
    monkeypatch.setattr("nh2st_pipe.store.format.np.linspace", lambda *_: np.array([0, 7]))
    wanted, sampled = Wanted.of(read_manifest(study.manifest)[0]), fingerprint(study.folder / "s0.h5ad")
    assert wanted.sampled == sampled != wanted.expression == small.expression
    for known, same in ((wanted.expression, True), (sampled, True), ("1-other", False), (None, False)):
        assert wanted.has_counts_of(record.model_copy(update={"expression": known})) == same


def test_changed_spots_are_refused_until_asked_for(study: Study) -> None:
    study.embed()
    data = anndata.read_h5ad(study.folder / "s1.h5ad")
    data.obsm["spatial"] = data.obsm["spatial"] + 3.0
    data.write_h5ad(study.folder / "s1.h5ad")
    assert "its spots changed since it was embedded" in study.embed().failed["s1"]
    assert study.embed(redo_changed=True).encoded_tiles == 25


def test_a_changed_patient_is_taken_over_without_an_encoder(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.embed()
    monkeypatch.setattr("nh2st_pipe.encoders.load.load_encoder", None)
    study.manifest.write_text(study.manifest.read_text().replace(",P1,", ",Q,"))
    assert study.embed().kept == ["s0", "s1", "s2"]
    assert open_store(study.folder / "store.zarr").read("s1").patient == "Q"


TOGETHER = """
import sys, time
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.encoders.encoder import Encoder
plain = Encoder.start
def slow(self, tiles, views=1, view=None):
    time.sleep(0.02)
    return plain(self, tiles, views, view)
Encoder.start = slow
done = embed(sys.argv[1], encoder="fake", store=sys.argv[2], tile_px=48, batch_size=5, device="cpu")
print(done.encoded_tiles, len(done.done), len(done.kept), len(done.failed))
"""


def test_two_processes_share_a_stores_slides(make_study: Callable[..., Study]) -> None:
    study = make_study(6)
    study.embed(store=study.folder / "alone.zarr")
    path = study.folder / "store.zarr"
    command = [sys.executable, "-c", TOGETHER, str(study.manifest), str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [[int(word) for word in process.communicate(timeout=100)[0].split()] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(tiles for tiles, *_ in said) == 6 * 25  # every slide once
    assert all(done + kept == 6 and failed == 0 for _, done, kept, failed in said)
    for name in (f"s{i}" for i in range(6)):
        assert np.array_equal(open_store(path).read(name).views, open_store(study.folder / "alone.zarr")[name].views)


def test_a_store_in_memory_is_embedded_into_and_trained_from(study: Study) -> None:
    from nh2st_pipe.prediction import predict
    from nh2st_pipe.training.run import train

    where = f"memory://{study.folder.name}/{id(study)}/store.zarr"
    assert study.embed(store=where, views=8).encoded_tiles == 75
    assert study.embed(store=where).kept == ["s0", "s1", "s2"]
    study.embed(views=8)
    one, two = open_store(where).read("s2"), open_store(study.folder / "store.zarr").read("s2")
    assert np.array_equal(one.views, two.views)
    assert np.array_equal(one.neighbours, two.neighbours)
    run = train(where, recipe="ridge", genes=6, out=study.folder / "run")
    assert len(run.metrics["folds"]) == 3
    assert len(predict(run.path, embeddings=where, out=study.folder / "pred").files) == 3


def test_places_that_cannot_be_opened_are_said(study: Study) -> None:
    with pytest.raises(UsageError, match=r"nope://x/store\.zarr is no place this installation can open: .*nope"):
        study.embed(store="nope://x/store.zarr")


def test_an_interruption_does_not_wait_for_tiles_nobody_has_begun_to_read(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.encoders.encoder import Encoder

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return read_tile(*arguments)

    def interrupted(self: Encoder, tiles: Any, views: int = 1) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nh2st_pipe.embedding.opener.read_tile", slow)
        patch.setattr(Encoder, "start", interrupted)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            study.embed(batch_size=1, workers=1)
        assert time.monotonic() - began < 30
    assert study.embed().encoded_tiles == 75  # and the leases were given back


def test_slides_with_expression_have_a_stain_shift_found_then_or_later(
    study: Study, make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study.embed(views=8)
    assert first.stain_shifts == ["s0", "s1", "s2"]
    later = study.folder / "later.zarr"
    assert study.embed(store=later, views=8, stain_shift="off").stain_shifts == []
    assert open_store(later)["s0"].stain_shift is None
    before = {f: f.read_bytes() for f in (later / "slides").rglob("embedding/*/c/**/*") if f.is_file()}
    assert before
    added = study.embed(store=later)
    assert (added.encoded_tiles, added.stain_shifts, added.failed) == (0, ["s0", "s1", "s2"], {})
    assert {f: f.read_bytes() for f in before} == before
    for name in ("s0", "s1", "s2"):
        one, two = (open_store(store)[name].stain_shift for store in (study.folder / "store.zarr", later))
        assert one is not None
        assert two is not None
        assert one.shape == (8, 96)
        assert np.array_equal(one, two)
    monkeypatch.setattr("nh2st_pipe.encoders.load.load_encoder", None)  # nothing is left to encode
    assert study.embed(store=later).kept == ["s0", "s1", "s2"]
    assert study.embed(store=later, stain_shift="off").kept == ["s0", "s1", "s2"]  # and it stays
    with pytest.raises(UsageError, match="--stain-shift takes auto or off, not on"):
        study.embed(stain_shift="on")


def test_slides_without_expression_need_no_stain_shift(make_study: Callable[..., Study]) -> None:
    study = make_study(1, expression=False)
    assert study.embed().stain_shifts == []
    assert open_store(study.folder / "store.zarr")["s0"].stain_shift is None


def test_an_encoder_that_fails_ends_the_run_however_many_slides_wait(make_study: Callable[..., Study]) -> None:
    study = make_study(n_slides=7, side=2)
    wrong = load_encoder_recipe("fake").model_copy(update={"dim": 7})
    with pytest.raises(EncoderError, match="its recipe says 7"):
        study.embed(encoder=wrong)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("broken")])
def test_a_fault_of_the_writing_ends_the_run_however_many_slides_wait(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    from nh2st_pipe.store.write import SlideWriter

    def failing(self: SlideWriter, *_: Any) -> None:
        raise fault

    study = make_study(n_slides=7, side=2)
    monkeypatch.setattr(SlideWriter, "append", failing)
    with pytest.raises(type(fault), match=str(fault.args[-1])):
        study.embed()


def test_batches_that_are_begun_before_the_last_is_back_end_in_the_same_store(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.embed(views=8, store=study.folder / "plain.zarr")
    begun, most = list[str](), 0
    start, result = Encoder.start, Underway.result

    def starting(self: Encoder, tiles: Any, views: int = 1, view: int | None = None) -> Underway:
        nonlocal most
        self.batches_ahead = 2
        begun.append("one")
        most = max(most, len(begun))
        return start(self, tiles, views, view)

    def back(self: Underway) -> Any:
        begun.pop()
        return result(self)

    monkeypatch.setattr(Encoder, "start", starting)
    monkeypatch.setattr(Underway, "result", back)
    assert study.embed(views=8, batch_size=4).done == ["s0", "s1", "s2"]
    assert most == 3
    assert begun == []
    for name in ("s0", "s1", "s2"):
        one, two = (open_store(study.folder / store).read(name) for store in ("plain.zarr", "store.zarr"))
        assert np.array_equal(one.views, two.views)
        assert one.stain_shift is not None
        assert two.stain_shift is not None
        assert np.allclose(one.stain_shift, two.stain_shift, atol=1e-3)


@pytest.mark.parametrize(
    ("seconds", "settings", "words"),
    [
        ((8.0, 0.5, 0.5, 0.5), {"device": "cpu"}, "a GPU or a smaller encoder"),
        ((8.0, 0.5, 0.5, 0.5), {"device": "cuda"}, "as it should"),
        (
            (5.0, 0.0, 4.0, 0.5),
            {"device": "cuda", "workers": 2, "cores": 16},
            r"--workers \(2 now, on 16 cores\), or slides on",
        ),
        (
            (5.0, 0.0, 4.0, 0.5),
            {"device": "cuda", "workers": 16, "cores": 16},
            r"waits for tiles: slides on a faster disk would shorten it \(the reading processes were at work 85%",
        ),
        ((5.0, 3.5, 0.5, 0.5), {"device": "cuda"}, "waits for slides to be opened"),
        ((5.0, 0.1, 0.4, 4.0), {"device": "cuda"}, "writing takes long"),
    ],
)
def test_where_the_time_goes_says_what_to_widen(
    seconds: tuple[float, float, float, float], settings: dict[str, Any], words: str
) -> None:
    summary = EmbedSummary("store.zarr", encoded_tiles=95, settings=settings)
    summary.seconds = dict(zip(("encoder", "opening", "reading", "writing"), seconds, strict=True))
    summary.busy = {"main": [0.8], "readers": [0.9, 0.8]} if seconds[1] + seconds[2] > 1 else {}
    assert summary.tiles_per_second == pytest.approx(10)
    assert re.search(words, str(summary.advice()))


def test_every_call_leaves_a_line_in_the_stores_log(study: Study) -> None:
    assert EmbedSummary("store.zarr").advice() is None
    study.embed(workers=3, batch_size=4, device="cpu")
    study.embed()  # nothing to encode: no line
    (study.folder / "s0.png").write_bytes(b"")
    study.embed(redo_changed=True)
    lines = [json.loads(line) for line in (study.folder / "store.zarr" / "log.jsonl").read_text().splitlines()]
    assert [(line["tiles"], line["slides"]) for line in lines] == [(75, ["s0", "s1", "s2"]), (0, [])]
    assert (lines[0]["workers"], lines[0]["batch_size"], lines[0]["encoder"], lines[0]["device"]) == (
        3,
        4,
        "fake",
        "cpu",
    )
    assert lines[0]["tiles_per_second"] > 0
    assert set(lines[0]["seconds"]) == {"encoder", "opening", "reading", "writing", "total"}
    assert lines[0]["busy"]["main"][0] > 0
    assert lines[0]["readers"] == "threads"
    assert set(lines[1]["failed"]) == {"s0"}
    assert open_store(study.folder / "store.zarr").slides() == ["s0", "s1", "s2"]


def test_a_store_begun_in_another_precision_says_which_it_keeps(study: Study) -> None:
    study.embed(precision="bfloat16")
    (study.folder / "s0.png").write_bytes((study.folder / "s1.png").read_bytes())
    summary = study.embed(redo_changed=True)
    assert [note for note in summary.notices if "was begun in bfloat16 and stays so" in note and "float32 here" in note]
    assert open_store(study.folder / "store.zarr").contract.precision == "bfloat16"
    (study.folder / "s0.png").write_bytes((study.folder / "s2.png").read_bytes())
    assert not [note for note in study.embed(redo_changed=True, precision="bfloat16").notices if "was begun" in note]


@pytest.mark.parametrize("began_so", [False, True])
def test_a_store_keeps_the_autocast_it_was_begun_with(study: Study, began_so: bool) -> None:
    plain = load_encoder_recipe("fake")
    begun, other = (plain.model_copy(update={"autocast": value}) for value in (began_so, not began_so))
    study.embed(encoder=begun, precision="bfloat16", only=["s0"])
    assert study.embed(encoder=other).done == ["s1", "s2"]  # as its recipe may have changed since
    contract = open_store(study.folder / "store.zarr").contract
    assert (contract.identity["autocast"], contract.encoder["autocast"]) == (began_so, began_so)
    study.embed(encoder=other, precision="bfloat16", store=study.folder / "other.zarr")
    theirs = open_store(study.folder / "other.zarr").contract
    assert contract.differences(theirs, one_store=False) == [
        f"encoder fake with autocast {began_so}, not {not began_so}"
    ]
    exact = [each.model_copy(update={"precision": "float32"}) for each in (contract, theirs)]
    assert exact[0].differences(exact[1]) == []  # where nothing is cast, it makes no difference


@pytest.mark.parametrize(
    ("device", "cores", "threads"), [("cpu", 64, 2), ("cuda", 64, 16), ("cuda", 8, 7), ("cuda", 1, 2)]
)
def test_readers_follow_the_cores(device: str, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.embedding.work.cores", lambda: cores)
    assert readers_beside(device) == threads
    assert readers_beside(device, devices=4) == (2 if device == "cpu" else max(cores - 1, 2))


def test_a_slide_without_spots_has_its_thumbnail_with_its_scale_and_says_what_was_left_out(study: Study) -> None:
    pixels = np.full((600, 1000, 3), 240, np.uint8)
    pixels[100:500, 100:900] = picture(800, 400, seed=1) // 2 + np.array((90, 20, 70), np.uint8)
    pixels[250:280, 150:850] = (30, 60, 170)  # a pen
    Image.fromarray(pixels).save(study.folder / "s0.png")
    study.manifest.write_text("slide_id,slide\ns0,s0.png\n")
    summary = study.embed()
    assert [note for note in summary.notices if note.startswith("s0: pen marks are left out, ")]
    uns = open_store(study.folder / "store.zarr").read("s0").uns["spatial"]["s0"]
    assert uns["images"]["hires"].shape == (461, 768, 3)
    assert uns["scalefactors"]["tissue_hires_scalef"] == pytest.approx(0.768)


def test_a_slide_whose_tiles_are_written_is_finished_though_the_next_cannot_be(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its picture comes late, and the disk is full by then for tiles."""
    from nh2st_pipe.embedding.opener import OpenSlides
    from nh2st_pipe.store.write import SlideWriter

    overview, append, failed = OpenSlides.overview, SlideWriter.append, threading.Event()

    def late(self: OpenSlides, ask: Any) -> Any:
        failed.wait(30)
        return overview(self, ask)

    def full(self: SlideWriter, embeddings: Any) -> None:
        if self._path == "slides/s1":
            failed.set()
            raise OSError(28, "No space left on device")
        append(self, embeddings)

    monkeypatch.setattr(OpenSlides, "overview", late)
    monkeypatch.setattr(SlideWriter, "append", full)
    with pytest.raises(OSError, match="No space left"):
        study.embed(stain_shift="off", workers=4)
    assert open_store(study.folder / "store.zarr").slides() == ["s0"]


def test_each_slide_is_kept_though_another_cannot_be(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.core.progress import Progress
    from nh2st_pipe.embedding.tiles import TileReader
    from nh2st_pipe.store.write import SlideWriter

    said, kept = list[str](), list[str]()

    class Said(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    def checkpoint(self: SlideWriter) -> None:
        kept.append(self._path)
        raise OSError(28, "No space left on device")

    def interrupted(self: Encoder, tiles: Any, views: int = 1) -> Any:
        until = time.monotonic() + 30
        while len(opened[0].unfinished()) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt

    opened = list[TileReader]()
    entered = TileReader.__enter__
    monkeypatch.setattr(TileReader, "__enter__", _noting(entered, opened.append))
    monkeypatch.setattr(SlideWriter, "checkpoint", checkpoint)
    monkeypatch.setattr(Encoder, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.embed(batch_size=4, workers=4, progress=Said())
    assert len(kept) >= 2
    assert [words for words in said if "could not be kept (No space left on device)" in words]
    monkeypatch.undo()
    assert study.embed().done == ["s0", "s1", "s2"]


def test_waiting_for_other_processes_is_no_waiting_for_slides(study: Study) -> None:
    study.embed(only=["s0"])
    lease = lease_on(open_store(study.folder / "store.zarr").location, "slide-s1")
    assert lease.take()
    waited = threading.Timer(3, lease.release)
    waited.start()
    summary = study.embed(only=["s0", "s1"], stain_shift="off")
    waited.join()
    assert summary.done == ["s1"]
    assert summary.seconds["total"] > 2
    assert summary.seconds["opening"] < summary.seconds["total"] - 1.5


def test_what_was_open_when_a_run_was_ended_is_closed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.embedding import opener, tiles
    from nh2st_pipe.slides.raster import RasterSlide

    opened, closed = list[Path](), list[Path]()

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")  # of more than one slide, after it was opened

    def opening(path: Path) -> Any:
        opened.append(path)
        return open_slide(path)

    monkeypatch.setattr(RasterSlide, "close", _noting(RasterSlide.close, lambda slide: closed.append(slide.path)))
    monkeypatch.setattr(opener, "open_slide", opening)
    monkeypatch.setattr(tiles, "check_tiles", broken)
    with pytest.raises(RuntimeError, match="broken"):
        study.embed()
    assert opened
    assert sorted(set(closed)) == sorted(set(opened))


def _noting(plain: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    def noted(*given: Any) -> Any:
        note(*given)
        return plain(*given)

    return noted


def test_nothing_is_read_of_slides_that_are_finished_and_as_they_were(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.embedding import plan
    from nh2st_pipe.store.read import Store

    taken, records = list[str](), list[str]()
    for name in ("fingerprint", "counts_fingerprint"):
        monkeypatch.setattr(plan, name, _noting(getattr(plan, name), lambda path: taken.append(path.name)))
    monkeypatch.setattr(Store, "record_tagged", _noting(Store.record_tagged, lambda _, name: records.append(name)))
    study.embed()
    assert sorted(taken) == ["s0.h5ad", "s0.png", "s1.h5ad", "s1.png", "s2.h5ad", "s2.png"]  # once, under the lease
    taken.clear()
    records.clear()
    assert study.embed().kept == ["s0", "s1", "s2"]
    assert taken == []
    assert sorted(records) == ["s0", "s1", "s2"]
    os.utime(study.folder / "s1.png")  # another time alone is no change, and is looked at
    assert study.embed().kept == ["s0", "s1", "s2"]
    assert taken == ["s1.png"]
    at = (study.folder / "s2.h5ad").stat()
    content = bytearray((study.folder / "s2.h5ad").read_bytes())
    content[-1] ^= 1  # another file of the same size
    (study.folder / "s2.h5ad").write_bytes(content)
    assert (study.folder / "s2.h5ad").stat().st_mtime_ns != at.st_mtime_ns
    assert "s2" not in study.embed().kept


def test_a_slide_that_another_process_finished_takes_no_lease(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.embedding import run
    from nh2st_pipe.store.write import StoreWriter

    study.embed(only=["s1"])
    leased = list[str]()
    monkeypatch.setattr(StoreWriter, "lease", _noting(StoreWriter.lease, lambda _, name: leased.append(name)))
    monkeypatch.setattr(run, "pending", lambda rows, *_: (rows, []))  # as it looked before the other had finished
    summary = study.embed()
    assert (summary.done, summary.kept) == (["s0", "s2"], ["s1"])
    assert leased == ["s0", "s2"]


def test_shards_are_all_of_the_manifest_and_each_slide_once(make_study: Callable[..., Study]) -> None:
    study = make_study(7, side=2)
    parts = [study.embed(shard=f"{part}/3", store=study.folder / f"{part}.zarr").done for part in (1, 2, 3)]
    assert sorted(each for part in parts for each in part) == [f"s{i}" for i in range(7)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"shard": "4/3"}, "--shard takes a part and how many there are, 1/8 to 8/8, not 4/3"),
        ({"shard": "0/3"}, "--shard takes a part"),
        ({"shard": "a"}, "--shard takes no 'a'"),
        ({"readers": "many"}, "--readers takes auto, threads or processes, not many"),
        ({"views": 3}, "--views takes 1 or 8, not 3"),
        ({"batch_size": 0}, "--batch-size takes no 0: input should be greater than 0"),
        ({"tile_um": 3.0, "tile_px": 48}, "in µm or in px, not both"),
        ({"overlap": 2.0}, "--overlap takes a share"),
        ({"vews": 8}, "embed has no option vews; did you mean views"),
    ],
)
def test_what_cannot_be_asked_for_is_named(study: Study, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        study.embed(**{"tile_px": None, **asked})


def test_options_are_a_value_that_may_be_changed(study: Study) -> None:
    from nh2st_pipe.embedding.options import EmbedOptions

    options = EmbedOptions(encoder="fake", store=study.folder / "store.zarr", tile_px=48, views=8)
    assert embed(study.manifest, options, only=["s1"]).done == ["s1"]
    assert open_store(study.folder / "store.zarr").contract.views == 8
    assert EmbedOptions.of(options, tile_px=None, tile_um=100).tile_um == 100
