"""Searching: tiles like a tile or a region, slides like a slide, and tiles by what is predicted there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, UsageError, listed, nearest
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.evaluation.statistics import many
from nh2st_pipe.exporting.run import predictions_in
from nh2st_pipe.exporting.view import PredictionView, read_view
from nh2st_pipe.reporting.regions import read_regions
from nh2st_pipe.searching.coarse import coarse_of
from nh2st_pipe.searching.index import Index, IndexedSlide, index_of
from nh2st_pipe.searching.scan import nearest_tiles, slide_distance
from nh2st_pipe.searching.stores import Stores, together
from nh2st_pipe.searching.where import Where

__all__ = ["Hit", "Hits", "Query", "search"]

_REPRESENTATIVES = 100
_SEED = 2021


@dataclass(frozen=True)
class Query:
    """What is asked for: tiles like a tile, or those of a region, or slides like a slide; and what must hold there."""

    slide: str | None = None
    tile: str | None = None
    """Its name."""
    at: tuple[float, float] | None = None
    """Or a place within it, level-0 px."""
    region: str | Path | None = None
    """Or an outline on the slide, as QuPath exports it."""
    image: str | Path | None = None
    """Or a picture of somebody's own: tiles like its middle, as large as a tile."""
    mpp: float | None = None
    """µm per px of the picture; None: as it says itself."""
    where: str | None = None
    """See `where`."""
    same_patient: bool = False
    """Whether tiles of the asker's own patient may be found; those of its own slide are not in any case."""
    genes: tuple[str, ...] = ()
    """Of which values are told, beside those that `where` names."""
    k: int = 20

    @property
    def within(self) -> list[str]:
        """What says where on the slide: tile, at and region, those that are given."""
        return [name for name in ("tile", "at", "region") if getattr(self, name) is not None]

    def check(self) -> None:
        """Raise UsageError where nothing is asked for, or what is given goes with nothing or not together."""
        if self.where is None and self.slide is None and self.image is None and not self.within:
            raise UsageError(
                "search for something: --slide NAME, with --tile, --at or --region, --image FILE, or --where CONDITION"
            )
        if self.image is not None and self.slide is not None:
            raise UsageError("--image and --slide ask for different things; give one of them")
        if len(self.within) > 1:
            one, other = self.within[:2]
            raise UsageError(f"--{one} and --{other} ask for different things; give one of them")
        if self.within and self.slide is None:
            raise UsageError(f"--{self.within[0]} says where on a slide; --slide NAME says which slide")
        if self.mpp is not None and self.image is None:
            raise UsageError("--mpp says the scale of a picture; --image FILE says which picture")
        if self.k < 1:
            raise UsageError(f"-k takes 1 and more, not {self.k}")


@dataclass(frozen=True)
class Hit:
    """A tile, or a slide, that was found."""

    slide_id: str
    patient: str
    likeness: float | None
    """The cosine between tiles as they are compared, 1 for the same; of a slide 1 − the median distance. None where the
    query asks for values alone."""
    tile: str | None = None
    x: float | None = None
    """Of the tile's centre, level-0 px."""
    y: float | None = None
    values: Mapping[str, dict[str, float | None]] = field(default_factory=dict)
    """By gene: value, and as far as known low, high, measured."""
    unlike: float | None = None
    """Per cent of the training tiles that lie nearer to other slides' than this tile to them."""
    trained_on: str = ""
    """In words, where the head that predicted was trained on the slide or its patient."""
    store: str = ""
    """Where several are searched, which one it is in."""

    def record(self) -> dict[str, Any]:
        """Return it in a line of a table."""
        flat = {
            f"{gene} {name}".removesuffix(" value"): value
            for gene, known in self.values.items()
            for name, value in known.items()
        }
        of_tile = {} if self.tile is None else {"tile": self.tile, "x": self.x, "y": self.y}
        known = {"unlike": self.unlike} if self.unlike is not None else {}
        about = {"slide_id": self.slide_id, "patient": self.patient, "likeness": self.likeness}
        where = {"store": self.store} if self.store else {}
        return {**about, **of_tile, **flat, **known, "trained_on": self.trained_on, **where}


