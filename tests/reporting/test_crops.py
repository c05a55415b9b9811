"""Crops: the H&E under a spot, at the encoder's resolution, as many as a page holds."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.reporting import crops, maps
from nh2st_pipe.reporting.crops import spread_over
from nh2st_pipe.reporting.page import report
from tests.exporting.made import genes_of, prediction
from tests.reporting.test_sets import data_of


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A prediction of 16 tiles, and its slide: each tile of a grey of its own."""
    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad")
    slide = np.full((370, 350, 3), 255, np.uint8)
    for number in range(16):
        y, x = (100 + 50 * axis for axis in divmod(number, 4))
        slide[y - 20 : y + 20, x - 20 : x + 20] = 10 * number + 20
    Image.fromarray(slide).save(tmp_path / "s1.png")
    (tmp_path / "manifest.csv").write_text("slide_id,slide\ns1,s1.png\n")
    return tmp_path


def test_a_crop_shows_what_lies_under_its_spot(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bytes_of_all, expected in ((4_000_000, 16), (6 * 45_000, 6)):
        monkeypatch.setattr(crops, "_BYTES", bytes_of_all)
        (slide,) = data_of(report(study / "p", slides=study / "manifest.csv"))["slides"]
        assert len(slide["crop_rows"]) == len(slide["crops"]) == expected
        for row, crop in zip(slide["crop_rows"], slide["crops"], strict=True):
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(crop)))).astype(int)
            assert picture.shape == (672, 672, 3)
            assert np.abs(picture[300:372, 300:372] - (10 * row + 20)).max() <= 3
            assert np.abs(picture[336, 195:215] - 255).max() <= 6  # the glass beside the tile
    (slide,) = data_of(report(study / "p"))["slides"]
    assert (slide["crop_rows"], slide["crops"]) == ([], [])


def test_crops_are_of_places_all_over_the_tissue() -> None:
    xy = np.random.default_rng(0).uniform(0, 1000, (500, 2))
    rows = spread_over(xy, 20)
    assert len(set(rows)) == 20
    nearest = np.linalg.norm(xy[:, None] - xy[rows], axis=2).min(axis=1)
    assert nearest.max() < 260  # at random it would be 350 and more
    assert spread_over(xy[:5], 20).tolist() == [0, 1, 2, 3, 4]


def test_a_page_does_not_grow_beyond_its_room(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is on the tissue: crops of noise take more than most."""
    noise = np.random.default_rng(0).integers(0, 255, (370, 350, 3), np.uint8)
    Image.fromarray(noise).save(study / "s1.png")
    monkeypatch.setattr(crops, "_BYTES", 300_000)
    monkeypatch.setattr(crops, "_PER_CROP", 1_000)
    (slide,) = data_of(report(study / "p", slides=study / "manifest.csv"))["slides"]
    assert 1 <= len(slide["crops"]) < 16
    assert sum(map(len, slide["crops"])) <= 2.1 * 300_000 * 4 / 3


def test_values_make_room_for_crops(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction(study / "p/s1.h5ad", genes=genes_of(400))
    monkeypatch.setattr(crops, "_BYTES", 45_000 * 4)

    def held(slides: Path | None = None) -> tuple[int, int]:
        (slide,) = data_of(report(study / "p", slides=slides))["slides"]
        return len(slide["values"]) * 3 // 4, sum(map(len, slide["crops"])) * 3 // 4

    _, of_crops = held(slides=study / "manifest.csv")
    values, none = held()
    assert (none, of_crops > 0) == (0, True)
    for room in (3 * values, of_crops + values // 2, of_crops):
        monkeypatch.setattr(maps, "_MOST_BYTES", room)
        assert held(slides=study / "manifest.csv")[0] <= max(room // 3, room - of_crops)


def test_another_slide_is_refused(study: Path) -> None:
    Image.new("RGB", (351, 370)).save(study / "s1.png")
    with pytest.raises(SlideError, match="has 351 × 370 px, and the slide that was predicted 350 × 370"):
        report(study / "p", slides=study / "manifest.csv")
    assert isinstance(
        CliRunner().invoke(app, ["report", str(study / "p"), "--slides", str(study / "manifest.csv")]).exception,
        SlideError,
    )
