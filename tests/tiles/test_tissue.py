from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import gaussian

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import thumbnail
from nh2st_pipe.tiles.geometry import on_tissue, tissue_notices
from nh2st_pipe.tiles.masks import geojson_of, mask_from_image, tissue_files
from nh2st_pipe.tiles.tissue import find_tissue, look_for_tissue, tissue_mask, tissue_of
from tests.conftest import blank
from tests.slides.test_real import real


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


def _png(path: Path, mask: NDArray[np.bool_], mode: str) -> None:
    plain = mode if mode in ("1", "L", "P", "RGB", "RGBA") else "L"
    image = Image.fromarray(mask.astype(np.uint8) * 255).convert(plain)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.new("L", image.size, 255))
    if mode in ("P2", "P4"):
        image = Image.fromarray(mask.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 255, 255, 255])
        image.save(path, bits=int(mode[1]))
        return
    image.save(path, compress_level=9)


def _tiff(path: Path, mask: NDArray[np.bool_], **options: Any) -> None:
    values = mask.astype(options.pop("dtype", np.uint8))
    if options.pop("rgba", False):
        values = np.stack([values, values, values, np.full_like(values, 255)], axis=2)
    tifffile.imwrite(path, values, **options)


MASKS: dict[str, Callable[[Path, NDArray[np.bool_]], None]] = {
    **{f"{mode}.png": partial(_png, mode=mode) for mode in ("1", "L", "P", "P2", "P4", "RGB", "RGBA", "LA")},
    "16.png": lambda path, mask: Image.fromarray(mask.astype(np.uint16) * 65535).save(path),
    "whole.jpg": lambda path, mask: Image.fromarray(mask).convert("L").save(path, quality=100),
    "bits.tif": partial(_tiff, dtype=bool),
    "bytes.tif": _tiff,
    "float.tif": partial(_tiff, dtype=np.float32),
    "labels.tif": partial(_tiff, dtype=np.uint16),
    "big.tif": partial(_tiff, dtype=np.uint16, byteorder=">"),
    "strips.tif": partial(_tiff, compression="zlib", rowsperstrip=7),
    "tiles.tif": partial(_tiff, compression="zlib", tile=(32, 48)),
    "rgba.tif": partial(_tiff, rgba=True, photometric="rgb", extrasamples=["unassalpha"]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kept", [8192, 100])
def test_a_mask_is_what_is_not_black_however_it_is_stored_and_is_made_smaller_where_it_is_large(
    tmp_path: Path, name: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nh2st_pipe.tiles.masks._KEPT_PX", kept)
    monkeypatch.setattr("nh2st_pipe.tiles.masks._ROWS", 7)
    monkeypatch.setattr("nh2st_pipe.slides.png._STRIP_BYTES", 3000)
    rows, columns = np.mgrid[:205, :290]
    mask = (rows - 100) ** 2 + (columns - 150) ** 2 < 70**2
    mask[190:, 280:] = True
    if name == "whole.jpg":  # its edges are not sharp
        mask = np.kron(mask[::8, ::8], np.ones((8, 8), bool))[:205, :290]
    MASKS[name](tmp_path / name, mask)
    found = mask_from_image(tmp_path / name)
    step = -(-290 // kept)
    blocks = [[mask[y : y + step, x : x + step] for x in range(0, 290, step)] for y in range(0, 205, step)]
    expected = np.array([[2 * block.sum() >= block.size for block in row] for row in blocks])
    if name == "whole.jpg":
        assert found.shape[0] <= 205
        assert abs(found.mean() - mask.mean()) < 0.02
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("cut", [40, 200, 2000])
def test_a_mask_that_is_cut_short_is_named(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nh2st_pipe.slides.png._STRIP_BYTES", 3000)
    noise = np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "m.png")
    (tmp_path / "m.png").write_bytes((tmp_path / "m.png").read_bytes()[:cut])
    with pytest.raises(SlideError, match=r"m\.png is not a readable image"):
        mask_from_image(tmp_path / "m.png")


def test_outlines_go_to_qupath_and_come_back(tmp_path: Path) -> None:
    mask = np.zeros((150, 200), bool)
    mask[20:120, 30:150] = True
    mask[40:100, 50:120] = False  # a hole
    mask[60:80, 70:90] = True  # an island in it
    mask[130:140, 180:] = True  # at the edge
    slide = open_slide(blank(tmp_path))  # twice as large
    slide.origin = 40, 10
    files = tissue_files(mask, slide)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["tissue.png"]))), mask)
    outlines = json.loads(files["tissue.geojson"])
    assert len(outlines["features"]) == 3
    assert {feature["properties"]["objectType"] for feature in outlines["features"]} == {"annotation"}
    corners = np.concatenate([ring for each in outlines["features"] for ring in each["geometry"]["coordinates"]])
    assert corners.min(axis=0).tolist() == [30 * 2 - 40, 20 * 2 - 10]
    assert corners.max(axis=0).tolist() == [400 - 40, 280 - 10]
    (tmp_path / "t.geojson").write_bytes(files["tissue.geojson"])
    back = tissue_mask(slide, tmp_path / "t.geojson")
    whole = np.kron(mask, np.ones((2, 2), bool))
    assert (back & whole).sum() / (back | whole).sum() > 0.96
    assert geojson_of(np.zeros((5, 5), bool), slide)["features"] == []


