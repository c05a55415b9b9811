"""Stores that are searched together, as if they were one.

A slide is known by its name; where several stores have one of that name, by NAME@STORE.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nh2st_pipe.core.errors import StoreError, UsageError, listed
from nh2st_pipe.core.location import Location
from nh2st_pipe.store.format import Contract, SlideRecord, crc32c
from nh2st_pipe.store.read import SlideData, Store, open_store

__all__ = ["Stores", "together"]


class Stores:
    """Stores of the same encoder, weights and tiles. Raises StoreError where they are not, UsageError for none."""

    def __init__(self, stores: Sequence[Store]) -> None:
        if not stores:
            raise UsageError("name a store to be searched")
        places = [str(store.location) for store in stores]
        twice = [place for place, count in Counter(places).items() if count > 1]
        if twice:
            raise UsageError(f"{listed(twice)} is named twice")
        first, *others = stores
        for other in others:
            differs = first.contract.differences(other.contract, one_store=False)
            if differs or first.contract.across(other.contract):
                why = "; ".join(differs) or f"{first.contract.made_by()}, not {other.contract.made_by()}"
                raise StoreError(
                    f"{first.location} and {other.location} cannot be searched together, their embeddings differ: {why}"
                )
        self._stores = tuple(stores)
        self._of = _named(stores)

    @property
    def location(self) -> Location:
        """The first one's."""
        return self._stores[0].location

    @property
    def contract(self) -> Contract:
        """The first one's."""
        return self._stores[0].contract

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self._stores) > 1

    @property
    def identity(self) -> str:
        """What their index is of: the same whatever order they are named in."""
        contracts = (store.contract.attributes() for store in self._stores)
        return min(crc32c(json.dumps(each, sort_keys=True, default=str).encode()) for each in contracts)

    @property
    def first(self) -> Store:
        """The one that is named first."""
        return self._stores[0]

    def slides(self) -> list[str]:
        """Return the names of all complete slides."""
        return list(self._of)

    def store_of(self, name: str) -> Store:
        """Return the store that a slide is in."""
        return self._of[name][0]

    def record(self, name: str) -> SlideRecord | None:
        """Return what its store says of a slide."""
        store, slide_id = self._of[name]
        return store.record(slide_id)

    def read(self, name: str) -> SlideData:
        """Return a slide with its first view."""
        store, slide_id = self._of[name]
        return store.read(slide_id, first_view_only=True)

    def file(self, name: str, inside: str) -> bytes:
        """Return a file of a slide. Raises FileNotFoundError."""
        store, slide_id = self._of[name]
        return store.location.read(f"slides/{slide_id}/{inside}")


def together(stores: str | Path | Store | Stores | Sequence[str | Path]) -> Stores:
    """Open one or several stores."""
    if isinstance(stores, Stores):
        return stores
    if isinstance(stores, Store):
        return Stores([stores])
    return Stores([open_store(each) for each in ([stores] if isinstance(stores, (str, Path)) else stores)])


def _named(stores: Sequence[Store]) -> dict[str, tuple[Store, str]]:
    names = [str(store.location).rstrip("/").rpartition("/")[2].removesuffix(".zarr") for store in stores]
    labels = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    every = [
        (store, label, slide_id) for store, label in zip(stores, labels, strict=True) for slide_id in store.slides()
    ]
    count = Counter(slide_id for _, _, slide_id in every)
    return {
        slide_id if count[slide_id] == 1 else f"{slide_id}@{label}": (store, slide_id)
        for store, label, slide_id in every
    }
