"""`import-features`: features that another tool made, into a store that stage two reads as it reads our own.

What the files tell is taken, what they do not is asked, and nothing is guessed. Each slide is written under its lease,
one that was cut short is gone on with, and one whose features cannot be used is named and passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import OF_ONE_SLIDE, SlideError, UsageError, listed, nearest
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.machine import cores
from nh2st_pipe.core.pool import in_order
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.signals import Stop, signals_as_flag
from nh2st_pipe.importing.encoders import called, recipe_for, same_encoder, usual_precision
from nh2st_pipe.importing.found import Asked, Features, Found, Section
from nh2st_pipe.importing.join import join
from nh2st_pipe.importing.layouts import layout_of
from nh2st_pipe.importing.places import check_inside, check_on_tissue, on_level0
from nh2st_pipe.importing.reading import ROW_BYTES, stem
from nh2st_pipe.recipes.encoder import Precision
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import thumbnail
from nh2st_pipe.slides.resolution import Resolution
from nh2st_pipe.store.arrays import UNKNOWN, Laid, encoder_named, in_half, lay_down
from nh2st_pipe.store.format import (
    Contract,
    ImageSource,
    Imported,
    ManifestRow,
    Resolved,
    WeightsOf,
    counts_fingerprint,
    fingerprint,
)
from nh2st_pipe.store.read import Store, open_store
from nh2st_pipe.store.write import StoreWriter
from nh2st_pipe.tiles.layout import resolution_of, tissue_on
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest
from nh2st_pipe.tiles.masks import tissue_files
from nh2st_pipe.tiles.spots import Spots, read_spots

__all__ = ["ImportSummary", "import_features"]

_PICTURE_PX = 768
_APART, _FAR = 0.02, 0.15  # of the store's tile size: said, and refused
_MPP_APART = 0.02
_MOST_AT_ONCE = 4
_ONE_VIEW = (
    "each tile has one view: heads are trained without the other seven dihedral views, and predict without their mean "
    "(docs/features.md says what that costs)"
)


@dataclass
class ImportSummary:
    """What one call of `import_features` did."""

    store: str
    tool: str = ""
    encoder: str = ""
    """As the store calls it."""
    tiles: int = 0
    """Of the slides that were written."""
    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Slides that were complete already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Slides passed over, each with its cause."""
    without_slide: list[str] = field(default_factory=list)
    """Features of slides that the manifest does not have."""
    notices: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return dict(vars(self))


