"""Which codecs the arrays of a foreign Zarr may be packed with: those that unpack bytes, and run nothing they find."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import ExpressionError, NH2STError, reason_of

__all__ = ["check_codecs"]

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
