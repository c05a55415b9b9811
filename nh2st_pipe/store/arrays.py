"""A store from arrays: embeddings that exist already, written as `embed` would have written them.

`write_store` is for whoever has arrays in Python; `lay_down` for whatever brings slides whose embeddings are there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RecipeError, SlideError, StoreError, UsageError, listed, nearest
from nh2st_pipe.core.location import Location
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision, load_encoder_recipe
from nh2st_pipe.store.format import Contract, ImageSource, Imported, ManifestRow, Picture, Resolved, WeightsOf
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.neighbours import nearest_spots
from nh2st_pipe.tiles.options import GridOptions
from nh2st_pipe.tiles.spots import Spots

__all__ = ["UNKNOWN", "Laid", "SlideArrays", "Written", "encoder_named", "in_half", "lay_down", "write_store"]

UNKNOWN = "unknown"
"""SHA-256 of weights that no file tells."""

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")
_NEIGHBOURS = 9
_PICTURE_PX = 768
_BLOCK_TILES = 4096
_LARGEST = float(np.finfo(np.float16).max)
_PAPER, _TILE = (255, 255, 255), (222, 196, 214)


@dataclass(frozen=True)
class SlideArrays:
    """One slide whose embeddings are in memory. n tiles, V views, d values, g genes.

    Only slide_id, features and xy have to be given.
    """

    slide_id: str
    features: NDArray[Any]
    """n × d, or n × 8 × d: of the eight dihedral views, view 0 as the tile lies."""
    xy: NDArray[np.float64]
    """n × 2: centres of the tiles, level-0 px, x then y."""
    mpp: float | None = None
    """µm per level-0 px."""
    tile_level0_px: float | None = None
    """Side of a tile; left out it follows from tile_um and mpp."""
    size: tuple[int, int] | None = None
    """Width and height of the slide, level-0 px; left out, as far as its tiles reach."""
    patient: str | None = None
    """Default: the slide_id."""
    counts: Any = None
    """n × g raw counts of the tiles' spots, sparse or not."""
    genes: list[str] | None = None
    barcodes: list[str] | None = None
    """Names of the tiles; default: their place."""
    array_row: NDArray[np.int64] | None = None
    array_col: NDArray[np.int64] | None = None
    picture: NDArray[np.uint8] | None = None
    """h × w × 3: the slide, made smaller; left out, its tiles are drawn."""
    slide_embeddings: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Vectors of the whole slide, by the names of their encoders."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further columns, as those of a manifest."""


@dataclass
class Written:
    """What a call wrote."""

    store: str
    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Slides that were there already, the same."""
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Laid:
    """A slide whose embeddings are there already, and all that a store keeps of it."""

    row: ManifestRow
    source: ImageSource
    spots: Spots
    resolved: Resolved
    blocks: Callable[[int], Iterator[NDArray[np.float16]]]
    """Embeddings b × V × d of the tiles from a row on, in their order."""
    picture: NDArray[np.uint8]
    spot_px: float
    """How wide a spot is drawn, level-0 px."""
    expression: str | None = None
    """Fingerprint of what the counts are from."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    slide_embeddings: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def lay_down(store: StoreWriter, laid: Laid, *, redo_changed: bool = False) -> bool:
    """Write a slide, under its lease; say whether there was something to do. One that was cut short is gone on with.

    Raises SlideError where a complete slide of another source is there, unless `redo_changed`, and where a vector of
    the slide is none.
    """
    slide_id = laid.row.slide_id
    for name, vector in laid.slide_embeddings.items():
        if not _NAME.fullmatch(name):
            raise SlideError(
                f"{slide_id}: a vector of the slide is called {name!r}; letters, digits and ._- are expected"
            )
        if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
            raise SlideError(f"{slide_id}: {name}, a vector of the slide, is {vector.shape} or holds what is no number")
    with store.lease(slide_id) as lease:
        record = store.record(slide_id)
        if record is not None and record.state.complete:
            differs = record.image.differences(laid.source)
            if not differs and record.expression == laid.expression:
                return False
            if differs and not redo_changed:
                raise SlideError(
                    f"{slide_id}: {' and '.join(differs)} changed since it was written; write it anew with "
                    "redo_changed (--redo-changed), or give the changed slide another slide_id"
                )
        writer = store.slide(laid.row, laid.source, laid.spots, laid.resolved, laid.expression, lease)
        for block in laid.blocks(writer.rows):
            writer.append(block)
        if laid.slide_embeddings:
            writer.write_slide_embeddings(laid.slide_embeddings)
        scale = laid.picture.shape[1] / max(laid.resolved.width, 1)
        near = nearest_spots(laid.spots.xy, _NEIGHBOURS)
        writer.finish(*near, laid.picture, Picture(scale=scale, spot_px=laid.spot_px), laid.files)
    return True


