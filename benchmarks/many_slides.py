"""A study of many slides: how soon the first tile is encoded, how soon a finished store says so, files of a slide.

    python benchmarks/many_slides.py [--slides 1200] [--records 30000] [--wait 0.03]

--slides: pictures of 240 px, each a slide of 64 tiles, embedded with the weightless encoder into a folder: seconds from
the call to the first tile, and those of the same call once more, for which nothing is to do. Then --records slides that
are finished already, in a stand-in of S3 (a process of its own) that answers each request after --wait seconds: how
long `embed` takes to find that nothing is to do. Last, a slide of 32,768 px a side (10⁹ px, JPEG tiles, four levels):
CPU seconds from opening it to its tissue.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from nh2st_pipe.core.progress import Progress
from nh2st_pipe.embedding.options import EmbedOptions
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.slides import open_slide
from nh2st_pipe.store.format import signed
from nh2st_pipe.tiles.tissue import find_tissue

_SIDE = 32_768
_LISTED = (
    b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><Contents><Key>store.zarr/zarr.json</Key>"
    b"<Size>1</Size><ETag>a</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)


class First(Progress):
    """When the first tile was encoded."""

    def __init__(self) -> None:
        self.at = 0.0

    def advance(self, done: float, total: float, now: str = "") -> None:
        """See Progress."""
        if done and not self.at:
            self.at = time.perf_counter()


def picture(side: int, seed: int = 0) -> np.ndarray:
    """Return a square of tissue on glass."""
    rng, edge = np.random.default_rng(seed), side // 8
    values = np.full((side, side, 3), 245, np.uint8)
    tissue = rng.integers(0, 40, (side - 2 * edge, side - 2 * edge, 3), dtype=np.uint8)
    values[edge:-edge, edge:-edge] = tissue + np.array([200, 120, 170], np.uint8)
    return values


def study(folder: Path, slides: int) -> None:
    """Embed so many slides into a folder, twice."""
    lines = ["slide_id,slide,mpp"]
    for number in range(slides):
        Image.fromarray(picture(240, number)).save(folder / f"s{number}.png", compress_level=1)
        lines.append(f"s{number},s{number}.png,0.5")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    options = EmbedOptions(encoder="fake", store=folder / "store.zarr", tile_px=24)
    first, began = First(), time.perf_counter()
    summary = embed(folder / "manifest.csv", options, progress=first)
    ended = time.perf_counter()
    assert len(summary.done) == slides, summary.failed
    print(f"{slides:,} slides: first tile after {first.at - began:.1f} s, all after {ended - began:.0f} s")
    again = embed(folder / "manifest.csv", options)
    assert len(again.kept) == slides
    print(f"the same call once more: {time.perf_counter() - ended:.1f} s")
    files = max(
        sum(len(names) for _, _, names in os.walk(each))
        for each in (folder / "store.zarr/slides").iterdir()
        if each.is_dir()
    )
    print(f"files of a slide: {files} at most")


def serve(store: Path, wait: float) -> None:
    """Answer as S3 would in which every slide is a copy of the first in `store`, and anything may be written."""
    written, lock = dict[str, tuple[bytes, str]](), threading.Lock()

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Answer a question."""
            time.sleep(wait)
            name = self.path.partition("?")[0].partition("store.zarr")[2].strip("/")
            if "list-type" in self.path:
                self._say(200, _LISTED)
                return
            if name in written:
                self._say(200, *written[name])
                return
            slide_id = name.split("/")[1] if name.count("/") > 1 else ""
            file = store / (name.replace(slide_id, "s0", 1) if slide_id else name)
            if not file.is_file():
                self._say(404, b"<Error><Code>NoSuchKey</Code></Error>")
                return
            body = file.read_bytes()
            if slide_id and file.parent.name == "s0":
                group = json.loads(body)
                values = group["attributes"]["nh2st_pipe"]
                del values["check"]
                values["row"] |= {"slide_id": slide_id, "patient": slide_id}
                group["attributes"]["nh2st_pipe"] = signed(values)
                body = json.dumps(group).encode()
            self._say(200, body)

        def do_HEAD(self) -> None:
            """Answer a question without its body."""
            self.do_GET()

        def do_PUT(self) -> None:
            """Write an object, under its condition."""
            time.sleep(wait)
            name = self.path.partition("store.zarr")[2].strip("/")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                tag = written[name][1] if name in written else None
                if (self.headers.get("If-None-Match") and tag) or self.headers.get("If-Match", tag) != tag:
                    self._say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                    return
                written[name] = body, f'"{len(written)}-{time.monotonic_ns()}"'
            self._say(200, b"", written[name][1])

        def do_POST(self) -> None:
            """Delete objects."""
            time.sleep(wait)
            keys = re.findall(rb"<Key>(.*?)</Key>", self.rfile.read(int(self.headers.get("Content-Length", 0))))
            for key in keys:
                written.pop(key.decode().removeprefix("store.zarr/"), None)
            deleted = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in keys)
            self._say(200, b"<DeleteResult>%s</DeleteResult>" % deleted)

        def _say(self, status: int, body: bytes, tag: str = '"a"') -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing of each request."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Answering)
    print(server.server_port, flush=True)
    server.serve_forever()


def records(folder: Path, count: int, wait: float) -> None:
    """Have a finished study of `count` slides looked at in the stand-in of S3."""
    (folder / "one.csv").write_text("slide_id,slide,mpp\ns0,s0.png,0.5\n")
    embed(folder / "one.csv", encoder="fake", store=folder / "one.zarr", tile_px=24)
    rows = "".join(f"s{number},s0.png,0.5\n" for number in range(count))
    (folder / "many.csv").write_text("slide_id,slide,mpp\n" + rows)
    command = [sys.executable, __file__, "--serve", str(folder / "one.zarr"), "--wait", str(wait)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "a", "AWS_DEFAULT_REGION": "us-east-1"}
        began = time.perf_counter()
        summary = embed(folder / "many.csv", encoder="fake", store="s3://bucket/store.zarr", tile_px=24)
        seconds = time.perf_counter() - began
    finally:
        server.kill()
        server.wait()
    assert len(summary.kept) == count, (summary.failed, len(summary.done))
    print(f"{count:,} finished slides, {1000 * wait:.0f} ms a request: {seconds:.0f} s")


def tissue(folder: Path) -> None:
    """Find the tissue of a slide of 10⁹ px."""
    piece = picture(4096)
    with tifffile.TiffWriter(folder / "large.tif", bigtiff=True) as file:
        for level in range(4):
            side = _SIDE >> (2 * level)
            tiles = (
                piece[:256, :256] if (n * 7919) % 3 else piece[1024:1280, 1024:1280] for n in range((side // 256) ** 2)
            )
            file.write(
                tiles,
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(256, 256),
                compression="jpeg",
                photometric="rgb",
                compressionargs={"level": 80},
                subfiletype=1 if level else 0,
                resolution=(20_000 >> (2 * level),) * 2,
                resolutionunit="CENTIMETER",
            )
    Image.fromarray(piece).save(folder / "small.png")
    find_tissue(open_slide(folder / "small.png"))  # what is imported is no slide's
    began = time.process_time()
    found = find_tissue(open_slide(folder / "large.tif"))
    seconds = time.process_time() - began
    print(f"tissue of {_SIDE:,} × {_SIDE:,} px ({found.mask.mean():.0%} of it): {seconds:.2f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1200)
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--wait", type=float, default=0.03)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.wait)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tissue(folder)
        study(folder, given.slides)
        records(folder, given.records, given.wait)


if __name__ == "__main__":
    main()
