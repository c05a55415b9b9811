"""The files of a slide, held against the list that was written with its completion mark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from nh2st_pipe.core.location import LEFT_BEHIND, Location
from nh2st_pipe.store.elements import consolidated
from nh2st_pipe.store.format import crc32c

__all__ = ["SlideFiles", "faults_of", "list_files"]

# Chunks that carry a checksum of their own, which is checked as they are decoded; they are the bulk of a store.
_CHECKED_WHEN_READ = re.compile(r"embedding/(X|obsm/views)/c/|expression/X/(data|indices|indptr)/c/")
_METADATA = "/zarr.json"
_OWN_RECORD = "zarr.json"  # holds the list, and a checksum of itself


class SlideFiles:
    """The folder of a slide, to be written into; what is known of its files need not be read back."""

    def __init__(self, location: Location, folder: str) -> None:
        self._location, self._folder = location, folder
        self._documents: dict[str, bytes] = {}
        self.listed: dict[str, tuple[int, str]] = {}
        """Size and CRC-32C of what was written here, by name."""

    def lay(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write files, in place of those that are there."""

        def noted() -> Iterator[tuple[str, bytes]]:
            for name, data in files:
                self.listed[name] = len(data), crc32c(data)
                if name.endswith(_METADATA):
                    self._documents[name] = data
                yield name, data

        self._location.write_all(self._folder, noted())

    def consolidate(self, groups: Iterable[str]) -> None:
        """Gather in each group's metadata those of all below it; a group that is not there has none."""
        there = self._location.files(self._folder)
        for name in groups:
            names = [file for file in there if file.startswith(f"{name}/") and file.endswith(_METADATA)]
            unread = [file for file in names if file not in self._documents]
            self._documents |= self._location.read_all(self._folder, unread)
            if names:
                documents = {file.removeprefix(f"{name}/"): self._documents[file] for file in names}
                self.lay([(f"{name}{_METADATA}", consolidated(documents))])


def list_files(
    location: Location, folder: str, known: Mapping[str, tuple[int, str]] | None = None
) -> dict[str, tuple[int, str]]:
    """Return every file below a slide's folder, with its size and CRC-32C, but for the record that holds the list.

    Those that are `known` are not read again. Hidden files are an operating system's, and come and go.
    """
    known = known or {}
    names = [
        name
        for name in sorted(location.files(folder))
        if name != _OWN_RECORD and not name.endswith(LEFT_BEHIND) and not name.rpartition("/")[2].startswith(".")
    ]
    unread = [name for name in names if name not in known]
    read = {name: (len(data), crc32c(data)) for name, data in location.read_all(folder, unread)}
    return {name: known[name] if name in known else read[name] for name in names}


def faults_of(location: Location, folder: str, listed: Mapping[str, tuple[int, str]], *, deep: bool) -> list[str]:
    """Return in words what differs from the list: files that are gone, cut or changed.

    All are read where `deep`; else those whose chunks carry a checksum of their own are left to whoever reads them.
    """
    there = location.files(folder)
    faults = []
    for name, (size, checksum) in listed.items():
        if name not in there:
            faults.append(f"{name} is missing")
        elif there[name] != size:
            faults.append(f"{name} has {there[name]:,} bytes and was written with {size:,}")
        elif (deep or not _CHECKED_WHEN_READ.match(name)) and crc32c(location.read(f"{folder}/{name}")) != checksum:
            faults.append(f"{name} has changed since it was written")
    return faults
