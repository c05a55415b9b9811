"""What is asked of an object store, asked again where it failed, and put into words where it goes on failing.

Networks and object stores refuse something now and then. What they refuse for good (no access, no such bucket, no
credentials) is not asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import FsspecStore, WrapperStore

from nh2st_pipe.core.errors import NH2STError, StoreError

__all__ = ["SteadyStore", "steady"]

_PAUSES = (0.5, 2.0, 6.0)  # s, before it is asked again
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, KeyError, NH2STError)
_FOR_GOOD = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "PermissionError", "ImportError")

T = TypeVar("T")


def steady(where: object, what: Callable[[], T]) -> T:
    """Return what `what` does, tried four times. Raises StoreError naming `where` where none of them succeeds.

    That something is not there, or is there already, is an answer, and is raised as it is.
    """
    for pause in (*_PAUSES, None):
        try:
            return what()
        except _ANSWERS:
            raise
        except Exception as error:
            if pause is None or _for_good(error):
                raise _refused(where, error) from error
            time.sleep(pause)
    raise AssertionError


async def _steadily(where: object, what: Callable[[], Awaitable[T]]) -> T:
    for pause in (*_PAUSES, None):
        try:
            return await what()
        except _ANSWERS:
            raise
        except Exception as error:
            if pause is None or _for_good(error):
                raise _refused(where, error) from error
            await asyncio.sleep(pause)
    raise AssertionError


def _for_good(error: Exception) -> bool:
    return any(kind.__name__ in _FOR_GOOD for kind in type(error).__mro__)


def _refused(where: object, error: Exception) -> StoreError:
    cause = " ".join(str(error).split())[:200] or type(error).__name__
    return StoreError(f"{where}: {cause}")


class SteadyStore(WrapperStore[FsspecStore]):
    """zarr's store for an object store, asked again where it failed.

    With `alone_under`, nobody else writes in that folder while this object is in use: what zarr asks for hundreds of
    times there and above it, which groups and arrays there are, is asked of the object store once.
    """

    def __init__(self, store: FsspecStore, where: str, alone_under: str | None = None) -> None:
        super().__init__(store)
        self._where, self._alone_under = where, alone_under
        self._known: dict[str, Buffer | None] = {}

    def _with_store(self, store: FsspecStore) -> SteadyStore:
        return type(self)(store, self._where, self._alone_under)

    def _is_mine(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        if self._alone_under is None or name != "zarr.json":
            return False
        inside, above = key.startswith(f"{self._alone_under}/"), f"{self._alone_under}/".startswith(f"{folder}/")
        return inside or above or not folder

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's Store."""
        if not self._is_mine(key) or byte_range is not None:
            return await self._steadily(lambda: self._store.get(key, prototype, byte_range))
        if key not in self._known:
            self._known[key] = await self._steadily(lambda: self._store.get(key, prototype))
        return self._known[key]

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """See zarr's Store."""
        ranges = list(key_ranges)
        return await self._steadily(lambda: self._store.get_partial_values(prototype, ranges))

    async def exists(self, key: str) -> bool:
        """See zarr's Store."""
        if self._is_mine(key):
            return await self.get(key, default_buffer_prototype()) is not None
        return await self._steadily(lambda: self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        """See zarr's Store."""
        await self._steadily(lambda: self._store.set(key, value))
        if self._is_mine(key):
            self._known[key] = value

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """See zarr's Store."""
        if not self._is_mine(key):
            await self._steadily(lambda: self._store.set_if_not_exists(key, value))
        elif not await self.exists(key):
            await self.set(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    async def delete(self, key: str) -> None:
        """See zarr's Store."""
        self._known.pop(key, None)
        await self._steadily(lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """See zarr's Store."""
        self._known.clear()
        await self._steadily(lambda: self._store.delete_dir(prefix))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def _steadily(self, what: Callable[[], Awaitable[T]]) -> T:
        return await _steadily(self._where, what)
