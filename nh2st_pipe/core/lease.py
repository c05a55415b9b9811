"""The right to write one thing at a place, held by one process at a time, on one machine or on several.

On a file system the kernel keeps it (`filelock`) and it ends with the process, however that ends. In an object store it
is one object, written by compare-and-swap alone: who created it, or wrote it in place of one that was over, holds it
until another does the same. Its owner renews it, and one that has not been renewed for a while may be taken over. No
clocks are compared: how long a lease has been silent is measured by who waits for it.

A process that was stopped for longer than that may wake and write once more. So every holder has a `fence`, which no
other ever had: what it writes carries it, in place of what carried its predecessor's, and by compare-and-swap.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import LeaseError, StoreError
from nh2st_pipe.core.location import Location, Tag
from nh2st_pipe.core.locks import check_locks

__all__ = ["LEASES", "FileLease", "Lease", "ObjectLease", "lease_on"]

LEASES = ".leases"  # the folder they are in

_BEAT_SECONDS = 15.0
_SURE_SECONDS = 45.0  # after its last renewal a holder writes nothing before it has renewed the lease
_SILENT_SECONDS = 90.0
_LOOK_SECONDS = 0.5


def lease_on(location: Location, name: str) -> Lease:
    """Return the lease on `name` at a place, not yet taken.

    Raises StoreError where the place has nothing that could keep two processes apart.
    """
    if location.path is not None:
        return FileLease(location.path, name)
    _check_conditions(str(location))
    return ObjectLease(location, name)


class Lease(ABC):
    """The right to write one thing at a place."""

    def __init__(self) -> None:
        self.fence = secrets.token_hex(8)
        """What tells this holder from all others there were and will be."""

    @abstractmethod
    def take(self, *, wait: bool = False) -> bool:
        """Take the lease if nobody holds it, or when nobody does any more; say whether it was taken."""

    @abstractmethod
    def release(self) -> None:
        """Give the lease back; nothing where it is not held."""

    @abstractmethod
    def check(self) -> None:
        """Raise LeaseError where a lease that was taken has been lost since."""

    def __enter__(self) -> Lease:
        self.take(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FileLease(Lease):
    """A lease that the kernel keeps."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        from filelock import FileLock

        place = folder / LEASES
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{place} cannot be made: {error.strerror or error}") from error
        check_locks(place, folder, StoreError, "an object store for --store, and copy it afterwards")
        self._where, self._lock = place, FileLock(place / f"{name}.lock", thread_local=False)

    def take(self, *, wait: bool = False) -> bool:
        """See Lease."""
        from filelock import Timeout

        try:
            self._lock.acquire(blocking=wait)
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(f"{self._where} cannot be written to: {error.strerror or error}") from error
        return True

    def release(self) -> None:
        """See Lease."""
        self._lock.release()

    def check(self) -> None:
        """See Lease: the kernel takes none away."""


@cache
def _check_conditions(url: str) -> None:
    """Raise StoreError where an object store overlooks that an object is to be written on a condition: asked once."""
    location, name = Location(url), f"{LEASES}/probe-{secrets.token_hex(8)}"
    tag = location.create(name, b"one")
    again = location.create(name, b"two")
    swapped = None if tag is None else location.swap(name, b"three", tag)
    stale = None if tag is None else location.swap(name, b"four", tag)
    location.delete(name)
    if tag is None or again is not None or swapped is None or stale is not None:
        raise StoreError(
            f"{url} does not heed conditions on a write (If-None-Match, If-Match), without which two processes would "
            "write over each other; take another object store or a newer version of it, or a folder"
        )


