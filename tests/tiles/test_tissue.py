from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import thumbnail
from nh2st_pipe.tiles.geometry import on_tissue, tissue_notices
from nh2st_pipe.tiles.masks import mask_from_image
from nh2st_pipe.tiles.tissue import tissue_mask, tissue_of
from tests.conftest import blank


def test_tissue_is_found_by_its_colour(tmp_path: Path) -> None:
    pixels = np.full((300, 400, 3), 245, np.uint8)
    pixels[80:220, 100:300] = (200, 120, 170)
    pixels[:, :10] = 0  # the black border of a scan
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    mask = tissue_mask(open_slide(tmp_path / "slide.png"))
    truth = np.zeros((300, 400), bool)
    truth[80:220, 100:300] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


def test_tissue_given_as_mask_or_geojson(tmp_path: Path) -> None:
    slide = open_slide(blank(tmp_path))
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 20:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert np.array_equal(tissue_mask(slide, tmp_path / "mask.png"), mask > 0)
    ring = [[100, 50], [300, 50], [300, 250], [100, 250], [100, 50]]
    hole = [[150, 100], [200, 100], [200, 150], [150, 150], [150, 100]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring, hole]}}
    (tmp_path / "t.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    drawn = tissue_mask(slide, tmp_path / "t.geojson")
    assert drawn.sum() == pytest.approx(200 * 200 - 50 * 50, rel=0.03)
    assert drawn[200, 250]
    assert not drawn[125, 175]
    for text in ("no json", "[]", '{"type": "Point", "coordinates": [1, 2]}', '{"type": "FeatureCollection"}'):
        (tmp_path / "bad.geojson").write_text(text)
        with pytest.raises(SlideError, match=r"bad\.geojson"):
            tissue_mask(slide, tmp_path / "bad.geojson")


def test_a_mask_may_be_larger_than_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # more than twice as many px would be an error
    Image.new("1", (40, 30), 1).save(tmp_path / "m.png")
    assert mask_from_image(tmp_path / "m.png").all()
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_boolean_mask_is_taken_as_it_is_stored(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:9, 7:20] = True
    for photometric in ("miniswhite", "minisblack"):
        tifffile.imwrite(tmp_path / "m.tif", mask, photometric=photometric)
        assert np.array_equal(mask_from_image(tmp_path / "m.tif"), mask), photometric
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert np.array_equal(mask_from_image(tmp_path / "m.png"), mask)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"type": "FeatureCollection", "features": 3}',
        '{"type": "Polygon", "coordinates": [[["a", 1], [2, 3], [4, 5]]]}',
        '{"type": "Polygon", "coordinates": [[1, 2], [3, 4]]}',
        "7",
        "not JSON",
    ],
)
def test_an_outline_that_is_none_is_a_fault_of_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "o.geojson").write_text(text)
    with pytest.raises(SlideError, match=r"tissue outline .*o\.geojson"):
        tissue_mask(open_slide(blank(tmp_path)), tmp_path / "o.geojson")


def test_features_may_stand_in_a_plain_list(tmp_path: Path) -> None:
    square = {"type": "Polygon", "coordinates": [[[10, 10], [90, 10], [90, 90], [10, 90]]]}
    (tmp_path / "o.geojson").write_bytes(
        b"\xef\xbb\xbf" + json.dumps([{"type": "Feature", "geometry": square}]).encode()
    )
    mask = tissue_mask(open_slide(blank(tmp_path)), tmp_path / "o.geojson")
    assert mask[50, 50]
    assert not mask[150, 150]


def test_outlines_are_counted_from_where_qupath_counts(tmp_path: Path) -> None:
    ring = {"type": "Polygon", "coordinates": [[[0, 0], [50, 0], [50, 40], [0, 40]]]}
    (tmp_path / "o.geojson").write_text(json.dumps(ring))
    slide = open_slide(blank(tmp_path))
    slide.origin = 200, 100
    rows, columns = np.nonzero(tissue_mask(slide, tmp_path / "o.geojson"))
    assert (rows.min(), columns.min()) == (100, 200)
    assert abs(rows.max() - 140) <= 1


def stained(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Tissue as it looks from afar: pink, with darker nuclei scattered over it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), (205, 150, 185), np.float64)
    nuclei = rng.random((height // 8 + 1, width // 8 + 1)) < 0.35
    pixels[np.kron(nuclei, np.ones((8, 8), bool))[:height, :width]] = (115, 70, 150)
    return np.asarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255), np.uint8)


def test_a_picture_that_is_all_tissue_is_all_tissue() -> None:
    assert tissue_of(stained(300, 400)).mean() > 0.99


@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 0, 100), (20, 25, 80), (60, 60, 60), (255, 255, 255)])
@pytest.mark.parametrize("ground", [245, None])
def test_what_a_program_filled_in_is_no_tissue(padding: tuple[int, int, int], ground: int | None) -> None:
    pixels = np.empty((300, 400, 3), np.uint8)
    pixels[:] = padding
    pixels[40:260, 60:400] = stained(220, 340) if ground is None else ground
    pixels[80:220, 100:300] = stained(140, 200)
    truth = np.zeros((300, 400), bool)
    truth[80:220, 100:300] = True
    if ground is None:
        truth[40:260, 60:400] = True
    mask = tissue_of(pixels)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


def test_the_tissue_of_real_sections_is_found(her2st: Path) -> None:
    import polars as pl

    (image,) = her2st.glob("ST-imgs/*/C2/*.jpg")
    spots = pl.read_csv(her2st / "ST-spotfiles" / "C2_selection.tsv", separator="\t").filter(pl.col("selected") == 1)
    xy = spots.select("pixel_x", "pixel_y").to_numpy().astype(np.float64)
    slide = open_slide(image)
    mask = tissue_of(thumbnail(slide, 768)[0])
    assert on_tissue(xy, mask, slide.size) > 0.95
    assert tissue_notices(xy, mask, slide.size) == []
    assert "with x and y swapped" in tissue_notices(xy[:, ::-1], mask, slide.size)[0]
