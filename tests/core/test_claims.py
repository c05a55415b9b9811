from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nh2st_pipe.core import claims
from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.location import Location
from tests.remote import refusing


@pytest.fixture(params=["folder", "objects"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    with refusing():
        yield Location(tmp_path / "store" if request.param == "folder" else "refusing://store")


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    monkeypatch.setattr(claims, "_SILENT_SECONDS", 0.0)
    claims._SEEN.clear()
    with refusing():
        yield Location("refusing://store")


def test_one_holds_a_claim_at_a_time(where: Location) -> None:
    one, two = where.claim("x"), where.claim("x")
    assert one.take()
    assert not two.take()
    one.release()
    assert two.take()
    assert not one.take()
    assert where.claim("y").take()
    two.release()
    two.release()
    assert one.take()


def test_of_many_who_try_at_once_one_has_it(where: Location) -> None:
    ready = threading.Barrier(8)
    taken, all_of_them = list[bool](), [where.claim("x") for _ in range(8)]

    def take(claim: claims.Claim) -> None:
        ready.wait()
        taken.append(claim.take())

    threads = [threading.Thread(target=take, args=(claim,)) for claim in all_of_them]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]


def of_another(where: Location, number: int = 1, beat: int = 0) -> None:
    words = {"host": "elsewhere", "pid": 1, "began": 0.0, "beat": beat}
    where.write(f".claims/x/{number:06d}", json.dumps(words).encode())


def test_a_claim_that_is_renewed_is_left_alone_and_a_silent_one_taken_over(
    objects: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_SILENT_SECONDS", 90.0)
    now = 1000.0
    monkeypatch.setattr("nh2st_pipe.core.claims.time.monotonic", lambda: now)
    of_another(objects)
    mine = objects.claim("x")
    assert not mine.take()
    now += 80
    of_another(objects, beat=1)
    assert not objects.claim("x").take()
    now += 80
    assert not mine.take()  # 80 s after it was last seen to be renewed
    now += 11
    assert mine.take()


def test_who_was_taken_over_is_told_before_the_next_write(objects: Location) -> None:
    slow = objects.claim("x")
    assert slow.take()
    slow.check()
    other = objects.claim("x")
    assert other.take()  # silent for long enough, in this test
    assert isinstance(slow, claims.ObjectClaim)
    slow.beat()
    with pytest.raises(StoreError, match="the claim on x was taken over by another process"):
        slow.check()
    slow.release()  # and does not give back what is the other's
    other.check()
    assert isinstance(other, claims.ObjectClaim)
    other.beat()
    other.check()


def test_a_number_that_was_free_again_is_not_a_claim(objects: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another(objects)
    late = objects.claim("x")
    plain = Location.create

    def meanwhile(self: Location, name: str, data: bytes) -> bool:
        monkeypatch.setattr(Location, "create", plain)
        for _ in range(3):  # others take it and give it back while this one was away
            claim = objects.claim("x")
            assert claim.take()
        return plain(self, name, data)

    monkeypatch.setattr(Location, "create", meanwhile)
    assert not late.take()
    assert sorted(objects.files(".claims/x")) == ["000004"]


PROCESS = """
import json, os, psutil, socket
began = psutil.Process().create_time()
print(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": began, "beat": 0}))
"""


def test_a_process_of_this_machine_that_is_gone_holds_nothing(
    objects: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_SILENT_SECONDS", 1e9)
    said = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True).stdout
    objects.write(".claims/x/000001", said.encode())
    assert objects.claim("x").take()
    of_another(objects, 7)
    assert not objects.claim("x").take()


def test_held_claims_are_renewed(objects: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "_HEART", claims._Heart())  # another test's beats slowly
    claim = objects.claim("x")
    assert claim.take()
    beat = threading.Event()
    plain = claims.ObjectClaim.beat

    def counted(self: claims.ObjectClaim) -> None:
        plain(self)
        beat.set()

    monkeypatch.setattr(claims.ObjectClaim, "beat", counted)
    assert beat.wait(20)
    assert json.loads(objects.read(".claims/x/000001"))["beat"] > 0
    claim.release()
    assert json.loads(objects.read(".claims/x/000001")) == {"released": True}
