from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import openslide
import pytest

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.synthetic import GENES, OTHERS, generate, neighbour_mean
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.tiles.spots import read_spots

GRID = 5


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("demo"), n_slides=2, grid=GRID, seed=3)


@pytest.fixture(scope="module")
def sections(manifest: Path) -> list[anndata.AnnData]:
    return [anndata.read_h5ad(row.expression) for row in read_manifest(manifest)]


def test_the_manifest_names_slides_of_a_patient_each(manifest: Path) -> None:
    rows = read_manifest(manifest)
    assert [row.slide_id for row in rows] == ["demo-1", "demo-2"]
    assert len({row.patient for row in rows}) == 2
    assert not list(manifest.parent.glob("*.part"))


def test_openslide_reads_the_slides_as_pyramids_of_known_resolution(manifest: Path) -> None:
    for row in read_manifest(manifest):
        assert openslide.OpenSlide.detect_format(str(row.slide)) == "generic-tiff"
        slide = open_slide(row.slide)
        assert slide.mpp == pytest.approx(0.5)
        assert slide.steps == ((1, 1), (2, 2), (4, 4))
        assert slide.size == ((GRID + 1) * 224,) * 2
        assert slide.read_region(0, 0, 8, 8, 0).min() > 225, "the margin is glass"
        slide.close()


def test_every_spot_has_its_tile_on_tissue(manifest: Path) -> None:
    for row in read_manifest(manifest):
        assert row.expression is not None
        spots = read_spots(row.expression)
        slide = open_slide(row.slide)
        assert len(spots) == GRID**2
        assert spots.array_row is not None
        assert spots.array_col is not None
        assert np.array_equal(spots.xy, np.column_stack((spots.array_col, spots.array_row)) * 224.0 + 224)
        for x, y in spots.xy.astype(int):
            tile = slide.read_region(x - 112, y - 112, 224, 224, 0)
            assert tile[..., 1].mean() < 230
        slide.close()


def test_the_same_seed_gives_the_same_slides_and_another_seed_others(manifest: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", n_slides=1, grid=GRID, seed=3).parent
    other = generate(tmp_path / "other", n_slides=1, grid=GRID, seed=4).parent
    pixels = [open_slide(folder / "demo-1.tif") for folder in (manifest.parent, again, other)]
    first, same, different = (slide.read_region(0, 0, *slide.size, 0) for slide in pixels)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, different)
    counts = [anndata.read_h5ad(folder / "demo-1.h5ad").X.toarray() for folder in (manifest.parent, again, other)]
    assert np.array_equal(counts[0], counts[1])
    assert not np.array_equal(counts[0], counts[2])


def test_expected_rates_follow_the_rule_as_it_is_written(sections: list[anndata.AnnData]) -> None:
    for data in sections:
        assert list(data.var_names) == [*GENES, *OTHERS]
        own, base, weights = data.uns["fields"], data.uns["log_base"], data.uns["weights"]
        around = np.empty_like(own)
        place = data.obs[["array_row", "array_col"]].to_numpy()
        for i, spot in enumerate(place):  # the plain way: every spot at most one step away, but not itself
            near = np.abs(place - spot).max(axis=1) == 1
            around[i] = own[near].mean(axis=0)
        assert np.allclose(neighbour_mean(own.reshape(GRID, GRID, 3)).reshape(-1, 3), around)
        local = np.exp(base[:20] + own @ weights[:20].T)
        neighbour = np.exp(base[20:40] + around @ weights[20:40].T)
        noise = np.tile(np.exp(base[40:]), (GRID**2, 1))
        assert not weights[40:].any()
        assert np.allclose(data.uns["expected_rate"], np.hstack((local, neighbour, noise)), rtol=1e-5)


def test_counts_follow_their_rates(sections: list[anndata.AnnData]) -> None:
    counts = np.vstack([data.X[:, :60].toarray() / data.uns["depth"][:, None] for data in sections])
    rates = np.vstack([data.uns["expected_rate"] for data in sections])
    pcc = [np.corrcoef(counts[:, g], rates[:, g])[0, 1] for g in range(40)]
    assert np.median(pcc[:20]) > 0.8
    assert np.median(pcc[20:]) > 0.8
    assert np.allclose(rates[:, 40:], rates[0, 40:])
    followed = sum(data.X[:, :40].sum() for data in sections)
    assert followed < 0.1 * sum(data.X.sum() for data in sections)


def test_slides_share_the_rule_and_not_the_fields(sections: list[anndata.AnnData]) -> None:
    one, two = (data.uns for data in sections)
    assert np.array_equal(one["weights"], two["weights"])
    assert not np.allclose(one["fields"], two["fields"])


def test_the_image_shows_the_fields(manifest: Path, sections: list[anndata.AnnData]) -> None:
    dark, pink, density, colour = [], [], [], []
    for row, data in zip(read_manifest(manifest), sections, strict=True):
        slide = open_slide(row.slide)
        for x, y in data.obsm["spatial"].astype(int):
            tile = slide.read_region(x - 112, y - 112, 224, 224, 0).astype(float)
            nuclei = tile[..., 0] < 165
            dark.append(nuclei.mean())
            pink.append(-np.median(tile[..., 1][~nuclei]))
        density += list(data.uns["fields"][:, 0])
        colour += list(data.uns["fields"][:, 1])
        slide.close()
    assert np.corrcoef(dark, density)[0, 1] > 0.6
    assert np.corrcoef(pink, colour)[0, 1] > 0.8


@pytest.mark.parametrize(("n_slides", "grid"), [(0, 5), (1, 1)])
def test_nothing_to_write_is_refused(tmp_path: Path, n_slides: int, grid: int) -> None:
    with pytest.raises(UsageError, match="at least 1 slide"):
        generate(tmp_path / "none", n_slides=n_slides, grid=grid)
    assert not (tmp_path / "none").exists()
