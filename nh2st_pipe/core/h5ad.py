"""`.h5ad` files: written whole, and read where there is memory for all they declare.

HDF5 does not recover from a disk that is full while it writes: it fails once more wherever it is closed. So a file is
made in memory, compressed, and its bytes are written as those of any other; a large one is written through `_Disk`,
which keeps such a fault from HDF5 until it is closed.
"""

from __future__ import annotations

import io
import mmap
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import ExpressionError, NH2STError, fault_of
from nh2st_pipe.core.hdf5 import check_skeleton
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.memory import require
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.core.whole import written_whole

if TYPE_CHECKING:
    import anndata

__all__ = ["checked", "checked_matrix", "new_h5ad", "read_h5ad", "require_h5", "write_h5ad", "write_matrix"]

_PACKED = {"compression": "gzip"}


@contextmanager
def new_h5ad(path: Path, *, large: bool = False) -> Iterator[Any]:
    """Give an empty HDF5 file; what it holds at the end is written to `path`. Raises WriteError where that fails.

    It is made in memory, on the disk where it is `large`.
    """
    import h5py

    if large:
        with written_whole(path) as part, _Disk(part) as disk:
            with h5py.File(disk, "w") as file:
                yield file
                file.flush()
                disk.check()
            disk.check()
        return
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        data = file.id.get_file_image()
    with written_whole(path) as part:
        part.write_bytes(data)


class _Disk(io.RawIOBase):
    """A file for HDF5. Once it cannot be written to, it takes what comes and drops it; `check` raises the fault."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self._fault: OSError | None = None

    def readinto(self, into: Any) -> int:
        """Fill `into`; with zeros where there is nothing, as after a fault."""
        have = self._file.readinto(into) or 0
        view = memoryview(into).cast("B")
        view[have:] = bytes(len(view) - have)
        return len(view)

    def seek(self, to: int, whence: int = 0) -> int:
        """Go to a place."""
        return self._file.seek(to, whence)

    def truncate(self, size: int | None = None) -> int:
        """Make the file so long, as far as it can be."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._fault = self._fault or error
            return size or 0

    def close(self) -> None:
        """Close it."""
        self._file.close()
        super().close()

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self._fault is None:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._fault = error
        return size

    def check(self) -> None:
        """Raise what kept it from being written."""
        if self._fault is not None:
            raise self._fault


def write_matrix(group: Any, name: str, shape: tuple[int, int], kind: Any, blocks: Iterable[NDArray[Any]]) -> None:
    """Write n × g values, of which `blocks` are some columns after others, as anndata keeps an array: packed by gzip
    after its bytes are sorted, by as many threads as there are processors. One block is in memory at a time.
    """
    rows = max(1, min(shape[0], _CHUNK[0]))
    columns = max(1, min(shape[1], _CHUNK[1]))
    made = group.create_dataset(name, shape, kind, chunks=(rows, columns) if min(shape) else None, **_packed(shape))
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"
    first, rest = 0, np.empty((shape[0], 0), kind)
    with ThreadPoolExecutor(cores()) as pool:
        for block in blocks:
            block = block.astype(kind, copy=False)
            rest = np.concatenate((rest, block), axis=1) if rest.size else block
            ready = rest.shape[1] // columns * columns
            _write_chunks(pool, made, first, rest[:, :ready], rows, columns)
            first, rest = first + ready, rest[:, ready:]
        _write_chunks(pool, made, first, rest, rows, columns)


def _packed(shape: tuple[int, int]) -> dict[str, Any]:
    return {"compression": "gzip", "compression_opts": 1, "shuffle": True} if min(shape) else {}


