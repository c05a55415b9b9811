"""A place where something lies as files: a local folder, or an fsspec URL (s3://…, gs://…, memory://…).

Whatever opens, lists, writes or replaces something that may lie in an object store goes through a `Location`. Local
paths keep their fast way: `path` is theirs, None elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.core.whole import written_whole

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = ["LEFT_BEHIND", "Claim", "Location"]

LEFT_BEHIND = ".partial"  # how the names of files end that zarr was writing

_CLAIMS = ".claims"
_HIDDEN = (".", "_")  # what an operating system or a batch system leaves in a folder is not content


class Location:
    """A folder, local or remote; it need not exist."""

    def __init__(self, where: str | Path | Location) -> None:
        text = str(where)
        self.path: Path | None = None
        if "://" not in text:
            self.path = Path(text).expanduser()
            return
        import fsspec

        try:
            self._fs, self._root = fsspec.url_to_fs(text)
        except ImportError as error:
            raise UsageError(
                f"{text}: {error}; pip install 'nh2st-pipe[cloud]' brings what object stores need"
            ) from error
        except ValueError as error:
            raise UsageError(f"{text} is no place this installation can open: {error}") from error
        self._url = text.rstrip("/")

    def __str__(self) -> str:
        return self._url if self.path is None else str(self.path)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def exists(self) -> bool:
        """Whether there is anything at this place."""
        return bool(self._fs.exists(self._root)) if self.path is None else self.path.exists()

    def is_empty(self) -> bool:
        """Whether there is nothing here, hidden files aside."""
        if self.path is None:
            return not self.exists() or not self._fs.find(self._root)
        if not self.path.is_dir():
            return not self.path.exists()
        return not any(not entry.name.startswith(_HIDDEN) for entry in self.path.iterdir())

    def folders(self, under: str) -> list[str]:
        """Return the names of the folders in `under`, sorted; none where it does not exist."""
        if self.path is not None:
            place = self.path / under
            entries = place.iterdir() if place.is_dir() else ()
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        place_url = f"{self._root}/{under}"
        if not self._fs.exists(place_url):
            return []
        listed = self._fs.ls(place_url, detail=True)
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in listed if entry["type"] == "directory")

    def files(self, under: str) -> dict[str, int]:
        """Return every file below `under` with its size in bytes, by its path relative to `under`."""
        if self.path is not None:
            place = self.path / under
            found = (file for file in place.rglob("*") if file.is_file())
            return {file.relative_to(place).as_posix(): file.stat().st_size for file in found}
        root = f"{self._root}/{under}"
        found_there: dict[str, Any] = self._fs.find(root, detail=True)
        return {name[len(root) :].lstrip("/"): int(info["size"]) for name, info in found_there.items()}

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError where there is none."""
        if self.path is not None:
            return (self.path / name).read_bytes()
        data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of one that is there; its folder exists."""
        if self.path is None:
            self._fs.pipe_file(f"{self._root}/{name}", data)
            return
        with written_whole(self.path / name) as part:
            part.write_bytes(data)

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all in it, if it is there."""
        if self.path is not None:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
        elif self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def sweep(self, under: str, *, deep: bool, older_than_s: float = 0.0) -> None:
        """Delete what writes that were cut short left in the folder `under` (all below it if `deep`) of a local path.

        Zarr writes a file beside its place and moves it there; a process that is killed in between leaves it. One
        that is still being written by another process is younger than `older_than_s`.
        """
        if self.path is None:
            return
        place, now = self.path / under, time.time()
        for left in (place.rglob if deep else place.glob)(f"*{LEFT_BEHIND}"):
            with contextlib.suppress(FileNotFoundError):
                if left.is_file() and now - left.stat().st_mtime >= older_than_s:
                    left.unlink()

    def zarr_store(self, *, read_only: bool = False) -> ZarrStore:
        """Return zarr's own store for this place."""
        from zarr.storage import FsspecStore, LocalStore

        if self.path is not None:
            return LocalStore(self.path, read_only=read_only)
        return FsspecStore.from_url(self._url, read_only=read_only)

    def claim(self, name: str) -> Claim:
        """Return the claim on `name`, not yet taken."""
        return Claim(self, name)


class Claim:
    """The right to write one thing at a place, held by one process at a time.

    On a local path the kernel keeps it (`filelock`), and it ends with the process, however that ends. Elsewhere there
    is nothing to keep it with: it is always given, and one process at a time should write.
    """

    def __init__(self, where: Location, name: str) -> None:
        self._lock: Any = None
        if where.path is not None:
            from filelock import FileLock

            folder = where.path / _CLAIMS
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / f"{name}.lock", thread_local=False)

    def take(self, *, wait: bool = False) -> bool:
        """Take the claim if nobody holds it, or when nobody does any more; say whether it was taken."""
        if self._lock is None:
            return True
        from filelock import Timeout

        try:
            self._lock.acquire(blocking=wait)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Give the claim back; nothing where it is not held."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Claim:
        self.take(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
