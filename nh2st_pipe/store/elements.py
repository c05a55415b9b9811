"""The parts of an AnnData group as the files of Zarr v3 that they are: made in memory, and laid down in one go.

Zarr and anndata write the same, one small file after another and each by way of an event loop: for a slide of a
hundred tiles that takes longer than all else. What they read is what they would have written, key by key.

Formats: https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html and
https://anndata.readthedocs.io/en/stable/fileformat-prose.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import scipy.sparse as sp
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.pool import in_order

__all__ = [
    "ANNDATA",
    "ARRAY",
    "Files",
    "anndata_dict",
    "array",
    "consolidated",
    "csr",
    "frame",
    "group",
    "sharded",
    "shards",
]

Files = Iterator[tuple[str, bytes]]
"""Files by their names, made as they are asked for: not all are in memory."""

ANNDATA = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
_STRINGS = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
_LEVEL = 1
_LITTLE: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
_CRC: dict[str, Any] = {"name": "crc32c"}
_CHECKED = [_LITTLE, _ZSTD, _CRC]
_TEXT: list[dict[str, Any]] = [{"name": "vlen-utf8", "configuration": {}}, _ZSTD]
_ENCODERS = 4  # threads at most
_VALUES_PER_CHUNK = 1 << 20


def group(name: str, attributes: Mapping[str, Any]) -> Files:
    """Yield a group's metadata."""
    yield f"{name}/zarr.json", _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def anndata_dict(name: str) -> Files:
    """Yield the group that a mapping of AnnData is."""
    return group(name, {"encoding-type": "dict", "encoding-version": "0.1.0"})


def array(name: str, values: NDArray[Any], attributes: Mapping[str, Any] = ARRAY) -> Files:
    """Yield an array of numbers, in chunks of a million values, each with a checksum of its own."""
    yield from _chunked(name, values, values.dtype.name, _CHECKED, attributes)


def frame(name: str, index: Sequence[str], index_name: str, columns: Mapping[str, NDArray[Any]]) -> Files:
    """Yield a data frame with an index of names and columns of numbers."""
    said = {"column-order": list(columns), "_index": index_name}
    yield from group(name, {**said, "encoding-type": "dataframe", "encoding-version": "0.2.0"})
    yield from _chunked(f"{name}/{index_name}", np.array(index, object), "string", _TEXT, _STRINGS)
    for column, values in columns.items():
        yield from array(f"{name}/{column}", values)


def csr(name: str, matrix: sp.csr_matrix) -> Files:
    """Yield a sparse matrix."""
    shape = [int(side) for side in matrix.shape]
    yield from group(name, {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    for part in ("data", "indices", "indptr"):
        yield from array(f"{name}/{part}", getattr(matrix, part))


def sharded(name: str, shape: tuple[int, ...], dtype: str, chunk_rows: int, shard_rows: int) -> Files:
    """Yield the metadata of an array without values, whose rows lie in shards of `shard_rows` and these in chunks."""
    inner = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": _CHECKED,
        "index_codecs": [_LITTLE, _CRC],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": inner}]
    yield f"{name}/zarr.json", _array_json(shape, dtype, (shard_rows, *shape[1:]), codecs, ARRAY)


def shards(name: str, values: NDArray[Any], start: int, chunk_rows: int, shard_rows: int) -> Files:
    """Yield the shards that hold the rows of a `sharded` array from `start` on, where one begins.

    The last may have fewer rows than the others: chunks behind the end of the array are left out, as Zarr does.
    """
    zeros = "/0" * (values.ndim - 1)
    for at in range(0, len(values), shard_rows):
        rows = values[at : at + shard_rows]
        yield f"{name}/c/{(start + at) // shard_rows}{zeros}", _shard(rows, chunk_rows, shard_rows // chunk_rows)


def _shard(rows: NDArray[Any], chunk_rows: int, chunks: int) -> bytes:
    index = np.full((chunks, 2), np.iinfo(np.uint64).max, "<u8")
    parts, end = list[bytes](), 0
    cut = (_padded(rows[at : at + chunk_rows], chunk_rows) for at in range(0, len(rows), chunk_rows))
    for number, data in enumerate(in_order(lambda chunk: _encoded(chunk, _CHECKED), cut, min(cores(), _ENCODERS))):
        index[number] = end, len(data)
        parts.append(data)
        end += len(data)
    said = index.tobytes()
    return b"".join((*parts, said, _crc32c(said)))


def consolidated(documents: Mapping[str, bytes]) -> bytes:
    """Return a group's metadata with those of all below it in them: one request instead of thirty on a remote disk.

    `documents` are the files zarr.json of the group and of all below it, by their names in it.
    """
    below = {}
    for name, data in documents.items():
        if name != "zarr.json":
            said = json.loads(data)
            if said["node_type"] == "group":
                said["consolidated_metadata"] = _inline({})
            below[name.removesuffix("/zarr.json")] = said
    own = json.loads(documents["zarr.json"])
    return _json({**own, "consolidated_metadata": _inline(dict(sorted(below.items())))})


def _inline(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


def _chunked(
    name: str, values: NDArray[Any], dtype: str, codecs: list[dict[str, Any]], attributes: Mapping[str, Any]
) -> Files:
    """Yield an array's metadata and its chunks, cut along its rows; the last is as large as the others, as in Zarr."""
    rows = max(1, min(len(values), _VALUES_PER_CHUNK // int(np.prod(values.shape[1:]))))
    yield f"{name}/zarr.json", _array_json(values.shape, dtype, (rows, *values.shape[1:]), codecs, attributes)
    for number, start in enumerate(range(0, len(values), rows)):
        chunk = values[start : start + rows]
        yield f"{name}/c/{number}{'/0' * (chunk.ndim - 1)}", _encoded(_padded(chunk, rows), codecs)


def _padded(chunk: NDArray[Any], rows: int) -> NDArray[Any]:
    if len(chunk) == rows:
        return chunk
    fill = "" if chunk.dtype == object else 0
    return np.concatenate((chunk, np.full((rows - len(chunk), *chunk.shape[1:]), fill, chunk.dtype)))


def _encoded(chunk: NDArray[Any], codecs: list[dict[str, Any]]) -> bytes:
    names = [codec["name"] for codec in codecs]
    if names[0] == "vlen-utf8":
        data = bytes(VLenUTF8().encode(chunk))
    else:
        data = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<")).tobytes()
    packed = bytes(Zstd(level=_LEVEL).encode(data))
    return packed + _crc32c(packed) if "crc32c" in names else packed


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _array_json(
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, ...],
    codecs: list[dict[str, Any]],
    attributes: Mapping[str, Any],
) -> bytes:
    fill: Any = "" if dtype == "string" else 0.0 if dtype.startswith("float") else 0
    return _json(
        {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": codecs,
            "attributes": dict(attributes),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