def _write_chunks(
    pool: ThreadPoolExecutor, made: Any, first: int, values: NDArray[Any], rows: int, columns: int
) -> None:
    places = [(i, j) for j in range(0, values.shape[1], columns) for i in range(0, values.shape[0], rows)]

    def pack(at: tuple[int, int]) -> bytes:
        chunk = values[at[0] : at[0] + rows, at[1] : at[1] + columns]
        if chunk.shape != (rows, columns):  # at an edge the rest is of no meaning
            whole = np.zeros((rows, columns), values.dtype)
            whole[: chunk.shape[0], : chunk.shape[1]] = chunk
            chunk = whole
        plain = np.ascontiguousarray(chunk).view(np.uint8).reshape(-1, values.dtype.itemsize)
        return zlib.compress(plain.T.tobytes(), 1)

    for (i, j), packed in zip(places, pool.map(pack, places), strict=True):
        made.id.write_direct_chunk((i, first + j), packed)


def write_h5ad(data: anndata.AnnData, path: Path, **packed: Any) -> None:
    """Write `data` to `path`, compressed (`packed`: h5py's options for that)."""
    from anndata.io import write_elem

    with quiet_warnings(), new_h5ad(path) as file:
        data.strings_to_categoricals()
        write_elem(file, "/", data, dataset_kwargs=packed or _PACKED)


_CHUNK = (2048, 64)  # spots and genes
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HEAD = 16  # bytes before a heap's first text, and before each: number, references, and the length behind both
_TEXT_HEAD = struct.Struct("<H6xQ")
_HEAP = b"GCOL\x01\0\0\0"  # how a heap begins; its size follows
_MOST_PER_BYTE = 2_000  # of values for each byte of the file: deflate packs 1,032 to 1
_SURE_BYTES = 256 << 20  # so many are had anyway
_TEXT_BYTES = 64  # of a text of any length, about


def require_h5(path: Path, kind: type[NH2STError] = ExpressionError) -> None:
    """Raise `kind` where what an HDF5 file declares is more than its bytes can hold, or than there is memory for.

    Texts are held against the heaps that they lie in: HDF5 takes the memory that a text declares before it looks, and
    reads what is not its own where a heap has less.
    """
    import h5py

    try:
        check_skeleton(path)
    except ValueError as error:
        raise kind(f"{path} cannot be read: {error}; is it damaged?") from None
    heaps = _Heaps(path, kind)
    total, largest = 0, ("", 0)
    said = set[str]()  # the names of attributes that are texts

    def count(name: str, each: Any) -> None:
        nonlocal total, largest
        for key in each.attrs:
            attribute = each.attrs.get_id(key)
            if attribute.dtype.kind == "O":
                _check_type(path, f"its attribute {key}", attribute.get_type(), kind)
                said.add(key)
        if isinstance(each, h5py.Dataset) and each.shape is not None:
            size = int(each.size) * (_TEXT_BYTES if each.dtype.kind == "O" else each.dtype.itemsize)
            if each.dtype.kind == "O" and h5py.check_ref_dtype(each.dtype) is None:
                _check_type(path, name, each.id.get_type(), kind)
                _check_texts(path, name, each, heaps)
            total, largest = total + size, max(largest, (name, size), key=lambda of: of[1])

    with h5py.File(path) as file:
        count("", file)
        file.visititems(count)
    _check_attributes(path, said, heaps)
    held = path.stat().st_size
    if total > max(_SURE_BYTES, _MOST_PER_BYTE * held):
        raise kind(
            f"{path} declares {total / 1e9:,.1f} GB of values ({largest[0]} the most), which its {held:,} bytes cannot "
            "hold; is the file damaged?"
        )
    require(1.5 * total, f"{path} ({largest[0]} the most)", kind)


_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("number", "<u4")])  # to a text, as HDF5 stores it


