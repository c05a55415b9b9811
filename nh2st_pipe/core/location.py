"""A place where something lies as files: a local folder, or an fsspec URL (s3://…, gs://…, memory://…).

Whatever opens, lists, writes or replaces something that may lie in an object store goes through a `Location`. Local
paths keep their fast way: `path` is theirs, None elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nh2st_pipe.core.claims import Claim, FileClaim, ObjectClaim
from nh2st_pipe.core.errors import StoreError, UsageError
from nh2st_pipe.core.whole import written_whole

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = ["LEFT_BEHIND", "Location"]

LEFT_BEHIND = ".partial"  # how the names of files end that zarr was writing

_UNCACHED = {"use_listings_cache": False}  # other processes write there too
_OF_S3 = {"max_concurrency": 1}  # no question of its own for the size of each object: none is large here
_HIDDEN = (".", "_")  # what an operating system or a batch system leaves in a folder is not content

_FILES_AT_ONCE = 64

T = TypeVar("T")


def _options(url: str) -> dict[str, Any]:
    return {**_UNCACHED, **(_OF_S3 if url.startswith(("s3://", "s3a://")) else {})}


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
            self._fs, self._root = fsspec.url_to_fs(text, **_options(text))
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
        return bool(self._ask(self._fs.exists, self._root)) if self.path is None else self.path.exists()

    def is_empty(self) -> bool:
        """Whether there is nothing here: hidden files aside, and what a process left that was killed while writing."""
        if self.path is None:
            names: Iterable[str] = (name for name, _ in self._listed(self._root))
        elif not self.path.is_dir():
            return not self.path.exists()
        else:
            names = (entry.name for entry in self.path.iterdir())
        return all(name.startswith(_HIDDEN) or name.endswith(LEFT_BEHIND) for name in names)

    def folders(self, under: str) -> list[str]:
        """Return the names of the folders in `under`, sorted; none where it does not exist."""
        if self.path is not None:
            place = self.path / under
            entries = place.iterdir() if place.is_dir() else ()
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        there = self._listed(f"{self._root}/{under}")
        return sorted(name for name, kind in there if kind == "directory" and not name.startswith("."))

    def files(self, under: str) -> dict[str, int]:
        """Return every file below `under` with its size in bytes, by its path relative to `under`."""
        if self.path is not None:
            place = self.path / under
            found = (file for file in place.rglob("*") if file.is_file())
            return {file.relative_to(place).as_posix(): file.stat().st_size for file in found}
        root = f"{self._root}/{under}"
        try:
            found_there: dict[str, Any] = self._ask(self._fs.find, root, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(root) :].lstrip("/"): int(info["size"]) for name, info in found_there.items()}

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError where there is none."""
        if self.path is not None:
            return (self.path / name).read_bytes()
        data: bytes = self._ask(self._fs.cat_file, f"{self._root}/{name}")
        return data

    def read_all(self, under: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield every one of the files `names` in `under` with its bytes, in that order."""
        every = list(names)
        if self.path is not None:
            yield from ((name, self.read(f"{under}/{name}")) for name in every)
            return
        for start in range(0, len(every), _FILES_AT_ONCE):
            part = every[start : start + _FILES_AT_ONCE]
            paths = [f"{self._root}/{under}/{name}" for name in part]
            read = self._ask(self._fs.cat_ranges, paths, None, None, on_error="raise")
            yield from zip(part, read, strict=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of one that is there; its folder exists."""
        if self.path is None:
            self._put(name, data, "overwrite")
            return
        with written_whole(self.path / name) as part:
            part.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file if there is none, and say whether that was so. Of several who try at once, one succeeds."""
        if self.path is None:
            try:
                self._put(name, data, "create")
            except FileExistsError:
                return False
            return True
        try:
            with (self.path / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all in it, if it is there."""
        if self.path is not None:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
        elif self._ask(self._fs.exists, f"{self._root}/{name}"):
            with contextlib.suppress(FileNotFoundError):
                self._ask(self._fs.rm, f"{self._root}/{name}", recursive=True)

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

    def zarr_store(self, *, read_only: bool = False, alone_under: str | None = None) -> ZarrStore:
        """Return zarr's own store for this place; nobody else writes to the folder `alone_under` while it is in use."""
        from zarr.storage import FsspecStore, LocalStore

        if self.path is not None:
            return LocalStore(self.path, read_only=read_only)
        from nh2st_pipe.core.steady import SteadyStore

        store = FsspecStore.from_url(self._url, storage_options=_options(self._url), read_only=read_only)
        return SteadyStore(store, str(self), alone_under)

    def claim(self, name: str) -> Claim:
        """Return the claim on `name`, not yet taken."""
        return ObjectClaim(self, name) if self.path is None else FileClaim(self.path, name)

    def _listed(self, place: str) -> list[tuple[str, str]]:
        """Return name and type of what is in a folder of an object store; nothing where it does not exist."""
        try:
            found = self._ask(self._fs.ls, place, detail=True)
        except FileNotFoundError:
            return []
        names = [(entry["name"].rstrip("/").rsplit("/", 1)[-1], str(entry["type"])) for entry in found]
        return [(name, kind) for name, kind in names if name != place.rsplit("/", 1)[-1] or kind == "directory"]

    def _put(self, name: str, data: bytes, mode: str) -> None:
        try:
            self._ask(self._fs.pipe_file, f"{self._root}/{name}", data, mode=mode)
        except FileNotFoundError as error:  # no such bucket
            raise StoreError(f"{self}: {error}") from error

    def _ask(self, what: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Ask the object store; what it refuses is asked again, and then a StoreError."""
        from nh2st_pipe.core.steady import steady

        return steady(self, lambda: what(*arguments, **options))