def test_an_outline_that_crosses_itself_or_leaves_the_slide_is_drawn(tmp_path: Path) -> None:
    bow_tie = [[50, 50], [150, 150], [150, 50], [50, 150]]
    outside = [[300, -500], [900, -500], [900, 100], [300, 100]]
    outline = {"type": "MultiPolygon", "coordinates": [[bow_tie], [outside]]}
    (tmp_path / "o.geojson").write_text(json.dumps(outline))
    mask = tissue_mask(open_slide(blank(tmp_path)), tmp_path / "o.geojson")
    assert mask[100, 60]
    assert mask[100, 140]
    assert not mask[60, 100]
    assert mask[:95, 305:].all()
    assert not mask[110:, 305:].any()


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


INKS = {
    "blue": (30, 60, 170),
    "light blue": (90, 150, 220),
    "green": (40, 140, 80),
    "black": (45, 45, 50),
    "red": (225, 30, 40),
}


@pytest.mark.parametrize("ink", INKS)
def test_pen_marks_are_no_tissue(ink: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((400, 500, 3), 240, np.uint8)
    pixels[100:300, 100:300] = stained(200, 200)
    marked = np.zeros((400, 500), bool)
    marked[90:310, 330:350] = marked[200:216, 60:340] = True  # beside the tissue, and across it
    pixels[marked] = np.clip(INKS[ink] + rng.normal(0, 6, (marked.sum(), 3)), 0, 255)
    found = look_for_tissue(pixels)
    assert (found.pen & marked).sum() > 0.95 * marked.sum()
    assert (found.mask & marked).sum() < 0.01 * marked.sum()
    assert found.mask[110:190, 110:290].mean() > 0.97
    assert not found.mask[:, 310:].any()
    assert found.notes()[0].startswith("pen marks are left out, ")


def test_blue_stains_and_few_blue_px_are_no_pen() -> None:
    blue = np.full((300, 300, 3), 240, np.uint8)
    blue[50:250, 50:250] = (100, 130, 200)  # haematoxylin alone
    assert not look_for_tissue(blue).pen.any()
    assert look_for_tissue(blue).mask.mean() > 0.4
    speck = np.full((400, 500, 3), 240, np.uint8)
    speck[100:300, 100:300] = stained(200, 200)
    speck[150:157, 150:157] = INKS["blue"]
    assert not look_for_tissue(speck).pen.any()


def test_folds_are_left_out_and_dense_nuclei_are_not() -> None:
    pixels = np.full((400, 500, 3), 240, np.uint8)
    nuclei = gaussian(np.random.default_rng(0).normal(0.25, 0.5, (300, 400, 1)), sigma=(2, 2, 0)).clip(0, 1)
    pixels[50:350, 50:450] = (205, 150, 185) * (1 - nuclei) + (115, 70, 150) * nuclei
    pixels[50:350, 380:450] = (110, 65, 150)  # nuclei close together: as dark, of another mix
    whole = look_for_tissue(pixels)
    assert not whole.folds.any()
    fold = np.zeros((400, 500), bool)
    fold[60:340, 200:212] = True
    pixels[fold] = (pixels[fold].astype(float) ** 2 / 255).astype(np.uint8)  # through it twice
    found = look_for_tissue(pixels)
    assert (found.folds & fold).sum() > 0.8 * fold.sum()
    assert (found.folds & ~fold).sum() < 0.5 * fold.sum()
    assert not (found.mask & found.folds).any()
    assert found.notes() == [f"folds of the tissue are left out, {found.folds.mean():.1%} of the slide"]


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-no-mpp.svs"])
def test_little_is_taken_off_real_sections(name: str) -> None:
    found = look_for_tissue(thumbnail(open_slide(real(name)), 2048)[0])
    assert not found.pen.any()
    assert found.folds.sum() < 0.04 * found.mask.sum()
    assert found.mask.mean() > 0.3


def test_much_that_is_taken_for_ink_is_doubted() -> None:
    """Dense haematoxylin has a pen's hue: a core of it beside a pink one would be lost without a word."""
    pixels = np.full((400, 500, 3), 240, np.uint8)
    pixels[50:350, 40:300] = stained(300, 260)
    pixels[100:250, 350:450] = (90, 120, 190)
    found = look_for_tissue(pixels)
    assert found.pen[120:230, 370:430].all()
    (doubt,) = found.doubts
    assert "of what is coloured, 1 pieces of it whole, is taken for a pen's ink" in doubt
    pixels[100:250, 350:450] = 240
    pixels[360:366, 20:480] = INKS["blue"]  # a stroke
    found = look_for_tissue(pixels)
    assert found.pen.any()
    assert not [words for words in found.doubts if "whole" not in words]


def test_a_faint_piece_beside_a_strong_one_is_doubted() -> None:
    pixels = np.full((400, 500, 3), 240, np.uint8)
    pixels[50:350, 40:240] = stained(300, 200)
    assert look_for_tissue(pixels).doubts == ()
    faint = np.random.default_rng(0).normal((238, 218, 230), 6, (200, 150, 3))
    pixels[100:300, 300:450] = np.clip(faint, 0, 255)
    found = look_for_tissue(pixels)
    assert not found.mask[120:280, 320:430].any()
    assert "a faintly coloured part, " in found.doubts[0]
    assert "is taken for glass" in found.doubts[0]
    pixels[100:300, 300:450] = (238, 218, 230)  # stray light
    assert look_for_tissue(pixels).doubts == ()


def test_coloured_glass_that_makes_all_tissue_is_doubted() -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(np.full((400, 500, 3), (240, 208, 224)) + rng.normal(0, 1, (400, 500, 3)), 0, 255).astype(np.uint8)
    pixels[100:300, 100:300] = stained(200, 200)
    found = look_for_tissue(pixels)
    assert found.mask.mean() > 0.95
    assert "the whole slide is taken for tissue, and half of it is of one even colour" in found.doubts[0]
    assert look_for_tissue(stained(300, 400)).doubts == ()


@pytest.mark.parametrize("style", ["name", "names", "text"])
def test_what_is_to_be_ignored_is_taken_off_and_the_classes_are_said(tmp_path: Path, style: str) -> None:
    """QuPath's class Ignore* marks holes and dirt; it counted as tissue."""

    def feature(name: str | None, x0: int, y0: int, x1: int, y1: int) -> dict[str, object]:
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        of: object = {"name": {"name": name}, "names": {"names": [name]}, "text": name}[style]
        properties = {"objectType": "annotation", **({"classification": of} if name else {})}
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}

    slide = open_slide(blank(tmp_path, (400, 300)))
    path = tmp_path / "o.geojson"
    objects = [feature("Tumor", 0, 0, 200, 300), feature(None, 150, 0, 300, 300), feature("Ignore*", 50, 50, 250, 100)]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": objects}))
    found = find_tissue(slide, path)
    truth = np.zeros((300, 400), bool)
    truth[:, :300] = True
    truth[50:100, 50:250] = False
    assert (found.mask != truth).mean() < 0.01
    words = "the outlines' classes are taken for tissue: Tumor (1), no class (1); taken off: Ignore* (1)"
    assert found.notes() == [words]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": objects[1:2]}))
    assert find_tissue(slide, path).notes() == []
    path.write_text(json.dumps({"type": "FeatureCollection", "features": objects[2:]}))
    with pytest.raises(SlideError, match=r"holds nothing but what is to be ignored \(classes Ignore\*\)"):
        find_tissue(slide, path)
