"""Object stores for tests: one in memory that refuses things, and a server on this machine that speaks S3."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run a stand-in of S3 with a bucket called `bucket`; return the environment in which it is found."""
    import boto3
    import s3fs  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # those of another stand-in, which has gone, would be asked
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, found):
            boto3.client("s3").create_bucket(Bucket="bucket")
            yield found
    finally:
        server.stop()
