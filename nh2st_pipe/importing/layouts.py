"""The layouts that are known, ours and those that packages bring along, and which of them a folder has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import h5py

from nh2st_pipe.core.errors import SlideError, UsageError, listed, nearest, reason_of
from nh2st_pipe.importing.atlaspatch import AtlasPatch
from nh2st_pipe.importing.clam import CLAM
from nh2st_pipe.importing.found import Layout, Look
from nh2st_pipe.importing.gigapath import GigaPath
from nh2st_pipe.importing.hest import HEST
from nh2st_pipe.importing.histoencoder import HistoEncoder
from nh2st_pipe.importing.reading import h5_file
from nh2st_pipe.importing.slide2vec import Slide2Vec
from nh2st_pipe.importing.stamp import STAMP
from nh2st_pipe.importing.trident import TRIDENT
from nh2st_pipe.importing.zarrs import LazySlide, TIAToolbox
from nh2st_pipe.recipes import plugins

__all__ = ["layout_of", "layouts", "look_at"]

_FILES, _NAMES, _DEPTH = 12, 4000, 3


@cache
def layouts() -> dict[str, Layout]:
    """Return the layouts by name, in the order in which a folder is held against them: the surest first. Packages
    register theirs as a class, or whatever gives a Layout when it is called.

    Raises UsageError where a package's is broken, or called as one of ours.
    """
    ours: list[Layout] = [LazySlide(), STAMP(), AtlasPatch(), HEST(), TRIDENT(), Slide2Vec(), HistoEncoder()]
    found: dict[str, Layout] = {each.name: each for each in [*ours, TIAToolbox(), GigaPath(), CLAM()]}
    for name in plugins.registered(plugins.FEATURES, found):
        plugged = plugins.plugged(plugins.FEATURES, name, found)
        assert plugged is not None
        found[name] = _made(plugged, name)
    return found


def _made(plugged: plugins.Plugged, name: str) -> Layout:
    """Return a package's layout. Raises UsageError where it is none."""
    try:
        made: Layout = plugged.what()
    except Exception as error:
        raise UsageError(f"layout '{name}' of {plugged.source} cannot be made: {reason_of(error)}") from error
    lacking = [each for each in ("knows", "find") if not callable(getattr(made, each, None))]
    if lacking:
        raise UsageError(f"layout '{name}' of {plugged.source} has no {listed(lacking)}; see CONTRIBUTING.md")
    return made


def layout_of(folder: Path, name: str = "auto") -> Layout:
    """Return the layout called `name`, or the one that the folder has. Raises UsageError where there is none."""
    known = layouts()
    if name != "auto":
        if name not in known:
            raise UsageError(f"--from {name}: it is one of {', '.join(known)}{nearest(name, known)}")
        return known[name]
    look = look_at(folder)
    for layout in known.values():
        if layout.knows(look):
            return layout
    raise UsageError(
        f"{folder} looks like nothing that is known here ({', '.join(known)}): it holds "
        f"{listed(sorted(look.names)) or 'nothing'}. Is it the folder with the features? --from says whose they are; "
        "nh2st_pipe.write_store takes arrays"
    )


def look_at(folder: Path) -> Look:
    """Take a first look at a folder. Raises UsageError where there is none."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    names, files = set[str](), dict[Path, list[Path]]()
    for path in _below(folder, _DEPTH):
        names.add(path.name)
        if path.suffix == ".h5":
            files.setdefault(path.parent, []).append(path)
        if len(names) > _NAMES:
            break
    some = [path for each in sorted(files) for path in sorted(files[each])[:2]][:_FILES]
    return Look(folder, tuple(_keys(path) for path in some), frozenset(names))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if depth > 1 and path.is_dir() and path.suffix != ".zarr":
            yield from _below(path, depth - 1)


def _keys(path: Path) -> tuple[Path, frozenset[str], frozenset[str]]:
    """Return the names at the root of an HDF5 file, those of groups with / behind; none where it is damaged."""
    try:
        with h5_file(path) as file:
            keys = frozenset(name + "/" * isinstance(file[name], h5py.Group) for name in file)
            attrs = set(file.attrs)
            if "coords" in keys:
                attrs |= set(file["coords"].attrs)
            return path, keys, frozenset(attrs)
    except SlideError:
        return path, frozenset(), frozenset()
