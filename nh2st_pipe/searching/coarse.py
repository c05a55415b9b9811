"""Search among more tiles than are held against a query one by one: a coarse index finds some, and those are compared.

Cells of k-means, and in each a code of a few bytes for every tile (IVF and product quantisation: Jégou, Douze & Schmid,
IEEE TPAMI 33, 2011), through FAISS. Of a query's nearest cells, the tiles whose codes are likest are held against it by
their own vectors, read from the index beside the store: what is told of a hit is exact, and only which tiles are
looked at is not. Tiles that may not be found are passed over in the cells already.

Letters: n tiles, d values, q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import StoreError, fault_of
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.recipes.values import Strict
from nh2st_pipe.searching.index import AGAIN, COARSE, Index, IndexedSlide
from nh2st_pipe.searching.scan import Found, nearest_tiles
from nh2st_pipe.store.format import Count

__all__ = ["EXACT_UP_TO", "Coarse", "coarse_of"]

EXACT_UP_TO = 5_000_000
"""Tiles up to which each is held against a query."""

_CELLS = 2  # times the root of the tiles
_LOOKED_AT = 0.04  # of the cells
_FEWEST_LOOKED_AT = 8
_COMPARED = 1000  # tiles whose vectors are read for a query
_OF_A_CELL = 40  # tiles that k-means sees
_VALUES_PER_BYTE = 8  # of a code


class _Span(Strict):
    """Where a slide's tiles are in the coarse index."""

    made_of: str
    start: Count
    tiles: Count


class _Spans(Strict):
    end: Count
    slides: dict[str, _Span]


@dataclass(frozen=True)
class Coarse:
    """A coarse index that is open."""

    cells: Any
    """FAISS's; ids are places of tiles."""
    spans: _Spans

    def nearest(
        self,
        queries: NDArray[np.float16],
        slides: Sequence[IndexedSlide],
        k: int,
        mask_of: Callable[[IndexedSlide], NDArray[np.bool_] | None] = lambda _: None,
    ) -> list[Found]:
        """Return the `k` likest tiles of each of q × d queries, as `scan.nearest_tiles` does; nearly always the same.

        Where no more than `EXACT_UP_TO` tiles may be found, each of them is looked at.
        """
        import faiss

        allowed = np.zeros(self.spans.end, np.bool_)
        for slide in slides:
            span, mask = self.spans.slides[slide.slide_id], mask_of(slide)
            allowed[span.start : span.start + span.tiles] = True if mask is None else mask
        if allowed.sum() <= EXACT_UP_TO:
            return nearest_tiles(queries, slides, k, mask_of)
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        looked_at = max(_FEWEST_LOOKED_AT, round(_LOOKED_AT * self.cells.nlist))
        asked = queries.astype(np.float32)
        parameters: Any = faiss.SearchParametersIVF()
        parameters.sel, parameters.nprobe = selector, min(looked_at, self.cells.nlist)
        places = self.cells.search(asked, max(k, _COMPARED), params=parameters)[1]
        return self._compared(asked, places, slides, k)

    def _compared(
        self, asked: NDArray[np.float32], places: NDArray[np.int64], slides: Sequence[IndexedSlide], k: int
    ) -> list[Found]:
        """Hold queries against the vectors of what was found for each, q × c places, -1 where there is none."""
        order = sorted(slides, key=lambda slide: self.spans.slides[slide.slide_id].start)
        starts = np.array([self.spans.slides[slide.slide_id].start for slide in order])
        distinct = np.unique(places[places >= 0])
        of = np.searchsorted(starts, distinct, side="right") - 1
        vectors = np.empty((len(distinct), asked.shape[1]), np.float32)
        for number in np.unique(of):
            mine = of == number
            vectors[mine] = order[number].vectors()[distinct[mine] - starts[number]]
        found = list[Found]()
        for query, row in zip(asked, places, strict=True):
            at = np.searchsorted(distinct, np.unique(row[row >= 0]))
            like = vectors[at] @ query
            best = np.argsort(-like, kind="stable")[:k]
            found.append(
                [
                    (float(like[i]), order[of[at[i]]].slide_id, int(distinct[at[i]] - starts[of[at[i]]]))
                    for i in best.tolist()
                ]
            )
        return found


