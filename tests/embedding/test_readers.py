"""Slides prepared and tiles read side by side, ahead of the encoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nh2st_pipe.core.lease import lease_on
from nh2st_pipe.embedding import opener, planner, tiles
from nh2st_pipe.embedding.plan import Asked
from nh2st_pipe.embedding.readers import slides_open
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.layout import lay_out
from nh2st_pipe.tiles.manifest import read_manifest
from tests.conftest import Study
from tests.store.same import same


class Side:
    """How many calls were at work at once: each waits a moment for company."""

    def __init__(self, plain: Callable[..., Any], wanted: int) -> None:
        self._plain, self._wanted = plain, wanted
        self._changed = threading.Condition()
        self._now = self.most = 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        with self._changed:
            self._now += 1
            self.most = max(self.most, self._now)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self._wanted, timeout=2)
        try:
            return self._plain(*given, **named)
        finally:
            with self._changed:
                self._now -= 1


@pytest.mark.parametrize(("workers", "slides"), [(1, 2), (2, 2), (7, 2), (8, 3), (15, 4), (64, 4)])
def test_more_readers_have_more_slides_open(workers: int, slides: int) -> None:
    assert slides_open(workers) == slides


def test_one_batch_is_read_by_all_readers(make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(1, 9)  # 81 tiles: three parts of a single batch
    study.embed(stain_shift="off", store=study.folder / "plain.zarr", batch_size=7)
    side = Side(read_tile, 3)
    monkeypatch.setattr(opener, "read_tile", side)
    study.embed(stain_shift="off", workers=3, batch_size=256)
    assert side.most == 3
    assert same(study.folder / "plain.zarr", study.folder / "store.zarr")


def test_slides_are_prepared_side_by_side_and_done_in_order(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(6)
    study.embed(stain_shift="off", store=study.folder / "plain.zarr")
    side = Side(lay_out, 3)
    monkeypatch.setattr(opener, "lay_out", side)
    summary = study.embed(stain_shift="off", workers=16)
    assert 3 <= side.most <= slides_open(16)
    assert summary.done == [f"s{i}" for i in range(6)]
    assert same(study.folder / "plain.zarr", study.folder / "store.zarr")


@pytest.mark.parametrize("soon", [False, True])
def test_half_of_the_slides_that_are_left_are_left_to_other_processes_but_what_is_needed_soon(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, soon: bool
) -> None:
    study = make_study(4, 9)
    plain, other = read_tile, dict[str, bool]()
    lock, calls = threading.Lock(), list[int]()

    def reading(*given: Any, **named: Any) -> Any:
        with lock:
            calls.append(1)
            if len(calls) == 40:  # s0 is being read: another process comes, and asks for what there is
                time.sleep(0.7)
                writer = open_store(study.folder / "store.zarr").location
                for slide_id in ("s1", "s2", "s3"):
                    lease, free = lease_on(writer, f"slide-{slide_id}"), slide_id != "s1" and not soon
                    for _ in range(20):  # on a busy machine it takes a while until it is leased
                        other[slide_id] = lease.take()
                        if other[slide_id]:
                            lease.release()
                        if other[slide_id] == free:
                            break
                        time.sleep(1)
        return plain(*given, **named)

    monkeypatch.setattr(opener, "read_tile", reading)
    monkeypatch.setattr(tiles, "_TILES_AHEAD", 2)  # else all of s0 would wait for the encoder by then
    monkeypatch.setattr(planner, "_SECONDS_AHEAD", 1e6 if soon else 0.0)  # however slow this machine is
    summary = study.embed(stain_shift="off", workers=16, batch_size=2)
    assert other == {"s1": False, "s2": not soon, "s3": not soon}
    assert sorted(summary.done) == ["s0", "s1", "s2", "s3"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("staged", [False, True])
def test_a_fault_of_more_than_one_slide_ends_the_run_at_once(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    study = make_study(8)

    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(opener, "lay_out", broken)  # while further slides wait to be leased
    with pytest.raises(RuntimeError, match="broken"):
        study.embed(stain_shift="off", workers=2, stage=study.folder / "local" if staged else None)


def test_a_slide_that_cannot_be_prepared_fails_alone(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(6)
    (study.folder / "s2.png").write_bytes(b"no picture")
    (study.folder / "s5.png").write_bytes(b"nor this")
    summary = study.embed(stain_shift="off", workers=16)
    assert (summary.done, sorted(summary.failed)) == (["s0", "s1", "s3", "s4"], ["s2", "s5"])


def test_as_many_tiles_are_expected_of_slides_to_come_as_of_those_that_are_known(study: Study) -> None:
    study.embed()
    store = open_store(study.folder / "store.zarr")
    rows = read_manifest(study.manifest)
    made = planner.Planner(rows, StoreWriter(store.location, store.contract), 2, lambda: False, Asked(), print)
    assert made.expected_tiles() == 0
    made.opened("s0", 10)
    made.opened("s1", 20)
    assert made.expected_tiles() == 45
    made.opened("s2", 45)
    assert made.expected_tiles() == 75
