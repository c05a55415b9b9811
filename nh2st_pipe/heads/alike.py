"""What the training spots that look most alike express: a prediction that never extrapolates.

Likeness is the sum over blocks of the cosine of two spots: the spot's embedding (the mean over views, less half of its
slide's own mean, scaled on the training spots as the baselines' are) and its Gaussian means at several widths. What is
compared are the leading principal components of embeddings, and then of the blocks side by side: exact where there are
no more values than components, and on real sections 64 of 1,280 find spots that express the same. The search is through
FAISS: exhaustive among up to 8,192 kept spots, among more in the nearest cells. What is returned are means of training
targets, each less its slide's own mean. Training spots that are compared with are kept in half precision, evenly over
slides where there are too many.

Letters: n spots of a slide, M spots that are kept, B blocks, d values per embedding, p and c components, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from nh2st_pipe.data.samples import Part, Samples
from nh2st_pipe.heads.blocks import Blur, centred_views

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import RetrievalPart

__all__ = ["Alike", "Expressing", "evenly"]

_CENTRING, _CLIP, _FLOOR = 0.5, 8.0, 0.1
_AT_ONCE = 4096  # spots that are searched for at a time
_GENES_AT_ONCE = 1024
_MOST_VALUES = 50_000_000  # targets that are kept: 100 MB
_EXHAUSTIVE = 8192  # kept spots up to which each is compared with
_CELLS_LOOKED_AT = 16  # of as many as the root of the kept spots


@dataclass(frozen=True)
class Alike:
    """Training spots, and what they express."""

    keys: NDArray[np.float16]
    """M × c: what is compared, so that an inner product is the sum of the blocks' cosines."""
    values: NDArray[np.float16]
    """M × G: targets less their slide's mean; NaN where the slide lacks the gene."""
    scale: NDArray[np.float32]
    """2 × d: what is taken off an embedding's values, and what they are divided by."""
    axes: NDArray[np.float32]
    """d × p: of the scaled embeddings."""
    mix: NDArray[np.float32]
    """(B · p) × c: of the blocks, each of unit length, side by side."""

    @classmethod
    def of(cls, recipe: RetrievalPart, train: Samples, seed: int) -> Alike:
        """Keep spots of `train`, `recipe.most` at most: as many of each slide as it has, up to an equal share. Fewer
        where genes are so many that their targets would take more than 100 MB.

        Scale and axes are those of the kept ones.
        """
        draw = torch.Generator().manual_seed(seed)
        sizes = [part.stop - part.start for part in train.parts]
        most = min(recipe.most, max(recipe.k, _MOST_VALUES // max(1, train.n_genes)))
        rows_of, kept, values = [], [], []
        for part, size, n in zip(train.parts, sizes, evenly(sizes, most), strict=True):
            rows = torch.randperm(size, generator=draw)[:n].sort().values
            target = train.targets(part.rows).double()
            rows_of.append(rows)
            kept.append(_embeddings(train, part)[rows.to(train.device)])
            values.append((target - target.mean(0)).half().cpu().numpy()[rows.numpy()])
        x = torch.cat(kept)
        scale = _scale(x)
        x = _scaled(x, scale)
        axes = _leading((x - x.mean(0)).double(), recipe.components)
        blocks = [
            _blocks(recipe, train, part, scale, axes, rows) for part, rows in zip(train.parts, rows_of, strict=True)
        ]
        mix = _leading(torch.cat(blocks).double(), recipe.components)
        arrays = (each.cpu().numpy() for each in (scale, axes, mix))
        return cls((torch.cat(blocks) @ mix).half().cpu().numpy(), np.concatenate(values), *arrays)

    def expressed(self, recipe: RetrievalPart, samples: Samples) -> NDArray[np.float32]:
        """Return N × G: the mean over the `recipe.k` kept spots most like each spot of `samples`, slide by slide."""
        return self.expressing(recipe, samples)(slice(None))

    def expressing(self, recipe: RetrievalPart, samples: Samples) -> Expressing:
        """Return what gives the same for some of the genes, N × g; the search is done once."""
        index = self._built
        scale, axes, mix = (torch.from_numpy(each).to(samples.device) for each in (self.scale, self.axes, self.mix))
        like = np.empty((len(samples), min(recipe.k, index.ntotal)), np.int64)
        for part in samples.parts:
            keys = (_blocks(recipe, samples, part, scale, axes) @ mix).cpu().numpy()
            for start in range(0, len(keys), _AT_ONCE):
                found = index.search(keys[start : start + _AT_ONCE], min(recipe.k, index.ntotal))[1]
                found = np.where(found < 0, found[:, :1], found)  # cells that hold fewer than k: the nearest stands in
                like[part.start + start : part.start + start + len(found)] = found
        return Expressing(self.values, like)

    @cached_property
    def _built(self) -> Any:
        return self._index()  # for one slide after another

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_built"}

    def _index(self) -> Any:
        """Return a FAISS index of the kept spots."""
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        keys = self.keys.astype(np.float32)
        index: Any = faiss.IndexFlatIP(keys.shape[1])
        if len(keys) > _EXHAUSTIVE:
            cells = round(len(keys) ** 0.5)
            index = faiss.IndexIVFFlat(index, keys.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter, index.cp.max_points_per_centroid, index.nprobe = 5, 39, _CELLS_LOOKED_AT
            index.train(keys)
        index.add(keys)
        return index


@dataclass(frozen=True)
class Expressing:
    """What the kept spots most like each of N spots express."""

    values: NDArray[np.float16]
    """M × G, of the kept spots."""
    like: NDArray[np.int64]
    """N × k of these."""

    def __call__(self, genes: slice) -> NDArray[np.float32]:
        """Return N × g."""
        return self._means(self.values[:, genes].astype(np.float32))

    def onto(self, basis: NDArray[np.float64]) -> NDArray[np.float32] | None:
        """Return N × r, all genes' values times a basis G × r; None where spots lack genes."""
        total = np.zeros((len(self.values), basis.shape[1]), np.float32)
        for start in range(0, len(basis), _GENES_AT_ONCE):
            genes = slice(start, start + _GENES_AT_ONCE)
            total += self.values[:, genes].astype(np.float32) @ basis[genes].astype(np.float32)
        return self._means(total) if np.isfinite(total).all() else None

    def _means(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        complete = bool(np.isfinite(values).all())
        out = np.empty((len(self.like), values.shape[1]), np.float32)
        for start in range(0, len(out), _AT_ONCE):
            out[start : start + _AT_ONCE] = _mean(values, self.like[start : start + _AT_ONCE], complete)
        return out


def evenly(sizes: Sequence[int], most: int) -> list[int]:
    """Return how many of each, `most` in all where there are more: up to an equal share, which grows by what smaller
    ones leave of theirs.
    """
    out, left = [0] * len(sizes), most
    for done, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        out[i] = min(sizes[i], left // (len(sizes) - done))
        left -= out[i]
    return out


def _mean(values: NDArray[np.float32], found: NDArray[np.int64], complete: bool) -> NDArray[np.float32]:
    """Return n × G from rows n × k, without n × k × G in memory. 0 for what none of them has."""
    rows = torch.from_numpy(found)
    if complete:
        return np.asarray(F.embedding_bag(rows, torch.from_numpy(values), mode="mean").numpy())
    known = np.isfinite(values)
    total, count = (
        F.embedding_bag(rows, torch.from_numpy(each.astype(np.float32)), mode="sum").numpy()
        for each in (np.where(known, values, 0), known)
    )
    return np.asarray(total / np.maximum(count, 1), np.float32)


def _scale(x: torch.Tensor) -> torch.Tensor:
    """Return mean and scale of embeddings N × d, as `heads.base.FeatureScaler` has them."""
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    return torch.stack((mean, torch.maximum(std, _FLOOR * std.quantile(0.5)).clamp(min=1e-6))).float()


def _scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((x - scale[0]) / scale[1]).clamp_(-_CLIP, _CLIP)


def _leading(x: torch.Tensor, most: int) -> torch.Tensor:
    """Return the leading right singular vectors of N × d, d × p, float32."""
    vectors: torch.Tensor = torch.linalg.eigh(x.T @ x)[1]
    return vectors.flip(1)[:, :most].float().contiguous()


def _embeddings(samples: Samples, part: Part) -> torch.Tensor:
    views = centred_views(samples, part, _CENTRING, torch.float32)
    x = next(views)
    for view in views:
        x += view
    return x.div_(samples.n_views)


@torch.no_grad()
def _blocks(
    recipe: RetrievalPart,
    samples: Samples,
    part: Part,
    scale: torch.Tensor,
    axes: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return n × (B · p) of one slide; with `rows`, of those of its spots alone."""
    x = _scaled(_embeddings(samples, part), scale) @ axes
    blur = Blur(replace(part, start=0, stop=len(x)), recipe.sigmas, samples.device, torch.float32)
    return torch.cat([F.normalize(block) for block in blur(x, None if rows is None else rows.to(x.device))], 1)
