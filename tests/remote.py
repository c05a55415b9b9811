"""Object stores for tests: one in memory that refuses things, and a server on this machine that speaks S3."""

from __future__ import annotations

import atexit
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar
from unittest import mock

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

__all__ = ["Refusing", "refusing", "s3_server"]


class Refusing(MemoryFileSystem):  # type: ignore[misc]
    """In memory; the next `times` writes (or `reads`) of objects whose name holds `part` are refused, and questions
    counted.
    """

    protocol = "refusing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    part, times, refused = "", 0, 0
    reads = False
    asked: ClassVar[Counter[str]] = Counter()

    def exists(self, path: str, **more: Any) -> bool:
        self.asked[path.rpartition("store.zarr/")[2]] += 1
        there: bool = super().exists(path, **more)
        return there

    def cat_file(self, path: str, *arguments: Any, **more: Any) -> Any:
        self.asked[path.rpartition("store.zarr/")[2]] += 1
        if self.reads:
            self._refuse(path)
        return super().cat_file(path, *arguments, **more)

    @classmethod
    def _refuse(cls, path: str) -> None:
        if cls.times > 0 and cls.part in path:
            cls.times -= 1
            cls.refused += 1
            raise ConnectionError("the store is busy; reduce your request rate")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        if not self.reads:
            self._refuse(path)
        return super().pipe_file(path, value, mode=mode, **more)


@contextmanager
def refusing() -> Iterator[type[Refusing]]:
    """Return the class of an object store at refusing://, empty, which nothing is asked of twice at once."""
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    Refusing.store.clear()
    Refusing.pseudo_dirs[:] = [""]
    Refusing.part, Refusing.times, Refusing.refused, Refusing.reads = "", 0, 0, False
    Refusing.asked.clear()
    with mock.patch("nh2st_pipe.core.steady._PAUSES", (0.0, 0.0, 0.0)):
        yield Refusing


@cache
def _s3() -> str:
    """Start this process's stand-in of S3, and return its address.

    There is one, as s3fs keeps what it has made for an address: another would be asked where the first has gone.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Have a stand-in of S3 with an empty bucket called `bucket`; return the environment in which it is found."""
    import boto3

    found = {
        "AWS_ENDPOINT_URL": _s3(),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    urllib.request.urlopen(urllib.request.Request(f"{_s3()}/moto-api/reset", method="POST")).close()
    with mock.patch.dict(os.environ, found):
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield found
