"""Spots as a head sees them: embeddings gathered from a cache, and what is known of each spot beside them.

The embeddings of a study are put on the device once (`Cache`). `Samples` are rows of it: those of a fold's training
slides, or of one slide that is predicted. They copy nothing; `gather` is all that a head asks of the embeddings, and
what does not fit is streamed from disk (`data.streamed`).

Letters: N spots of the samples, V dihedral views, d values per embedding, K spots in a neighbourhood, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.memory import require
from nh2st_pipe.core.names import part_name
from nh2st_pipe.data.counts import Counts
from nh2st_pipe.data.smoothing import grid_mean, near_mean
from nh2st_pipe.data.truth import Cut, Truth

if TYPE_CHECKING:
    from nh2st_pipe.data.targets import StreamedTargets, Targets
    from nh2st_pipe.store.read import SlideData

__all__ = ["Cache", "Part", "ResidentCache", "Samples"]

_GENES_AT_ONCE = 2048  # whose smoothed values are held in double precision
_CHUNK_VALUES = 1 << 21  # of all views together: 16 MiB where they are taken to float64


class Cache(Protocol):
    """The embeddings of all spots of a study, M × V × d."""

    @property
    def n_views(self) -> int:
        """V."""
        ...

    @property
    def dim(self) -> int:
        """d."""
        ...

    @property
    def device(self) -> torch.device:
        """Where `gather` puts what it returns."""
        ...

    def gather(self, rows: torch.Tensor, views: int | torch.Tensor | slice) -> torch.Tensor:
        """Return the embeddings of `rows` (int64, any shape), each in its view of `views`, … × d, float16.

        `views` is one view for all, a tensor that broadcasts with `rows`, or slice(None) for all views, … × V × d.
        """
        ...

    def place(self, start: int, stop: int) -> AbstractContextManager[torch.Tensor]:
        """Give the rows `start` to `stop` to be written, n × V × d."""
        ...


@dataclass(frozen=True)
class ResidentCache:
    """A cache that lies on the device, whole."""

    views: torch.Tensor
    """M × V × d, float16."""

    @property
    def n_views(self) -> int:
        """See Cache."""
        return self.views.shape[1]

    @property
    def dim(self) -> int:
        """See Cache."""
        return self.views.shape[2]

    @property
    def device(self) -> torch.device:
        """See Cache."""
        return self.views.device

    def gather(self, rows: torch.Tensor, views: int | torch.Tensor | slice) -> torch.Tensor:
        """See Cache."""
        return self.views[rows, views]

    def place(self, start: int, stop: int) -> AbstractContextManager[torch.Tensor]:
        """See Cache."""
        return nullcontext(self.views[start:stop])


@dataclass(frozen=True)
class Part:
    """The spots of one slide among samples: rows `start` to `stop`."""

    slide_id: str
    start: int
    stop: int
    xy: NDArray[np.float64]
    """n × 2, level-0 px."""
    grid: NDArray[np.int64] | None = None
    """n × 2: array_row, array_col."""
    stain_shift: NDArray[np.float32] | None = None
    """S × d: mean shift of its embeddings under synthetic stains, where that is known."""
    block: int | None = None
    """Which block of the slide it is; None for all of it."""
    counts: Counts | None = None
    """Where its raw counts are; None where it has none."""
    slide_vector: NDArray[np.float32] | None = None
    """What an encoder of whole slides says of it; None where it has none, or several."""
    slide_vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """All of those, by the encoders' names."""

    @property
    def name(self) -> str:
        """The slide's, with the number of the block where it is one."""
        return part_name(self.slide_id, self.block)

    @property
    def rows(self) -> slice:
        """The slide's rows."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Samples:
    """Spots of one or more slides, slide by slide, on the cache's device."""

    cache: Cache
    rows: torch.Tensor
    """N, int64: each spot's row of the cache."""
    neighbours: torch.Tensor
    """N × K, int64: rows of these samples, the spot itself first; it stands in where it has fewer neighbours."""
    target: torch.Tensor | None = None
    """N × G, float32: what is judged. NaN, for all spots of a slide, where it lacks the gene."""
    raw: torch.Tensor | None = None
    """N × G, float32: the target before smoothing (`target` itself where nothing is smoothed)."""
    depth: torch.Tensor | None = None
    """N, float64: counts of each spot over all genes that slides have in common."""
    parts: tuple[Part, ...] = ()
    smoothed: bool = False
    """Whether the target is a mean over grid neighbours."""
    truth: Truth | None = None
    """What makes the target where it does not lie in memory: `target` and `raw` are None then."""
    spare: int | None = None
    """How many bytes a head may keep in memory beside them; None as many as it wants."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_views(self) -> int:
        """V."""
        return self.cache.n_views

    @property
    def dim(self) -> int:
        """d."""
        return self.cache.dim

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.rows.device

    @property
    def resident(self) -> bool:
        """Whether the embeddings lie on the device, so that `gather` is work of the device alone."""
        return isinstance(self.cache, ResidentCache)

    @classmethod
    def of(
        cls,
        slides: Sequence[SlideData],
        targets: Sequence[Targets] | StreamedTargets | None = None,
        *,
        neighbours: int,
        device: torch.device | None = None,
        cache: Cache | None = None,
        places: Sequence[NDArray[np.int64]] | None = None,
        smoothed: bool = False,
        spare: int | None = None,
    ) -> Samples:
        """Put slides behind each other; rows of neighbours count on from slide to slide.

        `places` are the slides' rows of `cache`. Without a cache one is made of the slides' own views. Targets that are
        streamed stay so.
        """
        if cache is None:
            views = slides[0].views if len(slides) == 1 else np.concatenate([slide.views for slide in slides])
            cache = ResidentCache(torch.from_numpy(np.ascontiguousarray(views)).to(device))
            ends = np.cumsum([len(slide) for slide in slides])
            places = [np.arange(end - len(slide), end) for slide, end in zip(slides, ends, strict=True)]
        assert places is not None
        device = cache.device
        tables, rows, parts, offset = [], [], [], 0
        for slide, place in zip(slides, places, strict=True):
            n = len(slide)
            table = slide.neighbours[:, :neighbours].astype(np.int64)
            tables.append(np.where(table < 0, np.arange(n)[:, None], table) + offset)
            rows.append(place)
            parts.append(
                Part(
                    slide.slide_id,
                    offset,
                    offset + n,
                    slide.xy,
                    slide.grid,
                    slide.stain_shift,
                    slide.block,
                    Counts.of(slide),
                    slide.slide_vector,
                    slide.slide_vectors,
                )
            )
            offset += n
        truth, made = None, list[Any]()
        if isinstance(targets, Mapping):
            truth = Truth.whole(targets, [part.name for part in parts])
            depths = [targets.depth(part.name) for part in parts]
        else:
            made = list(targets or ())
            depths = [each.depth for each in made]
        values, raw = ([getattr(each, name) for each in made] for name in ("values", "raw"))
        same = all(v is r for v, r in zip(values, raw, strict=True))
        target = torch.from_numpy(np.concatenate(values)).to(device) if made else None
        return cls(
            cache=cache,
            rows=torch.from_numpy(np.concatenate(rows)).to(device),
            neighbours=torch.from_numpy(np.concatenate(tables)).to(device),
            target=target,
            raw=target if same else torch.from_numpy(np.concatenate(raw)).to(device),
            depth=torch.from_numpy(np.concatenate(depths)).to(device) if depths else None,
            parts=tuple(parts),
            smoothed=smoothed,
            truth=truth,
            spare=spare,
        )

    @property
    def n_genes(self) -> int:
        """G; 0 without targets."""
        if self.truth is not None:
            return self.truth.n_genes
        return 0 if self.target is None else self.target.shape[1]

    def targets(self, rows: slice) -> torch.Tensor:
        """Return what is judged of the spots `rows`, b × G, float32, wherever targets are."""
        if self.truth is None:
            assert self.target is not None
            return self.target[rows]
        return self._made(rows, self.truth, 0)

    def raws(self, rows: slice) -> torch.Tensor:
        """Return the same before smoothing."""
        if self.truth is None:
            assert self.raw is not None
            return self.raw[rows]
        return self._made(rows, self.truth, 1)

    def _made(self, rows: slice, truth: Truth, which: int) -> torch.Tensor:
        start, stop, _ = rows.indices(len(self))
        found = []
        for i, part in enumerate(self.parts):
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                found.append(truth.made(i)[which][first - part.start : last - part.start])
        return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found)).to(self.device)

    def target_mean(self) -> torch.Tensor:
        """Return the mean of each gene over all spots, G, float64: NaN where a slide lacks it."""
        slides = self.parts or (Part("", 0, len(self), np.zeros((len(self), 2))),)
        total = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        for part in slides:
            total += self.targets(part.rows).double().sum(0)
        return total / len(self)

    def in_memory(self) -> Samples:
        """Return the same with its targets in memory, for heads that need them all at once.

        Raises TrainError where they do not fit.
        """
        if self.truth is None:
            return self
        size = 4 * len(self) * self.n_genes * (2 if self.smoothed else 1)
        what = f"targets of {len(self):,} spots and {self.n_genes:,} genes, which this head needs all at once,"
        require(size, what, TrainError, "train on fewer genes (--genes), or nh2st-context or ridge-context")
        shape = len(self), self.n_genes
        raw = torch.empty(shape)
        target = torch.empty(shape) if self.smoothed else raw
        for i, part in enumerate(self.parts):
            values, before = (torch.from_numpy(each) for each in self.truth.made(i))
            raw[part.rows] = before
            target[part.rows] = values
        raw = raw.to(self.device)
        return replace(self, target=target.to(self.device) if self.smoothed else raw, raw=raw, truth=None)

    def gather(self, rows: torch.Tensor, views: int | torch.Tensor | slice) -> torch.Tensor:
        """Return the embeddings of `rows` of these samples, each in its view; see Cache.gather."""
        return self.cache.gather(self.rows[rows], views)

    def counts(self, rows: torch.Tensor, genes: Sequence[str]) -> torch.Tensor:
        """Return the raw counts of `rows` of these samples, b × len(genes), float32; NaN for what a slide lacks.

        Of any genes, also beyond the panel: for losses that need counts. They are read from the slides' sparse
        matrices, on the CPU.
        """
        asked = rows.cpu().numpy()
        out = np.full((len(asked), len(genes)), np.nan, np.float32)
        for part in self.parts:
            mine = np.flatnonzero((asked >= part.start) & (asked < part.stop))
            if len(mine) and part.counts is not None:
                out[mine] = part.counts.values(asked[mine] - part.start, genes)
        return torch.from_numpy(out).to(rows.device)

    def chunks(self) -> list[slice]:
        """Return slices of the spots, small enough that work in float64 takes little beside the cache."""
        step = max(1, _CHUNK_VALUES // (self.n_views * self.dim))
        return [slice(i, min(i + step, len(self))) for i in range(0, len(self), step)]

    def of_part(self, part: Part) -> Samples:
        """Return the spots of one slide of these, whole."""
        if len(self.parts) == 1:
            return self
        own, n = part.rows, part.stop - part.start
        raw = None if self.raw is None else self.raw[own]
        return replace(
            self,
            rows=self.rows[own],
            neighbours=self.neighbours[own] - part.start,
            target=raw if self.raw is self.target else None if self.target is None else self.target[own],
            raw=raw,
            depth=None if self.depth is None else self.depth[own],
            parts=(replace(part, start=0, stop=n),),
            truth=None if self.truth is None else self.truth.only([self._place(part)], [None]),
        )

    def _place(self, part: Part) -> int:
        return next(i for i, each in enumerate(self.parts) if each.start == part.start)

    def by_genes(self) -> list[tuple[torch.Tensor, Samples]]:
        """Return the genes in groups that the same slides have: columns of the target, and those slides' spots.

        The spots' targets have the group's columns alone, and no NaN. A gene that no slide has is in no group.
        """
        slides = self.parts or (Part("", 0, len(self), np.zeros((len(self), 2))),)
        if self.truth is not None:
            has = torch.from_numpy(np.stack([self.truth.has(i) for i in range(len(slides))])).to(self.device)
        else:
            assert self.target is not None
            has = torch.stack([torch.isfinite(self.target[part.rows]).all(0) for part in slides])
        if has.all():
            return [(torch.arange(has.shape[1], device=self.device), self)]
        patterns, of_gene = torch.unique(has.T, dim=0, return_inverse=True)
        groups = []
        for i, pattern in enumerate(patterns):
            if not pattern.any():
                continue
            genes = torch.nonzero(of_gene == i)[:, 0]
            kept = torch.zeros(len(self), dtype=torch.bool, device=self.device)
            for part, mine in zip(slides, pattern.tolist(), strict=True):
                kept[part.rows] = mine
            spots = self if bool(kept.all()) else self.subset(kept)
            if spots.truth is not None:
                groups.append((genes, replace(spots, truth=spots.truth.of_genes(genes.cpu().numpy()))))
                continue
            assert spots.target is not None
            assert spots.raw is not None
            target = spots.target[:, genes]
            raw = target if spots.raw is spots.target else spots.raw[:, genes]
            groups.append((genes, replace(spots, target=target, raw=raw)))
        return groups

    def subset(self, kept: torch.Tensor, *, smooth_anew: bool = True) -> Samples:
        """Return the spots that the N booleans `kept` mark; a spot stands in for neighbours that were left out.

        Where part of a slide is left out, the target of the others is smoothed anew over those that are kept, so that
        no count on one side of a border reaches the other; not so with `smooth_anew=False`, for a sample of spots that
        nothing is judged by.
        """
        rows = torch.nonzero(kept)[:, 0]
        own = torch.arange(len(rows), device=rows.device)
        place = torch.full((len(self),), -1, dtype=torch.int64, device=rows.device)
        place[rows] = own
        around = place[self.neighbours[rows]]
        parts, apart, offset = list[Part](), list[Part](), 0
        taken, cuts = list[int](), list[Cut | None]()
        for i, part in enumerate(self.parts):
            inside = kept[part.rows].cpu().numpy()
            n = int(inside.sum())
            if not n:
                continue
            grid = None if part.grid is None else part.grid[inside]
            counts = None if part.counts is None else part.counts.subset(inside)
            cut = replace(part, start=offset, stop=offset + n, xy=part.xy[inside], grid=grid, counts=counts)
            parts.append(cut)
            whole = n == part.stop - part.start
            if not whole:
                apart.append(cut)
            offset += n
            taken.append(i)
            if self.truth is not None:
                mean = _mean_of(cut) if smooth_anew and self.smoothed and not whole else None
                cuts.append(None if whole else Cut(np.flatnonzero(inside), mean))
        raw = None if self.raw is None else self.raw[rows]
        target = raw if self.raw is self.target else None if self.target is None else self.target[rows]
        if smooth_anew and self.smoothed and raw is not None and target is not None and target is not raw:
            for part in apart:
                smoothed = _mean_of(part) @ raw[part.rows].double().cpu().numpy()
                target[part.rows] = torch.from_numpy(smoothed).to(target)
        return replace(
            self,
            rows=self.rows[rows],
            neighbours=torch.where(around < 0, own[:, None], around),
            target=target,
            raw=raw,
            depth=None if self.depth is None else self.depth[rows],
            parts=tuple(parts),
            truth=None if self.truth is None else self.truth.only(taken, cuts),
        )

    @cached_property
    def _means(self) -> list[tuple[Part, Any]]:
        return [(part, _mean_of(part)) for part in self.parts]

    def smooth(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return N × G predictions, of the same kind, smoothed as the target is: not at all where that is not.

        On a slide without array positions the spots within 1.5 pitches stand in for the grid neighbours.
        """
        if not self.smoothed:
            return values
        out = np.empty_like(values)
        for part, mean in self._means:
            for start in range(0, values.shape[1], _GENES_AT_ONCE):
                place = part.rows, slice(start, start + _GENES_AT_ONCE)
                out[place] = mean @ values[place]
        return out


def _mean_of(part: Part) -> Any:
    return grid_mean(part.grid) if part.grid is not None else near_mean(part.xy)