def write_store(
    path: str | Path,
    slides: Iterable[SlideArrays],
    *,
    encoder: str | Path | EncoderRecipe,
    tile_um: float | None = None,
    tile_px: float | None = None,
    precision: Precision = "float32",
    tool: str = "arrays",
    version: str = "",
    redo_changed: bool = False,
) -> Written:
    """Write slides whose embeddings are in memory into the store at `path`, made where there is none.

    `encoder` is a name of `nh2st-pipe encoders`, a recipe, or the name of one that is not known here; tiles have a side
    of `tile_um` µm, or of `tile_px` level-0 px. `precision` is the arithmetic it ran in; `tool` and its `version` say
    what made them: a store holds embeddings of one tool. `slides` are taken one after another, and each is safe before
    the next is asked for.

    Raises StoreError, naming the slide and the row, where arrays do not belong together, hold what is no number in
    float16, or the store was made in another way; SlideError where a slide changed since it was written; UsageError for
    options that contradict each other.
    """
    if (tile_um is None) == (tile_px is None):
        raise UsageError("write_store takes either tile_um or tile_px: the side of a tile")
    if not 0 < float(tile_um or tile_px or 0) < np.inf:
        raise UsageError("write_store: the side of a tile is above 0")
    written, writer = Written(str(path)), None
    for slide in slides:
        views = _checked(slide)
        if writer is None:
            recipe, notices = encoder_named(encoder, views.shape[2])
            written.notices += notices
            contract = Contract(
                encoder=recipe.model_dump(mode="json"),
                identity=recipe.identity(),
                weights=WeightsOf(sha256=UNKNOWN, source=f"{tool} {version}".strip()),
                precision=precision,
                tile={"size_um": tile_um, "size_level0_px": tile_px},
                views=8 if views.shape[1] == 8 else 1,
                grid=GridOptions() if Location(path).is_empty() else open_store(path).contract.grid,
                origin="imported",
                imported=Imported(
                    tool=tool, version=version, encoder=recipe.name, stored=str(np.asarray(slide.features).dtype)
                ),
            )
            writer = StoreWriter(path, contract)
        if views.shape[1:] != (writer.contract.views, writer.contract.dim):
            raise StoreError(
                f"{slide.slide_id}: features are {views.shape[1]} views of {views.shape[2]} values, and the store has "
                f"{writer.contract.views} of {writer.contract.dim}"
            )
        done = lay_down(writer, _laid(slide, views, tile_um, tile_px), redo_changed=redo_changed)
        (written.done if done else written.kept).append(slide.slide_id)
    return written


