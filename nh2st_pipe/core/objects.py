"""Object stores, through `obstore`: opened by URL, their refusals in words, and as zarr sees them.

What is refused for the moment (429, 500, 503, a connection that breaks) the library asks again by itself, with pauses
that grow, for three minutes at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import google_crc32c
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import ObjectStore, WrapperStore

from nh2st_pipe.core.errors import NH2STError, StoreError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Objects

__all__ = ["RETRIES", "ZarrObjects", "objects_at", "refusals"]

RETRIES: dict[str, Any] = {}
"""How what is refused for the moment is asked again; what is not said is as the library has it."""

_IN_MEMORY: dict[str, MemoryStore] = {}
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")


def objects_at(url: str) -> Objects:
    """Open the place of `url` (s3://, gs://, az://; memory:// within one process). Raises UsageError where none can be.

    Credentials and endpoint are those of the environment; of profiles in ~/.aws too where boto3 is installed.
    """
    if url.startswith("memory://"):
        return _IN_MEMORY.setdefault(url, MemoryStore())
    options: dict[str, Any] = {"client_options": {"allow_http": True}}
    if RETRIES:
        options["retry_config"] = RETRIES
    if url.startswith(("s3://", "s3a://")) and not any(os.environ.get(key) for key in _KEYS):
        with contextlib.suppress(ImportError, ValueError):  # no boto3, or no profile of its
            from obstore.auth.boto3 import Boto3CredentialProvider

            options["credential_provider"] = Boto3CredentialProvider()
    try:
        return from_url(url, **options)
    except (BaseError, ValueError, OSError) as error:
        raise UsageError(f"{url} is no place this installation can open: {_words(error)}") from error


@contextlib.contextmanager
def refusals(where: object) -> Iterator[None]:
    """Raise what the object store `where` refuses for good as StoreError; that something is not there stays so."""
    try:
        yield
    except (FileNotFoundError, NH2STError):
        raise
    except BaseError as error:
        raise StoreError(f"{where}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    """Return what an object store says, in one line: its own message where its answer has one."""
    text = str(error).partition("Debug source")[0]
    answer = text.partition("<Message>")[2].partition("</Message>")[0]
    code = text.partition("<Code>")[2].partition("</Code>")[0]
    if answer or code:
        return f"{answer or code} ({code})" if answer and code else answer or code
    return " ".join(text.split())[:300] or type(error).__name__


class ZarrObjects(WrapperStore[ObjectStore[Any]]):
    """zarr's store of an object store, whose refusals are StoreErrors.

    With `alone_under`, nobody else writes in that folder while this object is in use: what zarr asks for hundreds of
    times there and above it, which groups and arrays there are, is asked of the object store once.
    """

    def __init__(
        self,
        store: ObjectStore[Any],
        where: str,
        alone_under: str | None = None,
        written: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(store)
        self._where, self._alone_under = where, alone_under
        self._known: dict[str, Buffer | None] = {}
        self.written: dict[str, tuple[int, int]] = {} if written is None else written
        """Size and CRC-32C of what was written in that folder by this object, by key: nobody needs to read it back."""

    def _with_store(self, store: ObjectStore[Any]) -> ZarrObjects:
        return type(self)(store, self._where, self._alone_under, self.written)

    def _note(self, key: str, value: Buffer | None) -> None:
        if self._alone_under is None or not key.startswith(f"{self._alone_under}/"):
            return
        if value is None:
            self.written.pop(key, None)
        else:
            data = value.to_bytes()
            self.written[key] = len(data), google_crc32c.value(data)

    def _is_mine(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        if self._alone_under is None or name != "zarr.json":
            return False
        inside, above = key.startswith(f"{self._alone_under}/"), f"{self._alone_under}/".startswith(f"{folder}/")
        return inside or above or not folder

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's Store."""
        if self._is_mine(key) and byte_range is None and key in self._known:
            return self._known[key]
        with refusals(self._where):
            found = await self._store.get(key, prototype, byte_range)
        if self._is_mine(key) and byte_range is None:
            self._known[key] = found
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """See zarr's Store."""
        with refusals(self._where):
            return await self._store.get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        """See zarr's Store."""
        if self._is_mine(key):
            return await self.get(key, default_buffer_prototype()) is not None
        with refusals(self._where):
            return await self._store.exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """See zarr's Store."""
        self._note(key, None)  # until it is there
        with refusals(self._where):
            await self._store.set(key, value)
        self._note(key, value)
        if self._is_mine(key):
            self._known[key] = value

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """See zarr's Store."""
        if self._is_mine(key) and await self.exists(key):
            return
        self._note(key, None)  # another's may be there
        with refusals(self._where):
            await self._store.set_if_not_exists(key, value)
        if self._is_mine(key):
            self._known[key] = value

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """See zarr's Store."""
        self._known.pop(key, None)
        self._note(key, None)
        with refusals(self._where):
            await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """See zarr's Store."""
        self._known.clear()
        for key in [key for key in self.written if key.startswith(f"{prefix.rstrip('/')}/")]:
            del self.written[key]
        with refusals(self._where):
            await self._store.delete_dir(prefix)

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)
