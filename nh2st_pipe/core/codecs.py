"""Which codecs the arrays of a foreign Zarr may be packed with: those that unpack bytes, and run nothing they find."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nh2st_pipe.core.errors import ExpressionError, NH2STError, reason_of
from nh2st_pipe.core.quiet import PROCESS_WIDE

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

__all__ = ["check_codecs", "texts_counted"]

# fmt: off
_KNOWN = frozenset((
    "adler32", "astype", "bitround", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian",
    "fixedscaleoffset", "fletcher32", "gzip", "jenkins_lookup3", "json2", "lz4", "lzma", "packbits", "pcodec",
    "quantize", "sharding_indexed", "shuffle", "transpose", "vlen-array", "vlen-bytes", "vlen-utf8", "zfpy", "zlib",
    "zstd",
))
# fmt: on


def check_codecs(folder: Path, kind: type[NH2STError] = ExpressionError, *, below: bool = False) -> None:
    """Raise `kind` where the array in `folder` (every array `below` it) is packed with a codec that is not known here.

    What is looked at is what the metadata mean, not how they are written. `pickle` is among those that are not known:
    it runs whatever code it finds.
    """
    names = ("zarr.json", ".zarray")
    every = (file for name in names for file in (folder.rglob(name) if below else [folder / name]) if file.is_file())
    for file in every:
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise kind(f"{file} is damaged: it is no JSON ({reason_of(error)})") from error
        for codec in _codecs(values):
            if codec.removeprefix("numcodecs.") not in _KNOWN:
                why = "which runs code that it finds" if codec == "pickle" else "which is not known here"
                raise kind(f"{file.parent} is packed with the codec '{codec}', {why}; write it anew with zstd or gzip")


def _codecs(values: Any) -> Iterator[str]:
    """Yield the names of an array's codecs, those inside of others too."""
    if not isinstance(values, Mapping):
        return
    for key in ("codecs", "index_codecs", "filters", "compressor"):
        found = values.get(key)
        for each in found if isinstance(found, list) else [found]:
            if each is None:
                continue
            if isinstance(each, str):
                yield each
            elif isinstance(each, Mapping):
                yield str(each.get("name", each.get("id")))
                yield from _codecs(each.get("configuration"))
            else:
                yield str(each)


@contextmanager
def texts_counted() -> Iterator[None]:
    """Read texts of Zarr inside: a chunk that declares more of them than it has bytes for raises ValueError.

    The codecs take memory for as many as are declared (up to 34 GB) before they look.
    """
    import zarr
    from numcodecs.registry import codec_registry
    from numcodecs.vlen import VLenArray, VLenBytes, VLenUTF8
    from zarr.codecs import VLenBytesCodec, VLenUTF8Codec
    from zarr.registry import register_codec

    def counted(codec: Any) -> type[Any]:  # of format 2
        class Counted(codec):  # type: ignore[misc]
            def decode(self, buf: Any, out: Any = None) -> Any:
                _count(buf)
                return super().decode(buf, out)

        return Counted

    def counted_3(codec: Any) -> type[Any]:
        class Counted3(codec):  # type: ignore[misc]
            def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
                _count(chunk_bytes.as_numpy_array())
                found: NDBuffer = super()._decode_sync(chunk_bytes, chunk_spec)
                return found

            async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
                return self._decode_sync(chunk_bytes, chunk_spec)

        Counted3.__name__ = codec.__name__  # zarr asks for it by this
        return Counted3

    old = {codec.codec_id: codec for codec in (VLenArray, VLenBytes, VLenUTF8)}
    new = {"vlen-utf8": VLenUTF8Codec, "vlen-bytes": VLenBytesCodec}
    with PROCESS_WIDE:
        before = dict(codec_registry)
        for key, codec in new.items():
            register_codec(key, counted_3(codec), qualname=f"nh2st_pipe.{key}")
        try:
            codec_registry.update({key: counted(codec) for key, codec in old.items()})
            with zarr.config.set({f"codecs.{key}": f"nh2st_pipe.{key}" for key in new}):
                yield
        finally:
            codec_registry.update({key: before.get(key, codec) for key, codec in old.items()})


def _count(chunk: Any) -> None:
    """Raise ValueError where a chunk (a number of texts, then the length of each and its bytes) is too short for it."""
    held = memoryview(chunk).nbytes
    declared = int.from_bytes(bytes(memoryview(chunk).cast("B")[:4]), "little")
    if 4 * (declared + 1) > held:
        raise ValueError(f"{declared:,} texts are declared in a chunk of {held:,} bytes")