def encoder_named(encoder: str | Path | EncoderRecipe, dim: int) -> tuple[EncoderRecipe, list[str]]:
    """Return the recipe of an encoder whose embeddings have `dim` values, and what has to be said of it: one that is
    not known here has its name alone.

    Raises StoreError where it is known and gives another number of values.
    """
    if isinstance(encoder, EncoderRecipe):
        recipe, notices = encoder, list[str]()
    else:
        known = files.names("stages/embed")
        if str(encoder).partition("@")[0] in known or Path(encoder).suffix in (".yaml", ".yml"):
            recipe, notices = load_encoder_recipe(encoder), []
        else:
            try:
                recipe = EncoderRecipe(name=str(encoder), kind="imported", dim=dim)
            except ValueError as error:
                raise RecipeError(f"encoder {encoder}: {error}") from error
            notices = [
                f"encoder {encoder} is not among those of nh2st-pipe encoders{nearest(str(encoder), known)}: it is "
                "known by its name, and heads trained on this store predict from its like alone"
            ]
    if recipe.dim != dim:
        raise StoreError(
            f"features have {dim:,} values, and encoder {recipe.name} gives {recipe.dim:,}: another pooling (class "
            "token, or class token and mean), or another encoder?"
        )
    return recipe, notices


def in_half(values: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Return features (n × …) in float16, and the rows that are no numbers in it: infinite, not a number, too large."""
    flat = values.reshape(len(values), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        half = values.astype(np.float16, copy=False)
        if flat.min(initial=0) >= -_LARGEST and flat.max(initial=0) <= _LARGEST:  # neither holds of what is no number
            return half, np.empty(0, np.int64)
        return half, np.flatnonzero(~(np.abs(flat) <= _LARGEST).all(axis=1))


def _checked(slide: SlideArrays) -> NDArray[np.float16]:
    """Return a slide's features as n × V × d, in float16. Raises StoreError naming what is wrong with its arrays."""
    at, features, xy = slide.slide_id, np.asarray(slide.features), np.asarray(slide.xy)
    if features.ndim == 2:
        features = features[:, None]
    if features.ndim != 3 or features.shape[1] not in (1, 8):
        raise StoreError(
            f"{at}: features should be tiles × values, or tiles × 8 views × values, and are {features.shape}"
        )
    n = len(features)
    if not n:
        raise StoreError(f"{at}: it has no tiles")
    if xy.shape != (n, 2):
        raise StoreError(f"{at}: xy should be {n:,} × 2, a centre for each row of features, and is {xy.shape}")
    if not np.issubdtype(features.dtype, np.floating):
        raise StoreError(f"{at}: features are {features.dtype}; floating point numbers are expected")
    half, wrong = in_half(features)
    if len(wrong):
        raise StoreError(
            f"{at}: features are no numbers in float16 (infinite, not a number, or beyond {_LARGEST:,.0f}) in "
            f"{len(wrong):,} rows: {listed(map(str, wrong))}"
        )
    wrong = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(wrong):
        raise StoreError(f"{at}: xy is not a number in {len(wrong):,} rows: {listed(map(str, wrong))}")
    _, first, of = np.unique(xy, axis=0, return_index=True, return_inverse=True)
    wrong = np.flatnonzero(first[of.ravel()] != np.arange(n))
    if len(wrong):
        raise StoreError(f"{at}: {len(wrong):,} rows have the centre of another row: {listed(map(str, wrong))}")
    for name, value in (("mpp", slide.mpp), ("tile_level0_px", slide.tile_level0_px)):
        if value is not None and not 0 < value < np.inf:
            raise StoreError(f"{at}: {name} is {value:g}; a number above 0 is expected")
    names = {"barcodes": slide.barcodes, "array_row": slide.array_row, "array_col": slide.array_col}
    for name, values in names.items():
        if values is not None and len(values) != n:
            raise StoreError(f"{at}: {name} has {len(values):,} values, and features {n:,} rows")
    if (slide.counts is None) != (slide.genes is None):
        raise StoreError(f"{at}: counts and genes are given together, or neither")
    return half


def _laid(slide: SlideArrays, views: NDArray[np.float16], tile_um: float | None, tile_px: float | None) -> Laid:
    side = slide.tile_level0_px or tile_px
    if side is None:
        if slide.mpp is None:
            raise StoreError(f"{slide.slide_id}: its mpp is needed, for tiles have a size in µm; or its tile_level0_px")
        assert tile_um is not None
        side = tile_um / slide.mpp
    xy = np.asarray(slide.xy, np.float64)
    width, height = slide.size or (int(np.ceil(reach)) for reach in (xy.max(axis=0) + side / 2))
    outside = np.flatnonzero(((xy < -side) | (xy > np.array([width, height]) + side)).any(axis=1))
    if len(outside):
        raise StoreError(
            f"{slide.slide_id}: {len(outside):,} tiles lie outside the slide of {width:,} × {height:,} px, the first "
            f"at {tuple(xy[outside[0]].tolist())}: are these level-0 px, x then y?"
        )
    spots, expression = _spots(slide, xy)
    said = hashlib.blake2b(np.ascontiguousarray(views).data, digest_size=16)
    resolved = Resolved(
        width=width,
        height=height,
        mpp=slide.mpp,
        mpp_source="manifest" if slide.mpp else "unknown",
        tile_level0_px=side,
    )
    row = ManifestRow(
        slide_id=slide.slide_id,
        slide=slide.slide_id,
        patient=slide.patient or slide.slide_id,
        mpp=slide.mpp,
        extra=dict(slide.extra),
    )
    picture = slide.picture
    if picture is None:
        picture = drawn(xy, side, (width, height))

    def blocks(start: int) -> Iterator[NDArray[np.float16]]:
        for at in range(start, len(views), _BLOCK_TILES):
            yield views[at : at + _BLOCK_TILES]

    vectors = {name: np.asarray(vector, np.float32).ravel() for name, vector in slide.slide_embeddings.items()}
    source = ImageSource(image="", mpp=slide.mpp, features=said.hexdigest())
    return Laid(row, source, spots, resolved, blocks, picture, side, expression, slide_embeddings=vectors)


def _spots(slide: SlideArrays, xy: NDArray[np.float64]) -> tuple[Spots, str | None]:
    """Return a slide's spots, and the fingerprint of their counts."""
    names = slide.barcodes or [f"x{x:.12g}_y{y:.12g}" for x, y in xy]
    if len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1][:5]
        raise StoreError(f"{slide.slide_id}: barcodes must be unique, and these stand twice or more: {listed(twice)}")
    rows, columns = (
        None if each is None else np.asarray(each, np.int64) for each in (slide.array_row, slide.array_col)
    )
    if slide.counts is None or slide.genes is None:
        return Spots(list(names), xy, rows, columns), None
    counts, genes = sp.csr_matrix(slide.counts), [str(gene) for gene in slide.genes]
    if counts.shape != (len(xy), len(genes)):
        raise StoreError(f"{slide.slide_id}: counts should be {len(xy):,} × {len(genes):,}, and are {counts.shape}")
    if len(set(genes)) < len(genes):
        raise StoreError(f"{slide.slide_id}: genes must be unique")
    if not (np.isfinite(counts.data) & (counts.data >= 0)).all():
        raise StoreError(f"{slide.slide_id}: counts are negative or not a number; raw counts are expected")
    said = hashlib.blake2b(digest_size=16)
    for part in (counts.data, counts.indices, counts.indptr, np.array(genes)):
        said.update(np.ascontiguousarray(part).tobytes())
    return Spots(list(names), xy, rows, columns, counts, genes), said.hexdigest()


def drawn(xy: NDArray[np.float64], side: float, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a picture h × w × 3 of tiles (n × 2 centres, their side, the slide's size, level-0 px) of which no image
    is at hand.
    """
    scale = min(1.0, _PICTURE_PX / max(size))
    width, height = (max(1, round(edge * scale)) for edge in size)
    picture = np.full((height, width, 3), _PAPER, np.uint8)
    low, high = ((xy - side / 2) * scale).round().astype(int), ((xy + side / 2) * scale).round().astype(int)
    for (left, top), (right, bottom) in zip(low.clip(0), high.clip(1), strict=True):
        picture[top:bottom, left:right] = _TILE
    return picture
