"""The right to write one thing at a place, held by one process at a time, on one machine or on several.

On a file system the kernel keeps it (`filelock`) and it ends with the process, however that ends. In an object store
it is kept by what such stores can do, which is to create an object if and only if there is none: each holder creates
the next number of a row, and the highest number holds. Its owner renews it, and one that has not been renewed for a
while may be taken over, by creating the number after it. No clocks are compared: how long a claim has been silent is
measured by who waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nh2st_pipe.core.errors import ClaimError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from nh2st_pipe.core.location import Location

__all__ = ["CLAIMS", "Claim", "FileClaim", "ObjectClaim"]

CLAIMS = ".claims"  # the folder they are in

_BEAT_SECONDS = 15.0
_SILENT_SECONDS = 90.0
_LOOK_SECONDS = 0.5


class Claim(ABC):
    """The right to write one thing at a place."""

    @abstractmethod
    def take(self, *, wait: bool = False) -> bool:
        """Take the claim if nobody holds it, or when nobody does any more; say whether it was taken."""

    @abstractmethod
    def release(self) -> None:
        """Give the claim back; nothing where it is not held."""

    @abstractmethod
    def check(self) -> None:
        """Raise ClaimError where a claim that was taken has been lost since."""

    def __enter__(self) -> Claim:
        self.take(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FileClaim(Claim):
    """A claim that the kernel keeps."""

    def __init__(self, folder: Path, name: str) -> None:
        from filelock import FileLock

        (folder / CLAIMS).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / CLAIMS / f"{name}.lock", thread_local=False)

    def take(self, *, wait: bool = False) -> bool:
        """See Claim."""
        from filelock import Timeout

        try:
            self._lock.acquire(blocking=wait)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """See Claim."""
        self._lock.release()

    def check(self) -> None:
        """See Claim: the kernel takes none away."""


class ObjectClaim(Claim):
    """A claim that an object store keeps, as objects 000001, 000002, … of which the last one holds."""

    def __init__(self, where: Location, name: str) -> None:
        self._where, self._name = where, name
        self._folder = f"{CLAIMS}/{name}"
        self._number = self._beat = 0
        self._lost = False
        self._turn = threading.Lock()  # a beat after the last word would take that back

    def take(self, *, wait: bool = False) -> bool:
        """See Claim."""
        while not self._taken():
            if not wait:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def release(self) -> None:
        """See Claim."""
        if not self._number:
            return
        _HEART.leave(self)
        with self._turn:
            if not self._lost:
                with contextlib.suppress(StoreError, OSError):  # the end of a process, or its silence, does it too
                    self._where.write(self._object(self._number), b'{"released": true}')
            self._number = 0

    def check(self) -> None:
        """See Claim."""
        if self._lost:
            raise ClaimError(
                f"{self._where}: the claim on {self._name} was taken over by another process, as this one had not "
                f"been heard of for {_SILENT_SECONDS:.0f} s; what it wrote until then is kept"
            )

    def beat(self) -> None:
        """Renew the claim, and see whether it is lost."""
        with self._turn, contextlib.suppress(StoreError, OSError):  # the next beat, or whoever takes it over, sees
            if not self._number:
                return
            if self._numbers()[-1:] != [self._number]:
                self._lost = True
                return
            self._beat += 1
            self._where.write(self._object(self._number), self._words())

    def _taken(self) -> bool:
        numbers = self._numbers()
        last = numbers[-1] if numbers else 0
        if last and not self._is_over(last):
            return False
        mine = last + 1
        if not self._where.create(self._object(mine), self._words()):
            return False
        now = self._numbers()
        if now[-1] != mine:  # what was over had been followed by others since, and the number after it was free again
            self._where.delete(self._object(mine))
            return False
        for number in now[:-1]:
            self._where.delete(self._object(number))
        self._number, self._lost = mine, False
        _HEART.enter(self)
        return True

    def _is_over(self, number: int) -> bool:
        try:
            said = self._where.read(self._object(number))
        except FileNotFoundError:
            return False  # another process is at it just now
        with contextlib.suppress(ValueError):
            owner: Any = json.loads(said)
            if owner.get("released") or (owner.get("host") == _host() and not _lives(owner)):
                return True
        key, now = (str(self._where), self._object(number)), time.monotonic()
        if _SEEN.get(key, (b"", 0.0))[0] != said:
            _SEEN[key] = said, now
        return now - _SEEN[key][1] >= _SILENT_SECONDS

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self._where.files(self._folder) if name.isdigit())

    def _object(self, number: int) -> str:
        return f"{self._folder}/{number:06d}"

    def _words(self) -> bytes:
        return json.dumps({"host": _host(), "pid": os.getpid(), "began": _began(), "beat": self._beat}).encode()


_SEEN: dict[tuple[str, str], tuple[bytes, float]] = {}
"""What claims of others said, and since when they have said that."""


def _host() -> str:
    return socket.gethostname()


@lru_cache
def _began() -> float:
    import psutil

    return float(psutil.Process().create_time())


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine that took a claim is still there."""
    import psutil

    try:
        process = psutil.Process(int(owner["pid"]))
        return bool(abs(process.create_time() - float(owner["began"])) < 1 and process.status() != "zombie")
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


class _Heart:
    """One thread of a process that renews all claims it holds in object stores."""

    def __init__(self) -> None:
        self._held: set[ObjectClaim] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def enter(self, claim: ObjectClaim) -> None:
        with self._lock:
            self._held.add(claim)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._thread.start()

    def leave(self, claim: ObjectClaim) -> None:
        with self._lock:
            self._held.discard(claim)

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            with self._lock:
                held = list(self._held)
                if not held:
                    self._thread = None
                    return
            for claim in held:
                claim.beat()


_HEART = _Heart()
