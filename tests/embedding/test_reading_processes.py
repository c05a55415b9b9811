"""Tiles read in processes: the same store, whatever becomes of a process, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.embedding import processes
from nh2st_pipe.embedding.opener import Ask
from nh2st_pipe.embedding.processes import ProcessReaders
from nh2st_pipe.embedding.tiles import stripes
from nh2st_pipe.slides.resolution import TileSize
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.tiles.options import GridOptions
from tests.conftest import Study
from tests.store.same import same

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that processes share")


def _as_tiles(study: Study, name: str) -> None:
    """Make a study's plain image one in tiles, which several processes can read from."""
    pixels = np.asarray(Image.open(study.folder / f"{name}.png").convert("RGB"))
    (study.folder / f"{name}.png").unlink()
    tifffile.imwrite(study.folder / f"{name}.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    manifest = study.manifest.read_text().replace(f"{name}.png", f"{name}.tif")
    study.manifest.write_text(manifest)


@pytest.fixture
def mixed(make_study: Callable[..., Study]) -> Study:
    """Two slides in tiles, a plain image, and one that is no image."""
    study = make_study(4)
    _as_tiles(study, "s0")
    _as_tiles(study, "s2")
    (study.folder / "s3.png").write_bytes(b"no picture")
    return study


def test_the_store_is_that_of_threads(mixed: Study) -> None:
    plain = mixed.embed(store=mixed.folder / "plain.zarr", readers="threads", batch_size=7)
    summary = mixed.embed(readers="processes", workers=2, batch_size=7)
    assert summary.settings["readers"] == "processes"
    assert summary.done == plain.done == ["s0", "s1", "s2"]
    assert summary.failed == plain.failed
    assert summary.notices == plain.notices
    assert 1 <= len(summary.busy["readers"]) <= 2  # the other may have had nothing to do
    assert same(mixed.folder / "plain.zarr", mixed.folder / "store.zarr")
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    assert len(servers) == 1
    assert servers[0].children() == []


@pytest.fixture
def asking(mixed: Study) -> Iterator[tuple[ProcessReaders, Callable[[str], Ask], list[str]]]:
    rows = {row.slide_id: row for row in read_manifest(mixed.manifest)}
    said = list[str]()

    def ask(name: str) -> Ask:
        row = rows[name]
        return Ask(row, row.slide, TileSize(level0_px=48), GridOptions(), 48, "bicubic")

    with ProcessReaders(2, (2, 30, 48, 48, 3), lambda _: nullcontext(), said.append) as readers:
        yield readers, ask, said


Asking = tuple[ProcessReaders, Callable[[str], Ask], list[str]]


def _killed(readers: ProcessReaders) -> None:
    for seat in readers._seats:
        if seat.process is not None:
            with suppress(ProcessLookupError):  # killed before, and asked for nothing since
                os.kill(seat.process.pid or 0, signal.SIGKILL)
            seat.process.join()


def test_what_a_killed_process_had_to_do_is_done_by_another(asking: Asking) -> None:
    readers, ask, said = asking
    for name in ("s0", "s1"):  # of a plain image all px lie in the process that is killed
        opened = readers.open(ask(name)).result()
        assert opened.in_memory == (name == "s1")
        xy = opened.spots.xy
        readers.read(ask(name), 48.0, xy, 0, np.arange(len(xy)), 0).result()
        before = readers.memory()[0][: len(xy)].copy()
        _killed(readers)
        readers.memory()[0][:] = 0
        readers.read(ask(name), 48.0, xy, 0, np.arange(len(xy)), 0).result()
        np.testing.assert_array_equal(readers.memory()[0][: len(xy)], before)
        told = f"a process that read {name} was killed by signal 9; another goes on"
        assert told in said or name == "s0"  # of which another process may have been asked
        assert len(readers.overview(ask(name)).result().neighbours[0]) == len(xy)
        readers.close(name)


def test_a_slide_that_ends_its_processes_is_given_up_by_name(asking: Asking) -> None:
    readers, ask, said = asking
    opened = readers.open(ask("s0")).result()
    deadly = Ask(ask("s0").row, ask("s0").image, TileSize(level0_px=48), GridOptions(), 48, "bicubic")
    future = readers._have_done(processes._Order("s0", "open", (_Deadly(),), deadly))
    with pytest.raises(
        SlideError, match=r"s0\.tif: 3 processes ended at the same place of it \(the last ended with status 7\)"
    ):
        future.result(60)
    assert len(said) == 2
    readers.read(ask("s2"), 48.0, opened.spots.xy[:3], 1, np.arange(3), 0).result()  # others go on


class _Deadly:
    """What ends the process that is given it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_a_slide_is_closed_where_it_was_open_and_what_waits_is_left_out(asking: Asking) -> None:
    readers, ask, _ = asking
    xy = readers.open(ask("s1")).result().spots.xy
    reads = [readers.read(ask("s1"), 48.0, xy, 0, np.arange(len(xy)), 0) for _ in range(200)]
    readers.close("s1")
    assert all(read.done() for read in reads)
    assert any(read.cancelled() for read in reads)
    until = time.monotonic() + 60
    while any("s1" in seat.slides for seat in readers._seats) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any("s1" in seat.slides for seat in readers._seats)


def test_each_reader_has_a_stripe_and_small_slides_are_for_few() -> None:
    x, y = (axis.ravel() for axis in np.mgrid[:40, :50])
    xy = np.column_stack((x, y)) * 224.0
    by = stripes(xy, 4, 3)
    assert np.bincount(by).tolist() == [500] * 4
    for reader in range(4):  # whole columns, beside each other
        own = np.unique(x[by == reader])
        assert len(own) == 10
        assert own.max() - own.min() == 9
    assert by[0] == 3
    assert len(np.unique(stripes(xy[:200], 4, 0))) == 1
    assert [int(stripes(xy[:20], 4, turn)[0]) for turn in range(5)] == [0, 1, 2, 3, 0]
    assert stripes(xy[:1], 16, 2).shape == (1,)


def test_a_process_takes_what_is_its_own_and_of_others_only_when_they_are_behind() -> None:
    readers = ProcessReaders(3, (1, 1, 1, 1, 3), lambda _: nullcontext())
    orders = [processes._Order("s", "read", (), only=only, best=best) for only, best in ((2, 2), (None, 1), (None, 0))]
    readers._orders.extend(orders)
    assert [readers._fitting(number) for number in range(3)] == [orders[2], orders[1], orders[0]]
    readers._orders.remove(orders[2])
    assert readers._fitting(0) is None  # one order is not enough to be behind
    more = [processes._Order("s", "read", (), best=1) for _ in range(2)]
    readers._orders.extend(more)
    assert readers._fitting(0) is orders[1]
    anyone = processes._Order("t", "open", ())
    readers._orders.append(anyone)
    assert readers._fitting(0) is anyone


@pytest.mark.timeout(60)
def test_a_fault_of_the_readers_themselves_ends_the_run(mixed: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ProcessReaders, number: int) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(ProcessReaders, "_fitting", broken)
    with pytest.raises(RuntimeError, match="broken"):
        mixed.embed(readers="processes", workers=2)


def test_faults_of_a_slide_are_as_in_this_process(asking: Asking) -> None:
    readers, ask, _ = asking
    with pytest.raises(SlideError, match=r"s3\.png"):
        readers.open(ask("s3")).result()


def _ends(*_: Any) -> None:
    os._exit(3)


@pytest.mark.parametrize("fault", ["memory", "process"])
def test_where_there_can_be_no_processes_threads_read_and_that_is_said(
    study: Study, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if fault == "memory":
        monkeypatch.setattr(os, "posix_fallocate", none)
    else:
        monkeypatch.setattr(processes, "serve", _ends)
    summary = study.embed(readers="processes", workers=2)
    assert summary.done == ["s0", "s1", "s2"]
    assert summary.settings["readers"] == "threads"
    why = {"memory": "No space left on device", "process": "ended with status 3 before it had begun"}[fault]
    assert [words for words in summary.notices if "tiles are read in threads" in words and why in words]


SCRIPT = """
import sys
from nh2st_pipe.embedding.run import embed
import nh2st_pipe.encoders.encoder as e
import time
plain = e.Encoder.start
def slow(self, *given, **named):
    print("at work", flush=True)
    time.sleep(0.3)
    return plain(self, *given, **named)
e.Encoder.start = slow
embed("manifest.csv", encoder="fake", store=sys.argv[1], tile_px=48, readers="processes", workers=4, batch_size=2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_asks_and_what_was_encoded_is_kept(mixed: Study, how: signal.Signals) -> None:
    """From a script read from a pipe, too: nothing of it is run once more."""
    with subprocess.Popen(
        [sys.executable, "-", "store.zarr"],
        cwd=mixed.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(SCRIPT)
        process.stdin.close()
        for _ in range(3):
            assert process.stdout.readline() == "at work\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        if how is signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: to all of them
        else:
            os.kill(process.pid, how)
        process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
    summary = mixed.embed(readers="threads")
    assert 0 < summary.encoded_tiles <= 75
    assert how is signal.SIGKILL or summary.encoded_tiles < 75
    mixed.embed(store=mixed.folder / "plain.zarr", readers="threads")
    assert same(mixed.folder / "plain.zarr", mixed.folder / "store.zarr")
