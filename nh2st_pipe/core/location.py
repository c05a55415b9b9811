"""A place where something lies as files: a local folder, or one in an object store (s3://…, gs://…, az://…, memory://…).

Whatever opens, lists, writes or replaces something that may lie in an object store goes through a `Location`. Local
paths keep their fast way: `path` is theirs, None elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.whole import create_whole, written_whole

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

__all__ = ["LEFT_BEHIND", "Location", "Tag"]

LEFT_BEHIND = ".partial"  # how the names of files end that zarr was writing

Tag = bytes | dict[str, str]
"""What tells a file's content from any other it has had: the content itself, or an object store's word for it."""

_HIDDEN = (".", "_")  # what an operating system or a batch system leaves in a folder is not content

_FILES_AT_ONCE = 32


class Location:
    """A folder, local or remote; it need not exist."""

    def __init__(self, where: str | Path | Location) -> None:
        text = str(where)
        self.path: Path | None = None
        if "://" not in text:
            self.path = Path(text).expanduser()
            return
        from nh2st_pipe.core.objects import objects_at

        self._url = text.rstrip("/")
        self._objects = objects_at(self._url)

    def __str__(self) -> str:
        return self._url if self.path is None else str(self.path)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def exists(self) -> bool:
        """Whether there is anything at this place."""
        if self.path is not None:
            return self.path.exists()
        with self._asked():
            return any(len(some) > 0 for some in self._objects.list(chunk_size=1))

    def is_empty(self) -> bool:
        """Whether there is nothing here: hidden files aside, and what a process left that was killed while writing."""
        if self.path is None:
            names: Iterable[str] = self._names("")
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
        return sorted(name for name in self._names(under, folders_only=True) if not name.startswith("."))

    def files(self, under: str) -> dict[str, int]:
        """Return every file below `under` with its size in bytes, by its path relative to `under`."""
        if self.path is not None:
            place = self.path / under
            found = (file for file in place.rglob("*") if file.is_file())
            return {file.relative_to(place).as_posix(): file.stat().st_size for file in found}
        with self._asked():
            there = [meta for some in self._objects.list(prefix=under or None) for meta in some]
        return {str(meta["path"]).removeprefix(under).lstrip("/"): int(meta["size"]) for meta in there}

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError where there is none."""
        return self.read_tagged(name)[0]

    def read_tagged(self, name: str) -> tuple[bytes, Tag]:
        """Return a file's bytes, and what `swap` knows them by. Raises FileNotFoundError where there is none."""
        if self.path is not None:
            data = (self.path / name).read_bytes()
            return data, data
        with self._asked():
            found = self._objects.get(name)
            return bytes(found.bytes()), _tag(found.meta)

    def read_all(self, under: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield every one of the files `names` in `under` with its bytes, in that order."""
        every = list(names)
        if self.path is not None:
            yield from ((name, self.read(f"{under}/{name}")) for name in every)
            return
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="objects") as pool:
            for start in range(0, len(every), _FILES_AT_ONCE):  # so many are in memory
                part = every[start : start + _FILES_AT_ONCE]
                yield from zip(part, pool.map(self.read, [f"{under}/{name}" for name in part]), strict=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of one that is there; its folder exists."""
        if self.path is None:
            with self._asked():
                self._objects.put(name, data)
            return
        with written_whole(self.path / name) as part:
            part.write_bytes(data)

    def write_all(self, under: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Write every one of `files`, names in `under` and their bytes, whole; some at once in an object store."""
        if self.path is not None:
            for name, data in files:
                self.write(f"{under}/{name}", data)
            return
        rest = iter(files)
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="objects") as pool:
            while part := list(islice(rest, _FILES_AT_ONCE)):  # so many are in memory
                list(pool.map(lambda file: self.write(f"{under}/{file[0]}", file[1]), part))

    def create(self, name: str, data: bytes) -> Tag | None:
        """Write a file if there is none, and return what it is known by; None where there was one.

        Of several who try at once, one succeeds.
        """
        if self.path is None:
            return self._put_if(name, data, "create")
        return data if create_whole(self.path / name, data) else None

    def swap(self, name: str, data: bytes, tag: Tag) -> Tag | None:
        """Write a file in place of what is known by `tag`; return what it is known by now.

        None, and nothing is written, where another has been written since, or it is gone. In an object store it does
        so in one step; on a file system whoever calls it holds the lock.
        """
        if self.path is None:
            assert isinstance(tag, dict)
            return self._put_if(name, data, tag)
        try:
            if (self.path / name).read_bytes() != tag:
                return None
        except FileNotFoundError:
            return None
        self.write(name, data)
        return data

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all in it, if it is there."""
        if self.path is not None:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
            return
        with self._asked(), contextlib.suppress(FileNotFoundError):
            below = [str(meta["path"]) for some in self._objects.list(prefix=name) for meta in some]
            self._objects.delete(below or [name])

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
        from zarr.storage import LocalStore, ObjectStore

        if self.path is not None:
            return LocalStore(self.path, read_only=read_only)
        from nh2st_pipe.core.objects import ZarrObjects

        return ZarrObjects(ObjectStore(self._objects, read_only=read_only), str(self), alone_under)

    def _names(self, under: str, *, folders_only: bool = False) -> list[str]:
        """Return the names of what is directly in a folder of an object store; none where it does not exist."""
        with self._asked():
            found = self._objects.list_with_delimiter(under or None)
        paths = [str(path) for path in found["common_prefixes"]]
        if not folders_only:
            paths += [str(meta["path"]) for meta in found["objects"]]
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def _put_if(self, name: str, data: bytes, mode: Any) -> Tag | None:
        """Write an object if what is there is as `mode` says; None where it is not."""
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        try:
            with self._asked():
                try:
                    return _tag(self._objects.put(name, data, mode=mode, use_multipart=False))
                except (AlreadyExistsError, PreconditionError):
                    pass
                except NotSupportedError as error:
                    raise StoreError(
                        f"{self} cannot write an object on a condition (If-None-Match, If-Match), which keeps several "
                        "processes apart; take another object store, or a folder"
                    ) from error
            there, tag = self.read_tagged(name)
        except FileNotFoundError:
            return None
        return tag if there == data else None  # ours: its answer was lost on the way, and it was asked again

    def _asked(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which what the object store refuses is a StoreError."""
        from nh2st_pipe.core.objects import refusals

        return refusals(self)


def _tag(meta: Any) -> Tag:
    return {key: str(meta[key]) for key in ("e_tag", "version") if meta.get(key) is not None}