@dataclass
class Hits:
    """What was found, the best first."""

    hits: list[Hit]
    searched: int
    """Tiles that were held against the query, those that were left out not among them."""
    asker: Hit | None = None
    """The tile that was asked for, where it is one."""
    notices: list[str] = field(default_factory=list)
    unit: str = ""
    """What the values that are told are of."""

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def frame(self) -> Any:
        """Return the hits as a polars data frame."""
        import polars as pl

        if not self.hits:
            return pl.DataFrame(schema=list(Hit("", "", None, "", 0.0, 0.0).record()))
        return pl.DataFrame([hit.record() for hit in self.hits], infer_schema_length=None)


def search(
    store: str | Path | Sequence[str | Path] | Stores,
    query: Query,
    *,
    predictions: str | Path | None = None,
    index: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Hits:
    """Search a store, or several of the same encoder and tiles (whose `index` is to be given), whose index is made or
    renewed first (`index_of`).

    `predictions` are a folder of them, or a run: for `where`, and for the values that are told. The asker's patient is
    left out, unless the query says otherwise. `weights`, `device` and `trust_remote_code` are for the encoder that a
    picture goes through.

    Raises UsageError where the query asks for what is not there or cannot be understood, StoreError and RunError where
    store, index or predictions cannot be read.
    """
    query.check()
    condition = None if query.where is None else Where(query.where)
    views = _views(predictions, condition, query.genes)
    opened = together(store)
    found = index_of(opened, index, progress=progress)
    asker = None if query.slide is None else _slide(found, query.slide)
    searched = [slide for slide in found.slides.values() if _may_be_found(slide, asker, query.same_patient)]
    masks = {} if condition is None else _masks(condition, views, searched)
    if condition is not None:
        searched = [slide for slide in searched if slide.slide_id in masks and masks[slide.slide_id].any()]
    tiles = sum(int(masks[s.slide_id].sum()) if s.slide_id in masks else s.tiles for s in searched)
    notices = _notices(found, searched, asker, query, condition, views)
    vector: NDArray[np.float16] | None = None
    if query.image is not None:
        from nh2st_pipe.searching.picture import embedding_of

        given = None if weights is None else Path(weights)
        embedded = embedding_of(
            Path(query.image),
            query.mpp,
            opened.first,
            weights=given,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        vector = found.space.of(embedded)[0]
    if asker is None and vector is None:
        assert condition is not None
        hits = _by_value(condition, searched, masks, views, query.k)
    else:
        if asker is not None:
            record = opened.record(asker.slide_id)
            resolved = None if record is None else record.resolved
            vector = _vector(query, asker, (0, 0) if resolved is None else resolved.origin or (0, 0))
            if vector is None:
                likest = _slides_like(asker, searched, query.k)
                return Hits([_in_store(hit, opened) for hit in likest], tiles, notices=notices)
        assert vector is not None
        coarse = coarse_of(found, progress=progress)
        nearest = nearest_tiles if coarse is None else coarse.nearest
        (like,) = nearest(vector[None], searched, query.k, lambda slide: masks.get(slide.slide_id))
        hits = [(found.slides[name], row, likeness) for likeness, name, row in like]
    told = list(dict.fromkeys((*(condition.genes if condition is not None else ()), *query.genes)))
    unit = ", ".join(dict.fromkeys(view.unit for view in views.values() if view.unit)) if told else ""
    row_of = None if asker is None else _row(query, asker)
    own = None if asker is None or row_of is None else _hit(asker, row_of, None, told, views)
    told_of = [_in_store(_hit(slide, row, likeness, told, views), opened) for slide, row, likeness in hits]
    return Hits(told_of, tiles, own, notices, unit)


def _in_store(hit: Hit, stores: Stores) -> Hit:
    """Return a hit that says which store it is in, where there are several."""
    return replace(hit, store=str(stores.store_of(hit.slide_id).location)) if stores.several else hit


def _slide(index: Index, name: str) -> IndexedSlide:
    if name not in index.slides:
        several = [each for each in index.slides if each.startswith(f"{name}@")]
        if several:
            raise UsageError(f"slide {name} is in several stores: it is one of {listed(several)}")
        raise UsageError(f"the store has no complete slide {name}{nearest(name, list(index.slides))}")
    return index.slides[name]


def _may_be_found(slide: IndexedSlide, asker: IndexedSlide | None, same_patient: bool) -> bool:
    if asker is None:
        return True
    return slide.slide_id != asker.slide_id and (same_patient or slide.patient != asker.patient)


def _vector(query: Query, asker: IndexedSlide, origin: tuple[int, int]) -> NDArray[np.float16] | None:
    """Return what tiles are held against; None where it is the whole slide. Raises UsageError."""
    if not query.within:
        return None
    row = _row(query, asker)
    if row is not None:
        return np.array(asker.vectors()[row])
    xy, _ = asker.places()
    assert query.region is not None
    rows = np.unique(np.concatenate([each.rows for each in read_regions(Path(query.region), xy, origin)]))
    mean = np.array(asker.vectors()[rows], np.float32).mean(axis=0)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float16)


def _row(query: Query, asker: IndexedSlide) -> int | None:
    """Return which tile is asked for; None where it is none. Raises UsageError where it is not there."""
    xy, names = asker.places()
    if query.tile is not None:
        if query.tile not in names:
            raise UsageError(f"slide {asker.slide_id} has no tile {query.tile}{nearest(query.tile, names)}")
        return names.index(query.tile)
    if query.at is None:
        return None
    away = np.linalg.norm(xy - np.array(query.at), axis=1)
    row = int(away.argmin())
    pitch = float(np.median(np.sort(np.linalg.norm(xy - xy[row], axis=1))[1:5])) if len(xy) > 4 else np.inf
    if away[row] > pitch:
        raise UsageError(
            f"no tile of slide {asker.slide_id} is at {query.at[0]:g}, {query.at[1]:g} (level-0 px); the nearest, "
            f"{names[row]}, is at {xy[row, 0]:.0f}, {xy[row, 1]:.0f}"
        )
    return row


def _representatives(slide: IndexedSlide) -> NDArray[np.float16]:
    """Return about a hundred tiles that stand for a slide: the one nearest to each centre of k-means."""
    from sklearn.cluster import MiniBatchKMeans

    vectors = np.array(slide.vectors())
    if len(vectors) <= _REPRESENTATIVES:
        return vectors
    centres = MiniBatchKMeans(_REPRESENTATIVES, random_state=_SEED, n_init=1).fit(vectors.astype(np.float32))
    away = centres.transform(vectors.astype(np.float32))
    return np.asarray(vectors[np.unique(away.argmin(axis=0))])


def _slides_like(asker: IndexedSlide, searched: Sequence[IndexedSlide], k: int) -> list[Hit]:
    asked = _representatives(asker)
    far = sorted((slide_distance(asked, slide), slide.slide_id, slide.patient) for slide in searched)
    return [Hit(name, patient, 1 - distance) for distance, name, patient in far[:k]]


def _views(predictions: str | Path | None, condition: Where | None, genes: Sequence[str]) -> dict[str, PredictionView]:
    if predictions is None:
        if condition is not None or genes:
            raise UsageError("--where and --genes ask for values: --predictions FOLDER says where they are")
        return {}
    files, verdicts = predictions_in(Path(predictions))
    views = {view.slide_id: view for view in (read_view(file, verdicts) for file in files)}
    wanted = [*(condition.genes if condition is not None else ()), *genes]
    known = {str(name) for view in views.values() for name in view.var.index}
    strangers = [gene for gene in dict.fromkeys(wanted) if gene not in known]
    if strangers:
        named = listed(f"{gene}{nearest(gene, sorted(known))}" for gene in strangers)
        raise UsageError(f"{predictions} does not predict {named}")
    return views


def _masks(
    condition: Where, views: Mapping[str, PredictionView], searched: Sequence[IndexedSlide]
) -> dict[str, NDArray[np.bool_]]:
    of = {slide.slide_id: views[slide.slide_id] for slide in searched if slide.slide_id in views}
    bounds = condition.bounds(of.values())
    masks = {}
    for slide in searched:
        view = of.get(slide.slide_id)
        if view is None:
            continue
        _, names = slide.places()
        if view.barcodes != names:
            raise RunError(f"{view.file} has other tiles than slide {slide.slide_id} in the store; predict again")
        masks[slide.slide_id] = condition.mask(view, bounds)
    return masks


def _notices(
    index: Index,
    searched: Sequence[IndexedSlide],
    asker: IndexedSlide | None,
    query: Query,
    condition: Where | None,
    views: Mapping[str, PredictionView],
) -> list[str]:
    found = list[str]()
    if asker is not None and not query.same_patient:
        own = [slide for slide in index.slides.values() if slide.patient == asker.patient and slide is not asker]
        if own:
            others = f"{many(len(own), 'more slide')} of patient {asker.patient}"
            found.append(f"{others} {'is' if len(own) == 1 else 'are'} left out without --same-patient")
    if condition is not None:
        without = [name for name in index.slides if name not in views]
        if without:
            found.append(f"{listed(without)} are not predicted, and left out")
        if untrusted := condition.untrusted(views.values()):
            found.append(f"trusted on no slide, as '{condition}' asks: {listed(untrusted)}")
    if not searched:
        found.append("nothing is left to be searched" if condition is None else f"no tile meets '{condition}'")
    return found


def _by_value(
    condition: Where,
    searched: Sequence[IndexedSlide],
    masks: Mapping[str, NDArray[np.bool_]],
    views: Mapping[str, PredictionView],
    k: int,
) -> list[tuple[IndexedSlide, int, float | None]]:
    """Return tiles that meet a condition, those with the highest values of the gene that it names first."""
    gene, found = next(iter(condition.genes), None), list[tuple[float, IndexedSlide, int]]()
    for slide in searched:
        rows = np.flatnonzero(masks[slide.slide_id])
        values = np.zeros(len(rows)) if gene is None else _values_of(views[slide.slide_id], gene, "")[rows]
        best = np.argsort(np.nan_to_num(np.negative(values), nan=np.inf), kind="stable")[:k]
        found += [(float(values[i]), slide, int(rows[i])) for i in best]
    found.sort(key=lambda each: -each[0] if each[0] == each[0] else np.inf)
    return [(slide, row, None) for _, slide, row in found[:k]]


def _values_of(view: PredictionView, gene: str, layer: str) -> NDArray[np.float32]:
    place = view.genes.index(gene)
    return view.values(layer, of=slice(place, place + 1))[:, 0]


def _hit(
    slide: IndexedSlide,
    row: int,
    likeness: float | None,
    genes: Sequence[str],
    views: Mapping[str, PredictionView],
) -> Hit:
    xy, names = slide.places()
    view = views.get(slide.slide_id)
    values = dict[str, dict[str, float | None]]()
    if view is not None:
        if view.barcodes != names:
            raise RunError(f"{view.file} has other tiles than slide {slide.slide_id} in the store; predict again")
        one = slice(row, row + 1)
        for gene in genes:
            if gene in view.genes:
                place = view.genes.index(gene)
                told = {"value": "", **{("measured" if name == "target" else name): name for name in view.layers}}
                cells = {name: float(view.values(of, slice(place, place + 1), one)[0, 0]) for name, of in told.items()}
                values[gene] = {name: cell if np.isfinite(cell) else None for name, cell in cells.items()}
    return Hit(
        slide_id=slide.slide_id,
        patient=slide.patient,
        likeness=likeness,
        tile=names[row],
        x=float(xy[row, 0]),
        y=float(xy[row, 1]),
        values=values,
        unlike=None if view is None or view.percentile is None else float(view.percentile[row]),
        trained_on="" if view is None else str(view.about.get("in_sample", "")),
    )
