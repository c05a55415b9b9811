"""slide2vec: `tile_embeddings/<slide>.pt` or `.npz`, each with a `.meta.json`, and coordinates in `tiles/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError, fault_of
from nh2st_pipe.core.memory import require
from nh2st_pipe.importing.found import Asked, Features, Found, Look, Places, Section, Values
from nh2st_pipe.importing.reading import tensor_of

__all__ = ["Slide2Vec"]

_META = ".meta.json"


class Slide2Vec:
    """See Layout."""

    name = "slide2vec"

    def knows(self, look: Look) -> bool:
        """See Layout."""
        return "tile_embeddings" in look.names or (
            look.folder.name == "tile_embeddings" and any(name.endswith(_META) for name in look.names)
        )

    def find(self, folder: Path, asked: Asked) -> Found:
        """See Layout."""
        root = folder.parent if folder.name == "tile_embeddings" else folder
        sections, vectors = list[Section](), dict[str, dict[str, Callable[[], NDArray[np.float32]]]]()
        for path in sorted((root / "tile_embeddings").rglob("*")):
            if path.suffix not in (".pt", ".npz"):
                continue
            beside = path.with_suffix(_META)
            meta = _meta(beside) if beside.is_file() else {}
            encoder = meta.get("encoder_name")
            opened = partial(_opened, path, beside, root, asked)
            sections.append(Section(path.stem, path, None if encoder is None else str(encoder), opened))
        for path in sorted((root / "slide_embeddings").glob("*.pt")):
            meta = _meta(path.with_suffix(_META)) if path.with_suffix(_META).is_file() else {}
            vectors.setdefault(path.stem, {})[str(meta.get("encoder_name") or "slide2vec")] = partial(_vector, path)
        return Found("slide2vec", tuple(sections), vectors)


def _vector(path: Path) -> NDArray[np.float32]:
    return np.asarray(tensor_of(path), np.float32).ravel()


def _meta(path: Path) -> dict[str, Any]:
    with fault_of(SlideError, f"{path} cannot be used"):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise SlideError(f"{path} should hold an object of JSON, and holds {type(found).__name__}")
    return found


@contextmanager
def _opened(path: Path, beside: Path, root: Path, asked: Asked) -> Iterator[Features]:
    if not beside.is_file():
        raise SlideError(f"{path} has no {beside.name} beside it, which slide2vec writes last: it is unfinished")
    meta = _meta(beside)
    places, mpp = _places(_coordinates(meta, path, root, asked), meta)
    yield Features(_values(path), places, mpp=mpp)


def _values(path: Path) -> Values:
    if path.suffix == ".pt":
        return tensor_of(path)
    return _arrays(path)["features"]


def _coordinates(meta: dict[str, Any], path: Path, root: Path, asked: Asked) -> Path:
    """Return the file of a slide's coordinates: where its note says, or where slide2vec lays it."""
    within = path.parent.relative_to(root / "tile_embeddings")
    name = f"{path.stem}.coordinates.npz"
    said = meta.get("coordinates_npz_path")
    places = [asked.coords / name] if asked.coords else []
    places += [root / "tiles" / within / name, root / "tiles" / name, *([Path(str(said))] if said else [])]
    found = next((each for each in places if each.is_file()), None)
    if found is None:
        raise SlideError(f"{path} has no coordinates: there is no {places[0]}; --coords says where that folder is")
    return found


def _places(path: Path, meta: dict[str, Any]) -> tuple[Places, float | None]:
    arrays = _arrays(path)
    if not {"x", "y"} <= arrays.keys():
        raise SlideError(f"{path} holds {', '.join(arrays) or 'nothing'}; x and y are expected")
    side, mpp = meta.get("tile_size_lv0"), None
    beside = path.with_name(path.name.removesuffix(".npz") + _META)
    if beside.is_file():
        said = _meta(beside)
        tiling, slide = said.get("tiling") or {}, said.get("slide") or {}
        side = side or tiling.get("tile_size_lv0")
        mpp = slide.get("spacing_at_level_0")
    xy = np.column_stack((arrays["x"], arrays["y"])).astype(np.float64)
    return Places(xy, None if side is None else float(side)), None if mpp is None else float(mpp)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    require(path.stat().st_size, f"{path}")
    with fault_of(SlideError, f"{path} cannot be used"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
