from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nh2st_pipe.core import lease
from nh2st_pipe.core.errors import LeaseError, RunError, StoreError, WriteError
from nh2st_pipe.core.lease import FileLease, Lease, ObjectLease, lease_on
from nh2st_pipe.core.location import Location, Tag
from nh2st_pipe.runs.folder import RunFolder
from tests.remote import refusing, s3_server


@pytest.fixture(params=["folder", "memory", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    with s3_server():
        places = {"folder": tmp_path / "store", "memory": f"memory://{tmp_path}/store", "s3": f"s3://bucket{tmp_path}"}
        yield Location(str(places[request.param]))


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 0.0)
    lease._SEEN.clear()
    return Location(f"memory://{tmp_path}/store")


def test_one_holds_a_lease_at_a_time(where: Location) -> None:
    one, two = lease_on(where, "x"), lease_on(where, "x")
    assert one.take()
    assert not two.take()
    one.release()
    assert two.take()
    assert not one.take()
    assert lease_on(where, "y").take()
    two.release()
    two.release()
    assert one.take()
    assert one.fence != two.fence


def test_of_many_who_try_at_once_one_has_it(where: Location) -> None:
    for over in (False, True):  # where there was none, and where one is over
        ready = threading.Barrier(8)
        taken, all_of_them = list[Lease](), [lease_on(where, "x") for _ in range(8)]

        def take(lease: Lease, ready: threading.Barrier = ready, taken: list[Lease] = taken) -> None:
            ready.wait()
            if lease.take():
                taken.append(lease)

        threads = [threading.Thread(target=take, args=(lease,)) for lease in all_of_them]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1, over
        taken[0].release()


def test_a_lease_costs_two_requests_and_one_for_each_renewal() -> None:
    with refusing() as store:
        url = Location("s3://bucket/store.zarr")
        lease_on(url, "y").take()  # what is asked of a store once
        asked = list[str]()
        store.heard = lambda method, name: asked.append(method) if "slide-s1" in name else None
        mine = lease_on(url, "slide-s1")
        assert isinstance(mine, ObjectLease)
        assert mine.take()
        mine.beat()
        mine.check()
        mine.release()
        assert asked == ["PUT", "PUT", "PUT"]


def of_another(where: Location, number: int = 1, beats: int = 0, **more: Any) -> None:
    words = {"number": number, "boot": "elsewhere", "space": "elsewhere", "pid": 1, "began": "0", "beats": beats}
    where.write(".leases/x", json.dumps({**words, **more}).encode())


def test_a_lease_that_is_renewed_is_left_alone_and_a_silent_one_taken_over(
    objects: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 90.0)
    now = 1000.0
    monkeypatch.setattr(lease, "_clock", lambda: now)
    of_another(objects, 6)
    mine = lease_on(objects, "x")
    assert not mine.take()
    now += 80
    of_another(objects, 6, beats=1)
    assert not lease_on(objects, "x").take()
    now += 80
    assert not mine.take()  # 80 s after it was last seen to be renewed
    now += 11
    assert mine.take()
    assert json.loads(objects.read(".leases/x"))["number"] == 7


def test_who_was_taken_over_is_told_before_the_next_write(objects: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept: nobody renewed the lease, and its next write comes before the next renewal would."""
    now = 1000.0
    monkeypatch.setattr(lease, "_clock", lambda: now)
    slow, other = lease_on(objects, "x"), lease_on(objects, "x")
    assert slow.take()
    slow.check()
    now += 100
    assert other.take()  # silent for long enough, in this test
    with pytest.raises(LeaseError, match="the lease on x was taken over by another process"):
        slow.check()
    slow.release()  # and does not give back what is the other's
    other.check()
    now += 100
    other.check()
    assert json.loads(objects.read(".leases/x"))["fence"] == other.fence


def test_an_answer_that_was_lost_is_found_again(objects: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was written, the answer went astray, and the library asked once more: the object is the one that was meant."""
    plain = type(objects._objects).put

    def twice(self: Any, *arguments: Any, **options: Any) -> Any:
        plain(self, *arguments, **options)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(type(objects._objects), "put", twice)
    tag = objects.create("a", b"one")
    assert tag is not None
    assert objects.create("a", b"another") is None
    tag = objects.swap("a", b"two", tag)
    assert tag is not None
    assert objects.read_tagged("a") == (b"two", tag)


def test_a_file_is_swapped_for_what_was_known_of_it_alone(where: Location) -> None:
    with lease_on(where, "makes the folder"):
        first = where.create("a", b"one")
        assert first is not None
        assert where.create("a", b"other") is None
        second = where.swap("a", b"two", first)
        assert second is not None
        assert where.swap("a", b"three", first) is None
        assert where.read("a") == b"two"
        where.delete("a")
        assert where.swap("a", b"four", second) is None


WORDS = """
import json
from nh2st_pipe.core.lease import _me
print(json.dumps(_me()))
"""


def said_by_a_process_that_is_gone() -> dict[str, Any]:
    said = subprocess.run([sys.executable, "-c", WORDS], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def test_a_process_of_this_machine_that_is_gone_holds_nothing(
    objects: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 1e9)
    of_another(objects, **said_by_a_process_that_is_gone())
    assert lease_on(objects, "x").take()


@pytest.mark.parametrize(
    "change",
    [
        {"boot": "of another machine with the same host name"},
        {"boot": None},
        {"space": "pid:[1]"},  # of another container
        {"space": None},
        {"began": None},
        {"pid": os.getpid(), "began": lease._began(os.getpid())},  # it lives
        {"pid": "12"},
    ],
    ids=["boot", "no boot", "space", "no space", "no start", "lives", "no number"],
)
def test_of_whom_nothing_is_sure_the_silence_is_waited_for(
    objects: Location, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 1e9)
    of_another(objects, **{**said_by_a_process_that_is_gone(), **change})
    assert not lease_on(objects, "x").take()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_processes_of_two_containers_leave_each_others_leases_alone(tmp_path: Path) -> None:
    """Each in its own space of process ids, where the other's number is nobody's: on one host, on one object store."""
    takes = (
        "import sys; from nh2st_pipe.core.lease import lease_on; from nh2st_pipe.core.location import Location\n"
        "print(lease_on(Location(sys.argv[1]), 'x').take(), flush=True); sys.stdin.read()"
    )
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
        pytest.skip("processes may not be put apart here")
    with s3_server():
        command = [*apart, sys.executable, "-c", takes, f"s3://bucket{tmp_path}"]
        first = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        second = subprocess.run(command, input="", stdout=-1, text=True, check=True)
        assert second.stdout == "False\n"
        first.communicate("")


def test_the_clock_goes_on_while_a_machine_sleeps_where_it_has_such_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    monkeypatch.setattr(time, "clock_gettime", lambda kind: {time.CLOCK_BOOTTIME: 7.0}[kind])
    assert lease._clock() == 7.0
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert lease._clock() == 5.0


def test_held_leases_are_renewed(objects: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "_HEART", lease._Heart())  # another test's beats slowly
    mine = lease_on(objects, "x")
    assert mine.take()
    beat = threading.Event()
    plain = ObjectLease.beat

    def counted(self: ObjectLease, **how: bool) -> None:
        plain(self, **how)
        beat.set()

    monkeypatch.setattr(ObjectLease, "beat", counted)
    assert beat.wait(20)
    assert json.loads(objects.read(".leases/x"))["beats"] > 0
    mine.release()
    assert json.loads(objects.read(".leases/x")) == {"number": 1, "over": True}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(StoreError, match=rf"the file system of {tmp_path}/a keeps no locks .* -o flock"):
        lease_on(Location(tmp_path / "a"), "x")


def test_a_run_takes_no_soft_lock_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(RunError, match=rf"the file system of {tmp_path}/runs keeps no locks .* or another --out"):
        RunFolder(tmp_path / "runs" / "r")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/r cannot be written: "):
        RunFolder(tmp_path / "file" / "r")


def test_what_is_in_the_way_of_a_lock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").write_text("")
    with pytest.raises(StoreError, match=r"b/\.leases cannot be made: Not a directory"):
        lease_on(Location(tmp_path / "b"), "x")
    mine = FileLease(tmp_path / "c", "x")

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(mine._lock, "acquire", refused)
    with pytest.raises(StoreError, match=r"c/\.leases cannot be written to: Read-only file system"):
        mine.take()


def test_an_object_store_that_overlooks_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def heedless(self: Location, name: str, data: bytes, tag: Tag | None = None) -> Tag:
        self.write(name, data)
        return {"e_tag": "1"}

    monkeypatch.setattr(Location, "create", heedless)
    where = Location(f"memory://{tmp_path}/heedless")
    with pytest.raises(StoreError, match="does not heed conditions on a write"):
        lease_on(where, "x")
    monkeypatch.undo()
    monkeypatch.setattr(Location, "swap", heedless)
    with pytest.raises(StoreError, match="does not heed conditions on a write"):
        lease_on(where, "x")
    assert where.files(".leases") == {}


STOPPED = """
import sys
from nh2st_pipe.core import lease
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.store.write import SlideWriter
lease._BEAT_SECONDS, lease._SILENT_SECONDS = 0.3, 1.2
lease._SURE_SECONDS = float(sys.argv[3])
plain = SlideWriter.append
def append(self, values):
    plain(self, values)
    self.checkpoint()
    print("wrote", flush=True)
    if sys.argv[4] == "waits":
        sys.stdin.readline()
SlideWriter.append = append
done = embed(sys.argv[1], encoder="fake", store=sys.argv[2], tile_px=48, batch_size=5, device="cpu")
print(len(done.done), len(done.kept), *done.failed.values(), flush=True)
"""


@pytest.mark.parametrize("sure", ["1", "1e9"], ids=["told before its write", "at its write"])
def test_who_wakes_after_another_finished_its_slide_writes_nothing(make_study: Any, sure: str) -> None:
    """Stopped in the middle of a slide, which another then finishes; awake again it would say that 5 rows are there."""
    from nh2st_pipe.store.read import open_store
    from nh2st_pipe.store.verify import verify

    study, url = make_study(1), "s3://bucket/store.zarr"
    with s3_server():
        command = [sys.executable, "-c", STOPPED, str(study.manifest), url, sure]
        first = subprocess.Popen([*command, "waits"], stdin=-1, stdout=-1, text=True)
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "wrote\n"
        os.kill(first.pid, signal.SIGSTOP)
        second = subprocess.run([*command, "goes on"], stdout=-1, text=True, timeout=100, check=True)
        assert second.stdout.endswith("\n1 0\n")
        whole = Location(url).read("slides/s0/zarr.json")
        os.kill(first.pid, signal.SIGCONT)
        said = first.communicate("\n" * 9, timeout=100)[0]
        assert "another process" in said
        assert Location(url).read("slides/s0/zarr.json") == whole
        assert open_store(url).slides() == ["s0"]
        assert not verify(url).damaged