def coarse_of(index: Index, *, progress: Progress | None = None) -> Coarse | None:
    """Make or renew the coarse index of an index, beside it, and open it; None where there are few tiles.

    Cells and codes are those of its first day, until the index is made anew; tiles of slides that have changed are
    taken out and in again. Raises StoreError where it is damaged.
    """
    if len(index) <= EXACT_UP_TO:
        return None
    import faiss

    progress = progress or Progress()
    file, listed = (index.path / name for name in COARSE)
    cells, spans = None, _Spans(end=0, slides={})
    if file.is_file() and listed.is_file():
        with fault_of(StoreError, f"{file} {AGAIN}"):
            spans = _Spans.model_validate_json(listed.read_bytes())
            cells = faiss.read_index(str(file))
            held = sum(span.tiles for span in spans.slides.values())
            if (cells.d, cells.ntotal) != (index.dim, held):
                raise ValueError(f"it holds {cells.ntotal:,} tiles of {cells.d:,} values, and {held:,} are expected")
    if cells is None:
        progress.say(f"{len(index):,} tiles: a coarse index of them is made, once")
        cells = _trained(index)
    changed = False
    now = {name: slide.made_of for name, slide in index.slides.items()}
    for name, span in list(spans.slides.items()):
        if now.get(name) != span.made_of:
            cells.remove_ids(faiss.IDSelectorRange(span.start, span.start + span.tiles))
            del spans.slides[name]
            changed = True
    end = spans.end
    progress.start("coarse index", len(index.slides), "slides")
    for number, (name, slide) in enumerate(index.slides.items()):
        progress.advance(number, len(index.slides), name)
        if name not in spans.slides:
            vectors = np.asarray(slide.vectors(), np.float32)
            cells.add_with_ids(vectors, np.arange(end, end + slide.tiles))
            spans.slides[name] = _Span(made_of=slide.made_of, start=end, tiles=slide.tiles)
            end, changed = end + slide.tiles, True
    spans = _Spans(end=end, slides=spans.slides)
    if changed:
        listed.unlink(missing_ok=True)  # a list without its cells is no index; cells without theirs are made anew
        with written_whole(file) as part:
            faiss.write_index(cells, str(part))
        with written_whole(listed) as part:
            part.write_text(spans.model_dump_json(), encoding="utf-8")
    return Coarse(cells, spans)


def _trained(index: Index) -> Any:
    """Return cells and codes found on some of the tiles, the same share of each slide."""
    import faiss

    n, d = len(index), index.dim
    number = max(1, round(_CELLS * n**0.5))
    share = min(1.0, max(number, 256) * _OF_A_CELL / n)
    some = [
        np.asarray(
            slide.vectors()[np.unique(np.linspace(0, slide.tiles - 1, max(1, round(share * slide.tiles))).astype(int))]
        )
        for slide in index.slides.values()
        if slide.tiles
    ]
    seen = np.concatenate(some).astype(np.float32)
    of_code = max(m for m in range(1, max(2, d // _VALUES_PER_BYTE + 1)) if d % m == 0)
    bits = min(8, int(np.log2(max(2, len(seen) // _OF_A_CELL))))
    cells: Any = faiss.index_factory(d, f"IVF{number},PQ{of_code}x{bits}", faiss.METRIC_INNER_PRODUCT)
    cells.cp.seed, cells.cp.niter, cells.cp.max_points_per_centroid = 1, 6, _OF_A_CELL
    cells.cp.min_points_per_centroid = 1
    cells.pq.cp.min_points_per_centroid = 1
    cells.train(seen)
    return cells
