"""How far a tile lies from what a head was trained on: training tiles kept beside the model, searched through FAISS.

The distance is that to the tenth nearest training tile: the root mean square difference of the embeddings' values, each
in standard deviations over those that are kept. (Sun et al., ICML 2022, tell so what is out of distribution; their
embeddings have unit length, while the length of these says something.) What it means is told by the training tiles'
own: each one's distance to the tiles of the other training slides, as if its slide were new; to as many fewer of them
as there are fewer tiles. A tile's percentile is the share of training tiles that lie nearer; where most tiles of a
slide have a high one, the slide is unlike what was trained on.

Letters: R reference tiles, d values per embedding, N tiles that are asked about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.heads.base import FeatureScaler

__all__ = ["REFERENCE", "UNLIKE", "Familiarity", "Reference"]

REFERENCE = "reference.safetensors"

UNLIKE = 99.0
"""The percentile beyond which a tile is flagged."""

_NEAREST = 10
_MOST = 5000  # tiles that are kept: 15 MB at 1,536 values, and 10,000 tiles are held against them in a second
_FEWEST = 10  # of each slide
_CLIP = 8.0


@dataclass(frozen=True)
class Familiarity:
    """How far N tiles lie from the training tiles."""

    distance: NDArray[np.float32]
    """N: to the tenth nearest of them, in standard deviations of a value."""
    percentile: NDArray[np.float32]
    """N: how many per cent of the training tiles lie nearer to those of other training slides."""

    @property
    def unlike(self) -> NDArray[np.bool_]:
        """N: whether a tile lies farther than all but a hundredth of the training tiles."""
        return self.percentile > UNLIKE


@dataclass(frozen=True)
class Reference:
    """Training tiles that others are held against."""

    keys: torch.Tensor
    """R × d, float32, scaled."""
    mean: torch.Tensor
    scale: torch.Tensor
    """d: of these tiles' embeddings."""
    own: NDArray[np.float32]
    """R, rising: how far each of them lies from those of other slides (of its own, where there is one slide)."""

    @classmethod
    def of(cls, train: Samples, seed: int) -> Reference:
        """Keep tiles of `train`, as many of each of its slides, drawn at random; no others are read."""
        draw = torch.Generator().manual_seed(seed)
        of_each = max(_FEWEST, _MOST // max(1, len(train.parts)))
        kept = torch.zeros(len(train), dtype=torch.bool)
        for part in train.parts:
            kept[torch.randperm(part.stop - part.start, generator=draw)[:of_each] + part.start] = True
        tiles = replace(train, target=None, raw=None, depth=None, truth=None).subset(kept.to(train.device))
        scaler = FeatureScaler(train.dim, _CLIP).to(train.device)
        scaler.fit(tiles)
        keys = _keys(scaler, tiles)
        slides = torch.cat([torch.full((part.stop - part.start,), i) for i, part in enumerate(tiles.parts)])
        return cls(keys, scaler.mean.cpu(), scaler.scale.cpu(), _own(keys, slides))

    def of_tiles(self, samples: Samples) -> Familiarity:
        """Say how far the tiles of `samples` lie from these."""
        scaler = FeatureScaler(len(self.mean), _CLIP)
        scaler.mean, scaler.scale = self.mean, self.scale
        scaler.to(samples.device)
        index = _index(self.keys.numpy())
        keys = _keys(scaler, samples)
        squares = index.search(keys.numpy(), min(_NEAREST, index.ntotal))[0][:, -1]
        distance = np.sqrt(np.maximum(squares, 0) / samples.dim).astype(np.float32)
        nearer = np.searchsorted(self.own, distance, side="left")
        return Familiarity(distance, (100 * nearer / max(1, len(self.own))).astype(np.float32))

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights."""
        from safetensors.torch import save_file

        values = {"keys": self.keys.half(), "mean": self.mean, "scale": self.scale, "own": torch.from_numpy(self.own)}
        save_file({name: value.contiguous() for name, value in values.items()}, folder / REFERENCE)

    @classmethod
    def load(cls, folder: Path) -> Reference | None:
        """Read what `save` wrote; None where a model has none, as those of earlier versions."""
        from safetensors.torch import load_file

        path = folder / REFERENCE
        if not path.is_file():
            return None
        try:
            found = load_file(path)
            return cls(found["keys"].float(), found["mean"].float(), found["scale"].float(), found["own"].numpy())
        except Exception as error:  # whatever is wrong with it; a changed file has been told apart before
            raise RunError(f"{path} cannot be read: {reason_of(error)}") from error


def _keys(scaler: FeatureScaler, samples: Samples) -> torch.Tensor:
    """Return tiles as they are compared: scaled, the mean over views; on the CPU."""
    out = torch.empty(len(samples), samples.dim)
    with torch.no_grad():
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            out[part] = scaler(samples.gather(rows, slice(None))).mean(1)
    return out


def _index(keys: NDArray[np.float32]) -> Any:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return index


def _own(keys: torch.Tensor, slide: torch.Tensor) -> NDArray[np.float32]:
    """Return how far each of the reference tiles lies from those of other slides, rising; R of each."""
    slides = len(torch.unique(slide))
    each, k = (torch.arange(len(keys)), _NEAREST) if slides == 1 else (slide, round(_NEAREST * (1 - 1 / slides)))
    others = len(keys) - int(torch.unique(each, return_counts=True)[1].max())
    if others < 1:
        return np.zeros(len(keys), np.float32)
    found = []
    for rows in torch.arange(len(keys)).split(1024):
        distance = torch.cdist(keys[rows], keys)
        distance[each[rows, None] == each] = torch.inf
        found.append(distance.topk(min(k, others), largest=False).values[:, -1])
    own: NDArray[np.float32] = (torch.cat(found).sort().values / keys.shape[1] ** 0.5).numpy()
    return own
