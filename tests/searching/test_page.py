"""The page of what was found: each hit's own tissue and place, and no word of the data run."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.searching.page import write_page
from nh2st_pipe.searching.search import Hit, Hits, Query, search
from nh2st_pipe.store.arrays import SlideArrays, write_store
from nh2st_pipe.store.read import open_store
from tests.exporting.made import prediction
from tests.searching.test_search import NAMES, PATIENTS, XY, embeddings

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A store whose slides' tiles have a grey each, and its manifest."""
    lines, slides = ["slide_id,slide"], list[SlideArrays]()
    (tmp_path / "p").mkdir()
    for number, (name, patient) in enumerate(PATIENTS.items()):
        pixels = np.full((370, 350, 3), 255, np.uint8)
        for tile, (x, y) in enumerate(XY.astype(int)):
            pixels[y - 20 : y + 20, x - 20 : x + 20] = 30 * number + 8 * tile
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        lines.append(f"{name},{name}.png")
        slides.append(
            SlideArrays(name, embeddings(name), XY, mpp=0.5, size=(350, 370), patient=patient, barcodes=NAMES)
        )
        prediction(tmp_path / f"p/{name}.h5ad", slide_id=name, seed=number)
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    write_store(tmp_path / "store.zarr", slides, encoder="mine", tile_um=20.0)
    return tmp_path


def test_every_hit_is_shown_with_its_tissue_and_its_place(study: Path) -> None:
    asked = ["search", str(study / "store.zarr"), "--slide", "a1", "--tile", "AA-5", "-k", "4", "--genes", "G0"]
    more = ["--predictions", str(study / "p"), "--slides", str(study / "manifest.csv"), "--html", str(study / "h.html")]
    done = CliRunner().invoke(app, [*asked, *more])
    assert done.exit_code == 0, done.output
    assert "values: log1p(counts per 10,000), mean" in done.stdout
    text = (study / "h.html").read_text()
    hits = search(study / "store.zarr", Query(slide="a1", tile="AA-5", k=4, genes=("G0",)), predictions=study / "p")
    cards = re.findall(r"<li.*?</li>", text, re.DOTALL)
    assert hits.asker is not None
    for card, hit in zip(cards, [hits.asker, *hits], strict=True):
        crop = re.search(r'class="crop"><img alt="" src="data:image/jpeg;base64,([^"]*)"', card)
        assert crop is not None
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(crop[1])))).astype(int)
        grey = 30 * list(PATIENTS).index(hit.slide_id) + 8 * int((hit.tile or "").removeprefix("AA-"))
        assert np.abs(picture[150:186, 150:186] - grey).max() <= 3
        assert f"left: {100 * (hit.x or 0) / 350:.2f}%; top: {100 * (hit.y or 0) / 370:.2f}%" in card
        assert f"{hit.values['G0']['value']:.3g} (" in card
    assert "Values: log1p(counts per 10,000), mean." in text
    assert "://" not in text


def test_names_of_others_are_shown_and_never_run(study: Path) -> None:
    hit = Hit("a1", HOSTILE, 0.5, HOSTILE, 100.0, 100.0, {HOSTILE: {"value": None}}, None, HOSTILE)
    write_page(
        study / "h.html", Hits([hit], 9, notices=[HOSTILE]), open_store(study / "store.zarr"), None, HOSTILE, None
    )
    text = (study / "h.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 7
    assert 'class="crop"' not in text  # no manifest says where the slide is


def test_another_image_is_refused(study: Path) -> None:
    Image.new("RGB", (351, 370)).save(study / "b1.png")
    hits = search(study / "store.zarr", Query(slide="a1", tile="AA-5", k=20))
    with pytest.raises(SlideError, match=r"b1\.png is not the image that slide b1 was made of"):
        write_page(study / "h.html", hits, open_store(study / "store.zarr"), study / "manifest.csv", "x", None)
    assert not (study / "h.html").exists()
