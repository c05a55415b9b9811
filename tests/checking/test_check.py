"""Slides looked at before they are embedded: six faults of geometry, each named, and put right where that can be."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.checking.draw import overlay
from nh2st_pipe.checking.run import Checked, check
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.prediction import predict
from nh2st_pipe.slides.whole import missing_data
from nh2st_pipe.store.read import open_store
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.training.run import train
from tests.cli.test_commands import call
from tests.conftest import Study, write_spots
from tests.slides.test_slides import write_pyramid

SIZE = (900, 600)


def visium() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Spots 60 px apart, on the tissue of `section` alone, which no turn or mirror maps onto itself."""
    row, column = (axis.ravel() for axis in np.mgrid[:4, :9])
    column = 2 * column + row % 2
    return np.column_stack((column * 30.0 + 90, row * 52.0 + 60)), np.column_stack((row, column))


def section(noise: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(noise)
    pixels = np.full((SIZE[1], SIZE[0], 3), (242, 240, 244), np.float64)
    pixels[30:250, 60:640] = (200, 130, 180)
    pixels[250:570, 60:110] = (200, 130, 180)
    return np.asarray(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255), np.uint8)


def scale_factors(data: anndata.AnnData) -> None:
    data.uns["spatial"] = {"a": {"scalefactors": {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 33.0}}}


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A manifest of one good slide and seven with a fault each."""
    xy, grid = visium()
    write_pyramid(tmp_path / "a.tif", section(), mpp=5 / 3)
    write_pyramid(tmp_path / "dpi.tif", section(), mpp=352.8)
    data = (tmp_path / "a.tif").read_bytes()
    lines = ["slide_id,slide,expression,mpp,batch"]

    def add(name: str, xy: NDArray[np.float64], *, slide: str = "a.tif", mpp: str = "", **more: Any) -> None:
        write_spots(tmp_path / f"{name}.h5ad", xy, grid=grid, change=scale_factors, **more)
        lines.append(f"{name},{slide},{name}.h5ad,{mpp},b1")

    add("good", xy)
    add("hires", xy * 0.1)
    add("swapped", xy[:, ::-1])
    add("mirrored", np.column_stack((SIZE[0] - xy[:, 0], xy[:, 1])))
    add("mpp", xy, mpp="0.5")
    add("dpi", xy, slide="dpi.tif")
    add("normalised", xy, counts=np.random.default_rng(0).random((len(xy), 12)))
    (tmp_path / "cut.tif").write_bytes(data[: int(len(data) * 0.98)])
    add("cut", xy, slide="cut.tif")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "manifest.csv"


def alone(slides: Path, name: str) -> Path:
    """A manifest of one of the slides."""
    header, *lines = slides.read_text().splitlines()
    path = slides.with_name(f"{name}.csv")
    path.write_text("\n".join([header, *(line for line in lines if line.startswith(f"{name},"))]) + "\n")
    return path


def by_id(found: Checked) -> dict[str, Any]:
    return {slide.slide_id: slide for slide in found.slides}


def test_each_fault_is_named_and_what_is_right_is_proposed(slides: Path) -> None:
    found = check(slides, encoder="fake")
    of = by_id(found)
    assert {name for name, slide in of.items() if slide.good} == {"good", "dpi"}
    assert not found.good
    good = of["good"]
    assert (good.width, good.height, good.levels, good.tiles) == (900, 600, [1, 2, 4], 36)
    assert (good.mpp, good.tile_px, good.pitch_um) == pytest.approx((5 / 3, 67.2, 100), rel=0.01)
    assert good.mpp_source == "file"
    assert good.on_tissue["as they are"] == 1
    assert (good.counts["genes"], good.counts["whole numbers"]) == (12, True)
    assert "divide it by tissue_hires_scalef" in of["hires"].faults[0]
    assert of["hires"].correction.way == "÷ tissue_hires_scalef (0.1)"
    assert "with x and y swapped" in "".join(of["swapped"].doubts)
    assert of["swapped"].correction.way == "with x and y swapped"
    assert of["mirrored"].correction.way == "mirrored left to right"
    assert of["mpp"].correction.mpp == pytest.approx(5 / 3, rel=0.01)
    assert of["mpp"].correction.way is None
    assert (of["dpi"].mpp_source, of["dpi"].mpp) == ("spots", pytest.approx(5 / 3, rel=0.01))
    assert "352.8" in of["dpi"].notes[0]
    assert "whole numbers" in of["normalised"].doubts[0]
    assert "cut short" in of["cut"].faults[0]
    assert set(found.lines) == {"hires", "swapped", "mirrored", "mpp"}


def test_what_is_put_right_is_good_and_nothing_of_the_users_is_changed(slides: Path) -> None:
    before = {path.name: path.read_bytes() for path in slides.parent.iterdir()}
    found = check(slides, encoder="fake", fix=slides.parent / "fixed")
    assert found.corrected == slides.parent / "fixed/manifest.csv"
    assert {path.name: path.read_bytes() for path in slides.parent.iterdir() if path.is_file()} == before
    again = by_id(check(found.corrected, encoder="fake"))
    assert {name for name, slide in again.items() if not slide.good} == {"normalised", "cut"}
    rows = read_manifest(found.corrected)
    assert [row.extra for row in rows] == [{"batch": "b1"}] * 8
    xy = anndata.read_h5ad(slides.parent / "good.h5ad").obsm["spatial"]
    for row in rows:
        if row.slide_id in ("hires", "swapped", "mirrored"):
            assert row.expression is not None
            assert np.allclose(anndata.read_h5ad(row.expression).obsm["spatial"], xy)
    with pytest.raises(UsageError, match="holds something already"):
        check(slides, encoder="fake", fix=slides.parent / "fixed")


def test_the_page_shows_every_slide_and_needs_nothing_beside_it(slides: Path) -> None:
    xy, grid = visium()
    write_spots(slides.parent / "good.h5ad", xy, grid=grid, barcodes=[f"<b>{i}" for i in range(len(xy))])
    page = check(slides, encoder="fake", out=slides.parent / "pages/check.html").page
    assert page is not None
    text = page.read_text("utf-8")
    assert "8 slides: 2 without a fault, 4 to be looked at, 2 that embed would pass over" in text
    assert len(re.findall(r"<section id=", text)) == 8
    assert len(re.findall(r'src="data:image/jpeg;base64,', text)) == 7
    assert text.count("There is no picture") == 1
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<b>" not in text
    assert "@@" not in text
    assert "hires.corrected.h5ad" in text


def test_the_command_says_it_and_its_status_tells(slides: Path) -> None:
    done = call("check", "--encoder", "fake", "--slides", slides, "--out", slides.parent / "check.html")
    assert done.returncode == 1
    assert "good: good; 900 × 600 px, 1.667 µm per px (file), 36 tiles of 67.2 px" in done.stdout
    assert "embed passes it over" in done.stdout
    assert "spots on tissue would be 100% mirrored left to right" in done.stdout
    assert "Traceback" not in done.stderr
    rows = slides.read_text().splitlines()
    slides.write_text("\n".join(rows[:2]) + "\n")
    assert call("check", "--encoder", "fake", "--slides", slides).returncode == 0
    assert call("check", "--encoder", "fake", "--slides", slides, "--tile-px", 3).returncode == 2


def test_a_slide_that_may_not_be_read_is_a_fault_of_its_own(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.open

    def refusing(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "dpi.tif":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refusing)
    of = by_id(check(slides, encoder="fake"))
    assert len(of["dpi"].faults) == 1
    assert "dpi.tif cannot be read: " in of["dpi"].faults[0]
    assert "Permission denied" in of["dpi"].faults[0]
    assert of["good"].good


def test_a_slide_without_spots_shows_its_grid(make_study: Callable[..., Study]) -> None:
    study = make_study(1, expression=False)
    Image.fromarray(section()).save(study.folder / "s0.png")
    (found,) = check(study.manifest, encoder="fake", tile_px=50).slides
    assert found.good
    assert found.tiles is not None
    assert found.tiles > 20
    assert found.tissue == pytest.approx((220 * 580 + 320 * 50) / (600 * 900), rel=0.05)
    assert found.picture is not None
    assert found.on_tissue == {}


def test_tiles_are_blue_on_tissue_and_red_elsewhere() -> None:
    mask = np.zeros((60, 90), np.bool_)
    mask[:, :45] = True
    picture = np.full((60, 90, 3), 255, np.uint8)
    drawn = overlay(picture, mask, SIZE, np.array([[200.0, 300.0], [700.0, 300.0]]), 40)
    assert drawn[30, 20].argmax() == 2
    assert drawn[30, 70].argmax() == 0
    assert drawn[5, 46].argmax() == 1  # the edge
    assert (picture == 255).all()


def test_what_lies_beyond_a_files_end_is_counted_without_decoding(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", section())
    assert missing_data(tmp_path / "a.tif") is None
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(data[:-50])
    said = missing_data(tmp_path / "b.tif")
    assert said is not None
    assert re.search(r"b\.tif is cut short: 1 of \d+ pieces of its image 3 lie beyond", said)
    (tmp_path / "c.png").write_bytes(b"no TIFF")
    assert missing_data(tmp_path / "c.png") is None


def test_tiles_that_show_less_than_the_encoder_takes_are_doubted(slides: Path) -> None:
    def said(tile_px: float, encoder: str | None) -> tuple[list[str], list[str]]:
        (of,) = check(alone(slides, "good"), tile_px=tile_px, encoder=encoder).slides
        return [words for words in of.doubts if "enlarged" in words], [
            words for words in of.notes if "enlarged" in words
        ]

    (doubt,), none = said(40.0, "fake")
    assert "tiles of 40 px are enlarged 1.6 × to the 64 px that the encoder takes" in doubt
    assert not none
    assert said(43.0, "fake") == ([], [])
    none, (note,) = said(148.0, None)  # of which it is not known for whom they are
    assert "tiles of 148 px are enlarged 1.5 × to the 224 px that most encoders take" in note
    assert not none
    assert said(150.0, None) == ([], [])


@pytest.mark.parametrize("spots", [True, False])
def test_a_dark_picture_is_doubted_with_spots_and_without(make_study: Callable[..., Study], spots: bool) -> None:
    study = make_study(1, expression=spots)
    path = study.folder / "s0.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for times, dark in ((1, False), (16, True)):
        Image.fromarray(pixels // times).save(path)
        (found,) = check(study.manifest, tile_px=48, encoder="fake").slides
        assert bool([words for words in found.doubts if "the picture is dark" in words]) == dark
        summary = study.embed(store=study.folder / f"{times}.zarr", tile_px=48)
        assert bool([words for words in summary.notices if "the picture is dark" in words]) == (
            dark and not summary.failed
        )


def test_what_the_file_itself_says_is_not_overruled_by_spots(slides: Path) -> None:
    write_pyramid(slides.parent / "a.tif", section(), mpp=0.5)
    (found,) = check(alone(slides, "good"), encoder="fake", tile_px=64.0).slides
    assert found.mpp_source == "file"
    assert "0.5 by the file, and 1.66" in "".join(found.doubts)
    assert found.correction is None


def test_a_way_of_laying_spots_is_proposed_by_a_clear_margin_alone(slides: Path) -> None:
    """Three quarters on tissue are no evidence; nor is one way where another is as good."""
    xy, grid = visium()
    some = np.column_stack((SIZE[0] - xy[:, 0], xy[:, 1]))
    some[: len(some) // 4] = (880, 560)  # of a mirrored slide, a quarter is beside the tissue however it is laid
    write_spots(slides.parent / "mirrored.h5ad", some, grid=grid, change=scale_factors)
    (found,) = check(alone(slides, "mirrored"), encoder="fake").slides
    assert 0.5 < found.on_tissue["mirrored left to right"] < 0.9
    assert found.correction is None or found.correction.way is None
    even = np.full((SIZE[1], SIZE[0], 3), (242, 240, 244), np.uint8)
    even[:, : SIZE[0] // 2] = (200, 130, 180)
    write_pyramid(slides.parent / "a.tif", even, mpp=5 / 3)
    right = np.column_stack((SIZE[0] - 0.4 * xy[:, 0] - 30, xy[:, 1]))  # mirrored or turned round, they are on it
    write_spots(slides.parent / "mirrored.h5ad", right, grid=grid, change=scale_factors)
    (found,) = check(alone(slides, "mirrored"), encoder="fake").slides
    assert found.on_tissue["mirrored left to right"] == found.on_tissue["turned by 180°"] == 1
    assert found.correction is None or found.correction.way is None


@pytest.mark.parametrize("unfit", [False, True])
def test_the_files_own_factor_is_no_evidence_where_spots_fit_as_they_are(unfit: bool) -> None:
    from nh2st_pipe.checking.examine import Examined, _propose
    from nh2st_pipe.tiles.spots import Spots

    mask = np.zeros((100, 100), np.bool_)
    mask[45:95, 45:95] = True
    xy = np.array([[x, y] for x in range(34, 84, 5) for y in range(34, 84, 5)], np.float64)
    spots = Spots([f"b{i}" for i in range(len(xy))], xy, scales={"hires": 0.8})
    found = Examined("s")
    _propose(found, spots, mask, (100, 100), unfit=unfit)
    shares = {way: found.on_tissue[way] for way in ("as they are", "÷ tissue_hires_scalef (0.8)")}
    assert list(shares.values()) == [0.49, 0.64]
    assert (found.correction is not None and found.correction.way is not None) == unfit


def test_whether_a_model_can_predict_slides_is_known_before_they_are_embedded(study: Study, tmp_path: Path) -> None:
    lines = study.manifest.read_text().splitlines()
    at = lines[0].split(",")
    assert "mpp" not in at

    def with_mpp(values: list[str], name: str) -> Path:
        path = study.folder / name
        rows = [f"{line},{mpp}" for line, mpp in zip(lines[1:], values, strict=True)]
        path.write_text("\n".join([f"{lines[0]},mpp", *rows]) + "\n")
        return path

    own = with_mpp(["0.5", "0.5", "0.51"], "own.csv")
    store = study.folder / "m.zarr"
    embed(own, encoder="fake", store=store, tile_px=48, views=8, device="cpu")
    run = train(store, recipe="ridge", genes=6, folds="slide", out=tmp_path / "run", device="cpu")
    assert any(
        "tiles were cut as 48 px: the model fits slides of the same resolution of 0.5" in words
        for words in run.metrics["notes"]
    ), run.metrics
    assert all(not each.faults for each in check(own, model=tmp_path / "run").slides)
    other = with_mpp(["0.5", "0.25", ""], "other.csv")
    found = by_id(check(other, model=tmp_path / "run"))
    assert found["s0"].tile_px == 48
    assert not found["s0"].faults
    words = "was trained with tiles of 48 px at 0.5 to 0.51"
    assert words in found["s1"].faults[0]
    encoded = predict(tmp_path / "run", slides=other, out=tmp_path / "p", device="cpu")
    assert words in encoded.failed["s1"]
    assert "s0" in encoded.files
    assert "s1" not in open_store(tmp_path / "p/store.zarr").slides()  # refused before it was encoded
    none = predict(tmp_path / "run", slides=with_mpp(["2", "2", "2"], "none.csv"), out=tmp_path / "q", device="cpu")
    assert (sorted(none.failed), none.files) == (["s0", "s1", "s2"], {})
    assert not (tmp_path / "q/store.zarr").exists()
    assert "s1" in predict(tmp_path / "run", slides=other, out=tmp_path / "r", device="cpu", any_mpp=True).files
    with pytest.raises(UsageError, match="--model says which encoder and tiles"):
        check(own, model=tmp_path / "run", tile_px=50)


def test_what_is_doubted_is_shown(make_study: Callable[..., Study]) -> None:
    study = make_study(1, expression=False)
    pixels = np.full((400, 500, 3), 240, np.uint8)
    rng = np.random.default_rng(0)
    pixels[50:350, 40:240] = np.clip(rng.normal((200, 130, 180), 4, (300, 200, 3)), 0, 255)
    for faint in (False, True):
        if faint:
            pixels[100:300, 300:450] = np.clip(rng.normal((238, 218, 230), 6, (200, 150, 3)), 0, 255)
        Image.fromarray(pixels).save(study.folder / "s0.png")
        found = check(study.manifest, encoder="fake", tile_px=50, out=study.folder / "check.html")
        (slide,) = found.slides
        assert slide.picture is not None
        shown = np.asarray(Image.open(io.BytesIO(slide.picture)), np.int16)
        orange = (np.abs(shown - (235, 120, 0)) < 40).all(axis=2)
        assert orange.any() == slide.shows_doubts == faint
        assert ("Orange: taken off the tissue" in (study.folder / "check.html").read_text("utf-8")) == faint
    assert np.nonzero(orange)[1].min() > 260
