from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.data.samples import Part, ResidentCache, Samples
from nh2st_pipe.evaluation import reference
from nh2st_pipe.evaluation.reference import REFERENCE, Reference

DIM = 12


def samples_of(*slides: np.ndarray) -> Samples:
    """Return samples of slides, each n × V × d."""
    ends = np.cumsum([0, *(len(slide) for slide in slides)]).tolist()
    parts = tuple(
        Part(f"s{i}", start, stop, np.zeros((stop - start, 2)))
        for i, (start, stop) in enumerate(itertools.pairwise(ends))
    )
    views = torch.from_numpy(np.concatenate(slides).astype(np.float16))
    rows = torch.arange(len(views))
    return Samples(ResidentCache(views), rows, rows[:, None], parts=parts)


def tiles(seed: int, n: int, towards: float = 0.0) -> np.ndarray:
    """Return n tiles in two views, of a cloud that lies `towards` a corner."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (n, 1, DIM)) + rng.normal(0, 0.1, (n, 2, DIM)) + towards


def test_a_slide_like_the_others_has_percentiles_like_theirs_and_another_has_high_ones() -> None:
    kept = Reference.of(samples_of(*(tiles(seed, 300) for seed in range(3))), seed=1)
    like, unlike = (kept.of_tiles(samples_of(tiles(9, 400, towards))) for towards in (0.0, 4.0))
    assert 40 < like.percentile.mean() < 60
    assert like.unlike.mean() < 0.03
    assert unlike.percentile.min() > 99
    assert unlike.unlike.all()
    assert unlike.distance.min() > like.distance.mean()


def test_distances_are_to_the_tenth_nearest_and_the_own_ones_to_other_slides() -> None:
    slides = [tiles(seed, 30) for seed in range(3)]
    train = samples_of(*slides)
    kept = Reference.of(train, seed=1)
    x = train.cache.gather(torch.arange(90), slice(None)).float().numpy()
    flat = x.reshape(-1, DIM)
    scaled = np.clip((x - flat.mean(0)) / flat.std(0), -8, 8).mean(1)
    apart = np.sqrt(np.square(scaled[:, None] - scaled).mean(2))
    new = kept.of_tiles(samples_of(tiles(7, 5)))
    assert kept.of_tiles(train).distance == pytest.approx(np.sort(apart, 1)[:, 9], abs=1e-3)
    slide = np.repeat(np.arange(3), 30)
    apart[slide[:, None] == slide] = np.inf
    assert kept.own == pytest.approx(np.sort(np.sort(apart, 1)[:, 6]), abs=1e-3)  # 10 · 2/3
    assert new.percentile == pytest.approx([100 * (kept.own < d).mean() for d in new.distance])


def test_a_single_slide_is_held_against_itself() -> None:
    kept = Reference.of(samples_of(tiles(0, 40)), seed=1)
    assert kept.own.min() > 0.01, "a tile's distance to itself is none"
    few = Reference.of(samples_of(tiles(0, 1)), seed=1)
    assert few.own.tolist() == [0.0]
    assert few.of_tiles(samples_of(tiles(1, 3))).percentile.tolist() == [100.0] * 3


def test_large_studies_keep_as_many_tiles_of_each_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MOST", 60)
    assert len(Reference.of(samples_of(*(tiles(seed, 50) for seed in range(3))), seed=1).keys) == 60
    assert len(Reference.of(samples_of(*(tiles(seed, 50) for seed in range(8))), seed=1).keys) == 80


def test_what_is_kept_beside_a_model_says_the_same(tmp_path: Path) -> None:
    kept = Reference.of(samples_of(tiles(0, 50), tiles(1, 50)), seed=1)
    kept.save(tmp_path)
    loaded = Reference.load(tmp_path)
    assert loaded is not None
    asked = samples_of(tiles(3, 20))
    assert loaded.of_tiles(asked).distance == pytest.approx(kept.of_tiles(asked).distance, abs=1e-3)
    assert Reference.load(tmp_path / "elsewhere") is None
    (tmp_path / REFERENCE).write_bytes(b"no tensors")
    with pytest.raises(RunError, match=rf"{REFERENCE} cannot be read"):
        Reference.load(tmp_path)