class ObjectLease(Lease):
    """A lease that an object store keeps, as one object: its number, its owner and how often it was renewed."""

    def __init__(self, where: Location, name: str) -> None:
        super().__init__()
        self._where, self._name = where, name
        self._object = f"{LEASES}/{name}"
        self._number = self._beats = 0
        self._tag: Tag | None = None
        self._lost = False
        self._sure = 0.0
        self._turn = threading.Lock()  # a beat after the last word would take that back

    def take(self, *, wait: bool = False) -> bool:
        """See Lease."""
        while not self._taken():
            if not wait:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def release(self) -> None:
        """See Lease."""
        if self._tag is None:
            return
        _HEART.leave(self)
        with self._turn:
            if not self._lost:
                with contextlib.suppress(StoreError, OSError):  # the end of a process, or its silence, does it too
                    self._where.swap(
                        self._object, json.dumps({"number": self._number, "over": True}).encode(), self._tag
                    )
            self._tag = None

    def check(self) -> None:
        """See Lease. One that has not been renewed for a while is renewed first."""
        if not self._lost and self._tag is not None and _clock() - self._sure > _SURE_SECONDS:
            self.beat(surely=True)
        if self._lost:
            raise LeaseError(
                f"{self._where}: the lease on {self._name} was taken over by another process, as this one had not "
                f"been heard of for {_SILENT_SECONDS:.0f} s; what it wrote until then is kept"
            )

    def beat(self, *, surely: bool = False) -> None:
        """Renew the lease, or see that it is lost. Raises StoreError where neither can be said, if it is to be sure."""
        quiet = contextlib.nullcontext() if surely else contextlib.suppress(StoreError, OSError)
        with self._turn, quiet:
            if self._tag is None or self._lost:
                return
            now = _clock()
            self._beats += 1
            tag = self._where.swap(self._object, self._words(), self._tag)
            self._lost = tag is None
            if tag is not None:
                self._tag, self._sure = tag, now

    def _taken(self) -> bool:
        now = _clock()
        self._number, self._beats = 1, 0
        tag = self._where.create(self._object, self._words())
        if tag is None:
            try:
                said, old = self._where.read_tagged(self._object)
            except FileNotFoundError:
                return False  # deleted this moment
            number = self._over(said)
            if number is None:
                return False
            self._number = number + 1
            tag = self._where.swap(self._object, self._words(), old)
        if tag is None:
            return False
        self._tag, self._lost, self._sure = tag, False, now
        _HEART.enter(self)
        return True

    def _over(self, said: bytes) -> int | None:
        """Return the number of a lease that is over; None where another process holds it."""
        owner: Any = {}
        with contextlib.suppress(ValueError):
            owner = json.loads(said)
        owner = owner if isinstance(owner, dict) else {}
        number = owner.get("number") if isinstance(owner.get("number"), int) else 0
        if owner.get("over") is True or _is_gone(owner):
            return number
        key, now = f"{self._where}/{self._object}", _clock()
        if key not in _SEEN or _SEEN[key][0] != said:
            _SEEN[key] = said, now
        return number if now - _SEEN[key][1] >= _SILENT_SECONDS else None

    def _words(self) -> bytes:
        return json.dumps({"number": self._number, "fence": self.fence, "beats": self._beats, **_me()}).encode()


_SEEN: dict[str, tuple[bytes, float]] = {}
"""What leases of others said, and since when they have said that."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_SPACE = Path("/proc/self/ns/pid")


def _clock() -> float:
    """Return seconds that go on while the machine sleeps, where it has such a clock."""
    kind = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if kind is None else time.clock_gettime(kind)


@lru_cache
def _me_at(pid: int) -> dict[str, Any]:
    found: dict[str, Any] = {"boot": None, "space": None, "pid": pid, "began": _began(pid)}
    with contextlib.suppress(OSError):
        found["boot"] = _BOOT_ID.read_text().strip()
    with contextlib.suppress(OSError):
        found["space"] = str(_PID_SPACE.readlink())
    return found


def _me() -> dict[str, Any]:
    """Return what a process is known by: the boot of its machine, its space of process ids, its id, its start."""
    return _me_at(os.getpid())


def _began(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks since its boot; None where it cannot be known.

    One that has ended and is not yet waited for has begun at no time of a living one.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "over" if fields[0] == "Z" else fields[19]


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lease is surely at an end: a process of this boot and this space of process ids that is
    not there. Of whatever is not known, nobody is sure.
    """
    me, pid = _me(), owner.get("pid")
    here = all(me[key] is not None and owner.get(key) == me[key] for key in ("boot", "space"))
    if not here or not isinstance(pid, int) or owner.get("began") is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # it is there, and another user's
    began = _began(pid)
    return began is not None and began != owner["began"]


class _Heart:
    """One thread of a process that renews all leases it holds in object stores."""

    def __init__(self) -> None:
        self._held: set[ObjectLease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def enter(self, lease: ObjectLease) -> None:
        with self._lock:
            self._held.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()

    def leave(self, lease: ObjectLease) -> None:
        with self._lock:
            self._held.discard(lease)

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            with self._lock:
                held = list(self._held)
                if not held:
                    self._thread = None
                    return
            for lease in held:
                lease.beat()


_HEART = _Heart()
