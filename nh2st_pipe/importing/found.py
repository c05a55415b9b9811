"""What an importer finds: sections of slides with their features, and where the tiles of those lie.

A layout yields `Found` from a folder; everything after that is the same for every tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Asked", "Features", "Found", "Layout", "Look", "Places", "Section", "Values"]

Unit = Literal["level-0 px", "µm", "px as read"]
Corner = Literal["corner", "centre"]


class Values(Protocol):
    """Rows of features, of which a part is read at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and values of each."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type in which they are stored."""
        ...

    def __getitem__(self, rows: slice) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Places:
    """Where tiles lie, as a tool's file says it."""

    xy: NDArray[np.float64]
    """n × 2, x then y, in `unit`."""
    side: float | None
    """Of a tile, in `unit` (of level 0 where that is px as read and `of_level0`); None where no file tells."""
    unit: Unit = "level-0 px"
    of: Corner = "corner"
    """What `xy` is of a tile: its top-left corner or its centre."""
    side_um: float | None = None
    """Of a tile, µm, where that is all that is known."""


@dataclass(frozen=True)
class Features:
    """The features of one slide, open for reading."""

    values: Values
    """n × d."""
    places: Places
    barcodes: list[str] | None = None
    """Names of spots, where each row belongs to one."""
    mpp: float | None = None
    """µm per level-0 px that the tool took."""
    size: tuple[int, int] | None = None
    """Of the slide, level-0 px, as the tool saw it."""
    assumed: tuple[str, ...] = ()
    """What of this no file tells, in words."""


@dataclass(frozen=True)
class Section:
    """One slide's features in a folder."""

    name: str
    """The slide, as the tool calls it: its file's name, mostly without what follows the dot."""
    path: Path
    """The file that the features are in."""
    encoder: str | None
    """What the tool calls it; None where no file tells."""
    open: Callable[[], AbstractContextManager[Features]]
    """Open it. Raises SlideError where the files are not what the tool writes."""
    version: str = ""
    """Of the tool."""


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    tool: str
    sections: tuple[Section, ...]
    vectors: Mapping[str, Mapping[str, Callable[[], NDArray[np.float32]]]] = field(default_factory=dict)
    """Vectors of whole slides: by the slide's name, then by the encoder's."""


@dataclass(frozen=True)
class Asked:
    """What a person says of features, where their files do not."""

    coords: Path | None = None
    """Folder of the files in which coordinates and tile sizes are, where that is another."""
    tile_um: float | None = None
    tile_px: float | None = None
    """Side of a tile, level-0 px."""
    mpp_read: float | None = None
    """µm per px at which tiles were read, where coordinates are in such px."""


@dataclass(frozen=True)
class Look:
    """A first look at a folder: what tells tools apart."""

    folder: Path
    h5: tuple[tuple[Path, frozenset[str], frozenset[str]], ...]
    """Of some HDF5 files: path, names of the datasets and groups at their root, and the attributes there and at the
    coordinates."""
    names: frozenset[str]
    """Names of files and folders, to a depth of three."""


class Layout(Protocol):
    """How one tool lays its features down."""

    name: str
    """By which `--from` knows it."""

    def knows(self, look: Look) -> bool:
        """Whether a folder looks like this tool's."""

    def find(self, folder: Path, asked: Asked) -> Found:
        """Return what the folder holds. Raises UsageError for what its files do not tell and nobody has said."""
