"""A stand-in of S3 on this machine, for tests: it refuses what it is told to, and counts what it is asked."""

from __future__ import annotations

import atexit
import datetime
import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

__all__ = ["URL", "Refusing", "refusing", "s3_server"]

URL = "s3://bucket/store.zarr"

_BUSY = b"<Error><Code>SlowDown</Code><Message>the store is busy; reduce your request rate</Message></Error>"
_SOON = datetime.timedelta(milliseconds=1)
_IMPATIENT = {"max_retries": 3, "backoff": {"init_backoff": _SOON, "max_backoff": _SOON, "base": 2.0}}


class Refusing:
    """A web application in front of another: the next `times` writes (or `reads`) of objects whose name holds `part`
    are refused, and questions counted by the object's name in the store.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._lock = app, threading.Lock()
        self.asked = Counter[str]()
        self.clear()

    def clear(self) -> None:
        self.part, self.times, self.refused, self.reads = "", 0, 0, False
        self.each = dict[str, int]()
        """Parts of names, and how often each is refused."""
        self.heard: Callable[[str, str], object] | None = None
        self.signed: Callable[[str], object] | None = None
        self.asked.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name, method = str(environ["PATH_INFO"]), environ["REQUEST_METHOD"]
        if self.heard is not None:
            self.heard(method, name)
        if self.signed is not None:
            self.signed(str(environ.get("HTTP_AUTHORIZATION")))
        with self._lock:
            if method in ("GET", "HEAD"):
                self.asked[name.rpartition("store.zarr/")[2]] += 1
            kind = ("GET",) if self.reads else ("PUT",)
            mine = method in kind and "store.zarr/" in name
            part = next((part for part, left in self.each.items() if mine and left > 0 and part in name), None)
            if part is not None or (mine and self.times > 0 and self.part in name):
                if part is None:
                    self.times -= 1
                else:
                    self.each[part] -= 1
                self.refused += 1
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [_BUSY]
        return self._app(environ, start_response)


@cache
def _s3() -> tuple[str, Refusing]:
    """Start this process's stand-in of S3, and return its address and what stands before it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            """Say nothing of each request."""

    before = Refusing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, before, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    atexit.register(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}", before


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Have a stand-in of S3 with an empty bucket called `bucket`; return the environment in which it is found."""
    import boto3

    address, before = _s3()
    found = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before.clear()
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    with mock.patch.dict(os.environ, found):
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield found


@contextmanager
def refusing() -> Iterator[Refusing]:
    """Have the stand-in, with hardly a pause before it is asked again, at `URL`; return what stands before it."""
    with s3_server(), mock.patch("nh2st_pipe.core.objects.RETRIES", _IMPATIENT):
        yield _s3()[1]
