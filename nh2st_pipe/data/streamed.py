"""Embeddings of a study that do not fit into memory: laid out flat in a file on a local disk, and mapped from there.

The store's chunks are compressed, and a batch takes spots from everywhere. So the slides are read once, one after
another, into a file in which every embedding has its place, and a batch reads what it needs. Batches, and with them
all results, are those of a study in memory. What has been read stays with the operating system for as long as it has
room, and is not this process's own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.leftovers import Held, new_file, sweep

__all__ = ["LEAST_KEPT", "StreamedCache", "scratch_file", "scratch_folders"]

_KIND = "nh2st-cache"
LEAST_KEPT = 64 << 20
"""Bytes of a file that may lie in memory in any case."""

_SPARE = 1 << 30  # bytes of the disk that others may need
_IN_MEMORY = ("tmpfs", "ramfs")


class StreamedCache:
    """A cache (see `data.samples.Cache`) in a file of M × V × d float16 values; `gather` puts them on `device`.

    `keep` is how many bytes of the file may lie in this process's memory. It can be pickled: the other process maps the
    same file.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], device: torch.device, keep: int) -> None:
        self._file, self._shape, self._device, self._keep = file, shape, device, keep
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 0)
        self._views = torch.frombuffer(self._map, dtype=torch.float16).view(shape)
        self._row = 2 * shape[2] + mmap.PAGESIZE  # bytes that reading one embedding brings in, about
        self._touched = 0
        self._advise("MADV_RANDOM")  # of a row read somewhere, the next row is not wanted

    def __reduce__(self) -> tuple[type[StreamedCache], tuple[Path, tuple[int, int, int], torch.device, int]]:
        return type(self), (self._file, self._shape, self._device, self._keep)

    @property
    def n_views(self) -> int:
        """See Cache."""
        return self._shape[1]

    @property
    def dim(self) -> int:
        """See Cache."""
        return self._shape[2]

    @property
    def device(self) -> torch.device:
        """See Cache."""
        return self._device

    def gather(self, rows: torch.Tensor, views: int | torch.Tensor | slice) -> torch.Tensor:
        """See Cache."""
        rows = rows.cpu()
        self._soon(rows)
        if isinstance(views, torch.Tensor):
            views = views.cpu()
        out = self._views[rows, views]
        self._read(out.numel() // self.dim)
        return out.to(self._device)

    @contextlib.contextmanager
    def place(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield the rows `start` to `stop`, to be written."""
        yield self._views[start:stop]
        self._read((stop - start) * self.n_views)

    def _soon(self, rows: torch.Tensor) -> None:
        """Have rows that follow each other read in one go."""
        n = rows.numel()
        if n > 1 and rows.ndim == 1 and int(rows[-1]) - int(rows[0]) == n - 1:
            row = 2 * self.n_views * self.dim
            start = int(rows[0]) * row // mmap.PAGESIZE * mmap.PAGESIZE
            self._advise("MADV_WILLNEED", start, int(rows[-1] + 1) * row - start)

    def _read(self, embeddings: int) -> None:
        self._touched += embeddings * self._row
        if self._touched > self._keep:
            self._advise("MADV_DONTNEED")  # of a file that is mapped, nothing is lost
            self._touched = 0

    def _advise(self, what: str, *where: int) -> None:
        if hasattr(mmap, what):
            self._map.madvise(getattr(mmap, what), *where)


def _room(folder: Path, size: int) -> tuple[Path, Held]:
    """Make a file of `size` bytes, all of which the disk has; deleted where that fails."""
    file, held = new_file(folder, _KIND)
    try:
        with file.open("r+b") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)  # a disk that is full later would end the process
            else:
                opened.truncate(size)
    except BaseException:
        file.unlink()
        held.let_go()
        raise
    return file, held


def scratch_folders(*beside: Path) -> list[Path]:
    """Return where such files may lie: TMPDIR, /var/tmp, and folders beside what is read."""
    return [Path(tempfile.gettempdir()), Path("/var/tmp"), *beside]


def scratch_file(
    shape: tuple[int, int, int],
    device: torch.device,
    keep: int,
    folders: Sequence[Path],
    what: str = "embeddings",
) -> StreamedCache:
    """Return a cache in a new file in the first of `folders` that is on a disk and has room for it.

    The file is deleted with the cache, or where a process was killed by the next that makes one in the same folder.
    Raises TrainError where no folder has room.
    """
    size = 2 * shape[0] * shape[1] * shape[2]
    tried = []
    for folder in dict.fromkeys(folders):
        sweep(folder, _KIND)
        why = _against(folder, size)
        if why is None:
            try:
                file, held = _room(folder, size)
                cache = StreamedCache(file, shape, device, keep)
            except OSError as error:
                why = error.strerror or str(error)
            else:
                weakref.finalize(cache, _delete, file, held, os.getpid())
                return cache
        tried.append(f"{folder} ({why})")
    raise TrainError(
        f"{size / 1e9:.1f} GB of {what} do not fit into memory, and nowhere on disk: {', '.join(tried)}; set "
        "TMPDIR to a folder on a local disk with room, or allow more with --max-memory"
    )


def _against(folder: Path, size: int) -> str | None:
    """Say what speaks against a folder."""
    import shutil

    if not folder.is_dir():
        return "not there"
    if _file_system(folder) in _IN_MEMORY:
        return "is memory itself"
    free = shutil.disk_usage(folder).free
    return f"{free / 1e9:.1f} GB free" if free < size + _SPARE else None


def _file_system(folder: Path) -> str:
    import psutil

    kinds = {part.mountpoint: str(part.fstype) for part in psutil.disk_partitions(all=True)}
    above = (folder.resolve(), *folder.resolve().parents)
    return next((kinds[str(each)] for each in above if str(each) in kinds), "")


def _delete(file: Path, held: Held, made_by: int) -> None:
    if os.getpid() == made_by:
        file.unlink(missing_ok=True)
        held.let_go()