class _Heaps:
    """The heaps of texts in a file, by what they hold: numbers within each, and lengths.

    One that does not come to an end, through which HDF5 would go for ever, is a fault where a text leads to it: what is
    left of a heap that was given up stands in good files too.
    """

    def __init__(self, path: Path, kind: type[NH2STError]) -> None:
        self._path, self._kind = path, kind
        self._held = path.stat().st_size
        places, keys, lengths = array("Q"), array("Q"), array("Q")
        self._broken = dict[int, str]()
        self.addressed = False
        """Whether references name heaps by their place in the file: not behind a block of somebody's own."""
        if self._held:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                size_of_address = data[13 if len(data) > 13 and data[8] < 2 else 9] if len(data) > 13 else 0
                self.addressed = data[:8] == _SIGNATURE and size_of_address == 8
                at = data.find(_HEAP)
                while at >= 0:
                    broken = self._walk(data, at, len(places) << 16, keys, lengths)
                    if broken is not None:
                        self._broken[at] = broken
                    places.append(at)
                    at = data.find(_HEAP, at + len(_HEAP))
        self._places = np.frombuffer(places, np.uint64) if places else np.zeros(0, np.uint64)
        of_key = np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64)
        order = np.argsort(of_key, kind="stable")
        self._keys = of_key[order]
        self._lengths = (np.frombuffer(lengths, np.uint64) if lengths else np.zeros(0, np.uint64))[order]

    def _walk(self, data: mmap.mmap, at: int, key: int, keys: array[int], lengths: array[int]) -> str | None:
        """Add the texts of the heap at a byte; return what is wrong with it, in words."""
        size = int.from_bytes(data[at + len(_HEAP) : at + len(_HEAP) + 8], "little")
        if size > self._held - at:
            return f"a heap of texts in it, at byte {at:,}, declares {size:,} bytes"
        place, end, head = at + _HEAD, at + size, _TEXT_HEAD.unpack_from
        while place + _HEAD <= end:
            number, length = head(data, place)
            takes = _HEAD + -(-length // 8) * 8 if number else length  # number 0 is what is free, with its own head
            if takes < _HEAD or place + takes > end:
                return f"a text in a heap of them, at byte {place:,}, takes {takes:,} bytes"
            if number:
                keys.append(key | number)
                lengths.append(length)
            place += takes
        return None

    def check(self, references: NDArray[Any], name: str) -> None:
        """Raise where references (of `_REFERENCE`) declare more than the file has, or than lies where they lead."""
        seen = references[references["length"] > 0]
        if not len(seen):
            return
        longest = int(seen["length"].max())
        if longest > self._held:
            raise self._kind(f"{self._path} is damaged: a text in {name} declares {longest:,} bytes")
        if not self.addressed or not len(self._places):
            return
        for heap in np.intersect1d(seen["heap"], list(self._broken)) if self._broken else ():
            raise self._kind(f"{self._path} is damaged: {self._broken[int(heap)]}")
        which = np.searchsorted(self._places, seen["heap"])
        found = which < len(self._places)
        found[found] = self._places[which[found]] == seen["heap"][found]
        keys = (which.astype(np.uint64) << np.uint64(16)) | seen["number"].astype(np.uint64)
        place = np.searchsorted(self._keys, keys)
        found &= (place < len(self._keys)) & (seen["number"] < 1 << 16)
        found[found] = self._keys[place[found]] == keys[found]
        found[found] = self._lengths[place[found]] >= seen["length"][found]
        if not found.all():
            first = seen[~found][0]
            raise self._kind(
                f"{self._path} is damaged: {int((~found).sum()):,} texts in {name} are not where they should be, the "
                f"first of {int(first['length']):,} bytes at byte {int(first['heap']):,}"
            )


def _check_texts(path: Path, name: str, texts: Any, heaps: _Heaps) -> None:
    """Hold the texts of a dataset against the heaps.

    Looked at are those that are stored as they are, or packed with deflate alone, as everyone writes them.
    """
    parts = list[bytes]()
    if texts.chunks is None:
        start, length = texts.id.get_offset(), texts.id.get_storage_size()
        if start is not None:
            with path.open("rb") as file:
                file.seek(start)
                parts.append(file.read(length))
    elif texts.compression in (None, "gzip") and not texts.shuffle and not texts.fletcher32:
        for number in range(texts.id.get_num_chunks()):
            mask, packed = texts.id.read_direct_chunk(texts.id.get_chunk_info(number).chunk_offset)
            parts.append(zlib.decompress(packed) if texts.compression and not mask else packed)
    for part in parts:
        heaps.check(np.frombuffer(part[: len(part) // _REFERENCE.itemsize * _REFERENCE.itemsize], _REFERENCE), name)


_KINDS = (0, 1)  # of what is of any length: a list, a text


def _check_type(path: Path, name: str, of: Any, kind: type[NH2STError]) -> None:
    """Raise where values of any length are of a kind that there is not: HDF5 would read them as anything."""
    encoded = of.encode()  # what it is, the encoding's version, then the type as it stands in the file
    if encoded[2] & 15 == _VLEN and encoded[3] & 15 not in _KINDS:
        raise kind(f"{path} is damaged: {name} is of a kind that there is not ({encoded[3] & 15})")


_VLEN = 9  # the class of texts of any length, among HDF5's types


def _check_attributes(path: Path, names: set[str], heaps: _Heaps) -> None:
    """Hold attributes of these names that are texts against the heaps.

    There is no way to ask HDF5 for it without the memory being taken; so the messages of the headers are looked for in
    the bytes: sizes of name, type and space (version 1 fills each up to 8 bytes), those three, and the references.
    Headers of HDF5's newer kind need none of this: they have checksums.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in names:
            text = name.encode() + b"\0"
            at = data.find(text)
            while at >= 0:
                for version, before in ((1, 8), (2, 8), (3, 9)):
                    head = data[max(at - before, 0) : at]
                    sizes = [int.from_bytes(head[start : start + 2], "little") for start in (2, 4, 6)]
                    if len(head) < before or head[0] != version or sizes[0] != len(text):
                        continue
                    filled = [-(-size // 8) * 8 if version == 1 else size for size in sizes]
                    start = at + sum(filled)
                    one = data[at + filled[0] : at + filled[0] + 1]
                    if not one or one[0] & 15 != _VLEN or start + _REFERENCE.itemsize > len(data):
                        continue
                    first = data[start : start + _REFERENCE.itemsize]  # of one text; of a list the others follow
                    heaps.check(np.frombuffer(first, _REFERENCE), f"its attribute {name}")
                at = data.find(text, at + 1)


def read_h5ad(path: Path, kind: type[NH2STError] = ExpressionError) -> anndata.AnnData:
    """Return what an `.h5ad` file holds, in memory. Raises `kind` where it cannot be read as one."""
    import anndata

    with fault_of(kind, f"{path} cannot be read as an AnnData .h5ad file"):
        require_h5(path, kind)
        with quiet_warnings():
            return checked(anndata.read_h5ad(path))


def checked(data: anndata.AnnData) -> anndata.AnnData:
    """Return `data`, whose sparse matrices point nowhere outside of themselves. Raises ValueError where one does.

    Whoever takes rows of such a matrix reads and writes memory that is not its own, which ends the interpreter.
    """
    parts = [("X", data.X), *(("raw/X", data.raw.X) for _ in [0] if data.raw is not None)]
    for name in ("layers", "obsp", "varp", "obsm", "varm"):
        parts += [(f"{name}/{key}", value) for key, value in getattr(data, name).items()]
    for name, value in parts:
        checked_matrix(value, name)
    return data


def checked_matrix(matrix: Any, name: str) -> Any:
    """Return a matrix. Raises ValueError with its `name` where it is a sparse one that points outside of itself."""
    if sp.issparse(matrix) and hasattr(matrix, "check_format"):
        try:
            matrix.check_format(full_check=True)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name} is damaged: a sparse matrix that points outside of itself ({error})") from error
    return matrix