def import_features(
    folder: str | Path,
    slides: str | Path,
    store: str | Path = "store.zarr",
    *,
    layout: str = "auto",
    encoder: str | Path | None = None,
    coords: str | Path | None = None,
    tile_um: float | None = None,
    tile_px: float | None = None,
    mpp_read: float | None = None,
    precision: Precision | None = None,
    redo_changed: bool = False,
    trust_places: bool = False,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write the features in `folder` of the slides in the manifest `slides` into a store, made where there is none.

    `layout` is the tool that wrote them, or "auto". `encoder` chooses among several, or names the one that the files do
    not; `coords` is the folder of files with coordinates where that is another; `tile_um` (µm) or `tile_px` (level-0
    px) is the side of a tile and `mpp_read` the µm per px at which tiles were read, where the files do not tell;
    `precision` the arithmetic of the encoder, which none tells. With `trust_places` tiles are taken as they lie
    although they would cover more tissue otherwise.

    Where the manifest has expression, each spot gets the tile that was laid on it, else the one that covers it.

    Raises UsageError for what has to be said, ManifestError, StoreError where the store was made in another way; faults
    of single slides are in the summary.
    """
    progress = progress or Progress()
    for option, value in (("--tile-um", tile_um), ("--tile-px", tile_px), ("--mpp-read", mpp_read)):
        if value is not None and not 0 < value < np.inf:
            raise UsageError(f"{option} takes a number above 0, not {value:g}")
    if tile_um is not None and tile_px is not None:
        raise UsageError("--tile-um and --tile-px both say how large tiles are; give one")
    asked = Asked(None if coords is None else Path(coords), tile_um, tile_px, mpp_read)
    rows = read_manifest(slides)
    layout_here = layout_of(Path(folder), layout)
    found = layout_here.find(Path(folder), asked)
    sections, recipe_name = _of_one_encoder(found, encoder, Path(folder))
    summary = ImportSummary(str(store), found.tool)
    pairs = _paired(rows, sections, summary, Path(folder))
    if not pairs:
        raise UsageError(
            f"none of the {len(sections):,} slides with features in {folder} ({listed(each.name for each in sections)})"
            f" is in {slides} ({listed(row.slide_id for row in rows)}): features belong to the slide whose slide_id, or"
            " whose image's name, is theirs"
        )
    with signals_as_flag() as stop:
        importer = _Importer(found, recipe_name, Location(store), asked, precision, redo_changed, trust_places, stop)
        progress.start("importing", len(pairs), "slides")
        faults = importer.begin(pairs)
        if len(faults) == len(pairs):
            summary.failed |= faults
            return summary
        todo = in_order(importer.take, pairs, min(cores(), _MOST_AT_ONCE))
        try:
            for number, (taken, (row, _)) in enumerate(zip(todo, pairs, strict=True)):
                stop.check()
                progress.advance(number + 1, len(pairs), row.slide_id)
                if taken.fault is not None:
                    summary.failed[row.slide_id] = taken.fault
                    progress.say(f"{row.slide_id} passed over; the end says why")
                    continue
                (summary.done if taken.written else summary.kept).append(row.slide_id)
                summary.tiles += taken.tiles if taken.written else 0
                summary.notices += [f"{row.slide_id}: {words}" for words in taken.notices]
        finally:
            todo.close()
    summary.encoder = importer.encoder
    summary.notices[:0] = importer.notices
    if summary.done and any(row.expression for row, _ in pairs):
        summary.notices.append(_ONE_VIEW)
    return summary


def _of_one_encoder(found: Found, encoder: str | Path | None, folder: Path) -> tuple[list[Section], str | Path]:
    """Return the sections of one encoder, and what it is called. Raises UsageError where nobody says which."""
    if not found.sections:
        raise UsageError(f"{folder} holds no features as {found.tool} writes them")
    known = sorted({each.encoder for each in found.sections if each.encoder is not None})
    if encoder is None:
        if len(known) > 1:
            raise UsageError(f"{folder} holds features of several encoders: choose with --encoder {' or '.join(known)}")
        if not known:
            raise UsageError(
                f"{found.tool} does not write which encoder made its features: give --encoder, a name of nh2st-pipe "
                "encoders where it is one of those"
            )
        return list(found.sections), known[0]
    if not known:
        return list(found.sections), encoder
    mine = [each for each in found.sections if each.encoder is not None and same_encoder(each.encoder, str(encoder))]
    if not mine:
        mine = [each for each in found.sections if each.encoder == str(encoder)]
    if not mine and len(known) == 1 and Path(encoder).suffix in (".yaml", ".yml"):
        return list(found.sections), encoder
    if not mine:
        raise UsageError(
            f"{folder} holds no features of {encoder}; it has those of {', '.join(known)}{nearest(str(encoder), known)}"
        )
    several = sorted({str(each.encoder) for each in mine})
    if len(several) > 1:
        mine = [each for each in mine if each.encoder == str(encoder)]
        if not mine:
            raise UsageError(f"{folder} holds features of {' and of '.join(several)}: choose with --encoder")
    return mine, encoder if called(str(encoder)) != str(encoder) or len(known) > 1 else str(mine[0].encoder)


def _paired(
    rows: list[SlideRow], sections: list[Section], summary: ImportSummary, folder: Path
) -> list[tuple[SlideRow, Section]]:
    """Return each row of the manifest with its features; what has no other side is named."""
    by_name = dict[str, Section]()
    twice = [name for name, n in Counter(each.name for each in sections).items() if n > 1]
    short = Counter(stem(each.name) for each in sections)
    for each in sections:
        by_name.setdefault(each.name, each)
        if short[stem(each.name)] == 1:  # TCGA's files have an id behind a dot, which two of one case differ in
            by_name.setdefault(stem(each.name), each)
    pairs, used = [], set[str]()
    for row in rows:
        names = (row.slide_id, row.slide.name, stem(row.slide.name))
        section = next((by_name[name] for name in names if name in by_name), None)
        if section is None:
            summary.failed[row.slide_id] = f"{folder} holds no features of it, as {names[0]} or {names[2]}"
        elif section.name in twice:
            paths = [str(each.path) for each in sections if each.name == section.name]
            summary.failed[row.slide_id] = f"there are several files of it: {listed(paths)}"
        else:
            pairs.append((row, section))
            used.add(section.name)
    summary.without_slide = sorted({each.name for each in sections} - used - set(twice))
    if summary.without_slide:
        summary.notices.append(f"features of slides that the manifest does not have: {listed(summary.without_slide)}")
    return pairs


@dataclass(frozen=True)
class _Taken:
    """What came of one slide."""

    written: bool = False
    tiles: int = 0
    fault: str | None = None
    notices: tuple[str, ...] = ()


class _Importer:
    """Writes slides with their features; several threads may call `take`."""

    def __init__(
        self,
        found: Found,
        encoder: str | Path,
        location: Location,
        asked: Asked,
        precision: Precision | None,
        redo_changed: bool,
        trust_places: bool,
        stop: Stop,
    ) -> None:
        self._found, self._encoder, self._location, self._asked = found, encoder, location, asked
        self._precision, self._redo_changed, self._trust_places = precision, redo_changed, trust_places
        self._stop = stop
        self.notices: list[str] = []
        self.encoder = ""

    def begin(self, pairs: list[tuple[SlideRow, Section]]) -> dict[str, str]:
        """Open the store, with the contract of the first slide whose features can be opened; return the faults of those
        before it, of all where there is none.

        Raises UsageError for what has to be said, StoreError where the store was made in another way.
        """
        old, faults = None if self._location.is_empty() else open_store(self._location), dict[str, str]()
        for row, section in pairs:
            try:
                contract = self._contract(row, section, old)
                break
            except OF_ONE_SLIDE as error:
                faults[row.slide_id] = str(error)
        else:
            return faults
        self.encoder = str(contract.identity["name"])
        self._writer = StoreWriter(self._location, contract)
        self._tile = contract.tile
        return faults

    def _contract(self, row: SlideRow, section: Section, old: Store | None) -> Contract:
        with section.open() as features:
            _, dim = _shape(features, section.path)
            stored = str(features.values.dtype)
            name = self._encoder
            recipe, self.notices = encoder_named(recipe_for(name, dim) if isinstance(name, str) else name, dim)
            slide = open_slide(row.slide)
            try:
                mpp = _resolution(row, slide, features).mpp
                _, side = on_level0(features.places, mpp, self._asked, str(section.path))
            finally:
                slide.close()
            assumed = list(features.assumed)
        tile: dict[Any, float | None] = {"size_um": None, "size_level0_px": None}
        if old is not None:
            tile = dict(old.contract.tile)
        elif self._asked.tile_um is not None:
            tile["size_um"] = self._asked.tile_um
        elif mpp is not None:
            tile["size_um"] = round(side * mpp, 2)
        else:
            tile["size_level0_px"] = side
        begun = None if old is None or old.contract.imported is None else old.contract.precision
        precision = self._precision or begun or usual_precision(self._found.tool, recipe, stored)
        if self._precision is None:
            assumed.append(f"{precision} arithmetic")
        tool = Imported(
            tool=self._found.tool,
            version=section.version,
            encoder=section.encoder or str(name),
            stored=stored,
            assumed=tuple(assumed),
        )
        source = f"{self._found.tool} {section.version}".strip() + f", encoder {tool.encoder}"
        made = Contract(
            encoder=recipe.model_dump(mode="json"),
            identity=recipe.identity(),
            weights=WeightsOf(sha256=UNKNOWN, source=source),
            precision=precision,
            tile=tile,
            views=1,
            origin="imported",
            imported=tool,
        )
        return made if old is None else made.model_copy(update={"grid": old.contract.grid})

    def take(self, pair: tuple[SlideRow, Section]) -> _Taken:
        """Write a slide, and say what came of it."""
        row, section = pair
        try:
            self._stop.check()
            source, expression = _source(row, section)
            record = self._writer.record(row.slide_id)
            complete = record is not None and record.state.complete
            if record is not None and complete and record.image.same(source) and record.expression == expression:
                return _Taken()
            with section.open() as features:
                laid, notices = self._laid(row, section, features, source, expression)
                written = lay_down(self._writer, laid, redo_changed=self._redo_changed)
            return _Taken(written, len(laid.spots), notices=tuple(notices))
        except (*OF_ONE_SLIDE, UsageError, MemoryError) as error:
            return _Taken(fault=str(error) or type(error).__name__)

    def _laid(
        self, row: SlideRow, section: Section, features: Features, source: ImageSource, expression: str | None
    ) -> tuple[Laid, list[str]]:
        at, contract = str(section.path), self._writer.contract
        n, dim = _shape(features, section.path)
        if dim != contract.dim:
            raise SlideError(f"{at}: features have {dim:,} values, and the store's {contract.dim:,}: another encoder?")
        if str(features.values.dtype) != (contract.imported.stored if contract.imported else ""):
            raise SlideError(f"{at}: features are {features.values.dtype}, and those of the store another type")
        slide = open_slide(row.slide)
        try:
            known = _resolution(row, slide, features)
            mpp, notices = known.mpp, [*known.notes, *known.doubts]
            xy, side = on_level0(features.places, mpp, self._asked, at)
            if len(xy) != n:
                raise SlideError(f"{at}: {n:,} rows of features and {len(xy):,} of coordinates: which belong together?")
            notices += self._tile_apart(side, mpp, at)
            if features.size is not None and features.size != slide.size:
                raise SlideError(
                    f"{at}: they are of an image of {features.size[0]:,} × {features.size[1]:,} px, and {row.slide} "
                    f"has {slide.size[0]:,} × {slide.size[1]:,}: is it the same slide?"
                )
            check_inside(xy, side, slide.size, mpp, at)
            picture, _ = thumbnail(slide, _PICTURE_PX)
            mask = tissue_on(slide, picture, row.tissue)
            if not self._trust_places:
                notices += check_on_tissue(xy, side, mask, slide.size, mpp, at)
            files = tissue_files(mask, slide)
            resolved = Resolved(
                width=slide.size[0],
                height=slide.size[1],
                mpp=mpp,
                mpp_source=known.source,
                tile_level0_px=side,
                reader=slide.reader,
                origin=slide.origin,
            )
        finally:
            slide.close()
        rows = np.arange(n)
        if row.expression is not None:
            joined = join(read_spots(row.expression), xy, side, features.barcodes, at)
            spots, rows = joined.spots, joined.rows
            notices += joined.notices
        else:
            spots = _tiles(xy, features.barcodes)
        vectors = {name: read() for name, read in self._found.vectors.get(section.name, {}).items()}
        width = spots.diameter_px or side
        laid = Laid(
            ManifestRow.model_validate(row.record()),
            source,
            spots,
            resolved,
            lambda start: self._blocks(features, rows, start, at),
            picture,
            width,
            expression,
            files=files,
            slide_embeddings=vectors,
        )
        return laid, notices

    def _tile_apart(self, side: float, mpp: float | None, at: str) -> list[str]:
        """Say where a slide's tiles are of another size than the store's. Raises SlideError where that is far off."""
        um, px = self._tile["size_um"], self._tile["size_level0_px"]
        if um is not None:
            if mpp is None:
                raise SlideError(f"{at}: nothing says the slide's mpp, and the store's tiles are of {um:g} µm")
            own, wanted, unit = side * mpp, um, "µm"
        else:
            own, wanted, unit = side, float(px or side), "level-0 px"
        apart = abs(own / wanted - 1)
        if apart > _FAR:
            raise SlideError(
                f"{at}: its tiles are {own:.4g} {unit} wide, and the store's {wanted:.4g}: another magnification? Such "
                "slides go into a store of their own"
            )
        if apart > _APART:
            return [f"its tiles are {own:.4g} {unit} wide, {apart:.0%} off the store's {wanted:.4g}"]
        return []

    def _blocks(
        self, features: Features, rows: NDArray[np.int64], start: int, at: str
    ) -> Iterator[NDArray[np.float16]]:
        """Yield the features of `rows`, which grow, from the one numbered `start` on; the next is read meanwhile."""
        dim, size = features.values.shape[1], features.values.dtype.itemsize
        step, parts = max(1, ROW_BYTES // (dim * size)), list[tuple[int, int]]()
        while start < len(rows):
            stop = int(np.searchsorted(rows, int(rows[start]) + step))
            parts.append((start, stop))
            start = stop

        def read(part: tuple[int, int]) -> NDArray[np.float16]:
            self._stop.check()
            own = rows[slice(*part)]
            first = int(own[0])
            half, wrong = in_half(features.values[first : int(own[-1]) + 1])
            if len(wrong):
                named = listed(str(first + each) for each in wrong)
                raise SlideError(
                    f"{at}: features are no numbers in float16 (infinite, not a number or too large) in {len(wrong):,} "
                    f"rows: {named}"
                )
            return (half if len(half) == len(own) else half[own - first])[:, None]

        yield from in_order(read, parts, 1)


def _source(row: SlideRow, section: Section) -> tuple[ImageSource, str | None]:
    """Return the fingerprints of a slide's files, and of its counts. Raises SlideError where one cannot be read."""
    try:
        source = ImageSource(
            image=fingerprint(row.slide),
            tissue=None if row.tissue is None else fingerprint(row.tissue),
            mpp=row.mpp,
            features=fingerprint(section.path),
        )
        return source, None if row.expression is None else counts_fingerprint(row.expression)
    except OSError as error:
        raise SlideError(f"{error.filename or row.slide} cannot be read: {error.strerror or error}") from error


def _shape(features: Features, path: Path) -> tuple[int, int]:
    """Return rows and values of features. Raises SlideError where there are none, or they are no table of numbers."""
    shape = tuple(features.values.shape)
    if not shape or 0 in shape:
        raise SlideError(f"{path} holds no tiles")
    if len(shape) != 2:
        raise SlideError(f"{path}: features should be tiles × values, and are {shape}")
    if not np.issubdtype(features.values.dtype, np.floating):
        raise SlideError(f"{path}: features are {features.values.dtype}; floating point numbers are expected")
    return int(shape[0]), int(shape[1])


def _resolution(row: SlideRow, slide: Slide, features: Features) -> Resolution:
    """Return a slide's resolution: the manifest's, the image's, the spots', else what the tool took."""
    found, taken = resolution_of(row, slide), features.mpp
    if taken is None:
        return found
    if found.mpp is None:
        return replace(found, mpp=taken, source="file", notes=(f"{taken:.4g} µm per px, as the tool took it",))
    if abs(taken / found.mpp - 1) > _MPP_APART:
        doubt = f"the tool took {taken:.4g} µm per px, and here it is {found.mpp:.4g}"
        return replace(found, doubts=(*found.doubts, doubt))
    return found


def _tiles(xy: NDArray[np.float64], barcodes: list[str] | None) -> Spots:
    """Return tiles as spots without counts. Raises SlideError where two are called the same, or lie in one place."""
    names = barcodes or [f"x{x:.12g}_y{y:.12g}" for x, y in xy]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise SlideError(f"tiles stand twice or more: {listed(twice)}")
    return Spots(list(names), xy)
