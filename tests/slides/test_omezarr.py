"""OME-Zarr as others write it: versions 0.4 and 0.5, axes and chunks of many kinds, whole and with parts missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from nh2st_pipe.core.codecs import check_codecs
from nh2st_pipe.core.errors import ExpressionError, ManifestError, SlideError
from nh2st_pipe.slides import open_slide
from nh2st_pipe.slides.base import read_tile, thumbnail
from nh2st_pipe.slides.omezarr import OmeZarrSlide
from nh2st_pipe.store.format import fingerprint
from tests.conftest import Study, picture


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return picture(500, 380, seed=5)


def write_ome_zarr(
    path: Path,
    pixels: NDArray[Any],
    version: str = "0.4",
    axes: str = "tczyx",
    chunk: int = 128,
    levels: int = 3,
    mpp: float = 0.5,
    said: dict[int, float] | None = None,
    unit: str = "micrometer",
    **options: Any,
) -> Path:
    """Write h × w × 3 as a pyramid; `said` holds what the metadata say of a level's scale, where that is another."""
    path.mkdir(parents=True)
    datasets = []
    for number in range(levels):
        part = np.asarray(Image.fromarray(pixels).reduce(2**number)) if number else pixels
        values = part[None, :, :, :, None]  # z, y, x, c, t
        values = np.transpose(values, ["zyxct".index(axis) for axis in "tczyx"])
        values = values[tuple(slice(None) if axis in axes else 0 for axis in "tczyx")]
        order = [axis for axis in "tczyx" if axis in axes]
        values = np.ascontiguousarray(np.transpose(values, [order.index(axis) for axis in axes]))
        array = zarr.create_array(
            path / str(number),
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(chunk if axis in "yx" else options.get("colours", 1) if axis == "c" else 1 for axis in axes),
            zarr_format=2 if version == "0.4" else 3,
            **({"shards": options["shards"]} if "shards" in options else {}),
        )
        array[:] = values
        scale = [mpp * (said or {}).get(number, 2.0**number) if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
    named = [{"name": axis, "type": kinds[axis], **({"unit": unit} if axis in "yx" else {})} for axis in axes]
    multiscales = [{"version": version, "axes": named, "datasets": datasets}]
    if version == "0.4":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    else:
        ome = {"version": version, "multiscales": multiscales}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
        (path / "zarr.json").write_text(json.dumps(group))
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("axes", "options"), [("tczyx", {}), ("cyx", {"colours": 3}), ("yxc", {}), ("czyx", {})])
def test_regions_are_those_of_the_picture(
    tmp_path: Path, pixels: NDArray[np.uint8], version: str, axes: str, options: dict[str, Any]
) -> None:
    slide = open_slide(write_ome_zarr(tmp_path / "a.ome.zarr", pixels, version, axes, **options))
    assert isinstance(slide, OmeZarrSlide)
    assert (slide.size, slide.mpp, slide.notices) == ((500, 380), 0.5, ())
    assert np.allclose(slide.steps, [(1, 1), (2, 2), (4, 4)], rtol=0.01)
    for x, y, w, h in ((0, 0, 500, 380), (100, 120, 40, 30), (480, 370, 20, 10)):
        assert np.array_equal(slide.read_region(x, y, w, h, 0), pixels[y : y + h, x : x + w])
    outside = slide.read_region(490, 370, 20, 20, 0)
    assert (outside[10:] == 255).all()
    assert (outside[:, 10:] == 255).all()
    assert np.array_equal(outside[:10, :10], pixels[370:, 490:])
    assert np.array_equal(slide.read_region(0, 0, 250, 190, 1), np.asarray(Image.fromarray(pixels).reduce(2)))


def test_shards_grey_and_sixteen_bits(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    sharded = write_ome_zarr(tmp_path / "s", pixels, "0.5", "cyx", chunk=64, levels=1, shards=(3, 256, 256))
    assert np.array_equal(open_slide(sharded).read_region(0, 0, 500, 380, 0), pixels)
    grey = pixels[..., :1]
    one = open_slide(write_ome_zarr(tmp_path / "g", grey, axes="cyx", levels=1))
    assert np.array_equal(one.read_region(0, 0, 500, 380, 0), np.repeat(grey, 3, axis=2))
    deep = open_slide(write_ome_zarr(tmp_path / "d", pixels.astype(np.uint16) * 257, axes="cyx", levels=1))
    assert np.array_equal(deep.read_region(0, 0, 500, 380, 0), pixels)
    assert deep.notices == ("16 bits a px are read as their upper 8",)


@pytest.mark.parametrize(
    ("unit", "mpp", "found"), [("nanometer", 250.0, 0.25), ("millimeter", 5e-4, 0.5), ("pixel", 1.0, None)]
)
def test_the_resolution_has_its_unit(
    tmp_path: Path, pixels: NDArray[np.uint8], unit: str, mpp: float, found: float | None
) -> None:
    slide = open_slide(write_ome_zarr(tmp_path / "a", pixels, unit=unit, mpp=mpp, levels=1))
    assert slide.mpp == (None if found is None else pytest.approx(found))


def test_a_tile_is_the_same_as_of_the_plain_picture(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slides = [open_slide(tmp_path / "a.png"), open_slide(write_ome_zarr(tmp_path / "a.zarr", pixels))]
    tiles = [read_tile(slide, (250.0, 190.0), 100, 64, "bicubic").astype(int) for slide in slides]
    assert np.abs(tiles[0] - tiles[1]).max() <= 3
    assert thumbnail(slides[1], 100)[0].shape == (76, 100, 3)


def test_a_level_that_is_not_what_it_is_said_to_be_is_passed_over(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    slide = open_slide(write_ome_zarr(tmp_path / "a", pixels, said={1: 3.0}))
    assert np.allclose(slide.steps, [(1, 1), (4, 4)], rtol=0.01)
    assert slide.notices == (
        "level 1 of 250 × 190 px, said to be 3 times smaller, is not the whole of 500 × 380 px made smaller: it is "
        "passed over",
    )
    assert slide.read_region(0, 0, 125, 95, 1).shape == (95, 125, 3)
    assert np.array_equal(slide.read_region(0, 0, 125, 95, 1), np.asarray(Image.fromarray(pixels).reduce(4)))


def test_a_picture_among_others_is_found(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    write_ome_zarr(tmp_path / "a" / "0", pixels)
    write_ome_zarr(tmp_path / "a" / "1", pixels[:50, :50], levels=1)
    (tmp_path / "a" / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    slide = open_slide(tmp_path / "a")
    assert slide.size == (500, 380)
    assert slide.notices == ("picture 0 is read; 1 others (labels, overviews) lie beside it",)


def test_missing_chunks_are_said_and_damaged_ones_are_a_fault_of_the_slide(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = write_ome_zarr(tmp_path / "a", pixels, levels=1)
    chunks = sorted(each for each in (path / "0").rglob("*") if each.is_file() and not each.name.startswith("."))
    chunks[0].unlink()
    slide = open_slide(path)
    assert slide.notices == ("1 of 36 chunks are not in the folder, and are read as its fill value, 0",)
    chunks[5].write_bytes(b"no chunk")
    with pytest.raises(SlideError, match=r"a is damaged near x=0, y=0"):
        open_slide(path).read_region(0, 0, 500, 380, 0)


def _no_level(path: Path) -> None:
    shutil.rmtree(path / "1")


def _no_multiscales(path: Path) -> None:
    (path / ".zattrs").write_text("{}")


def _plate(path: Path) -> None:
    (path / ".zattrs").write_text('{"plate": {}}')


def _broken(path: Path) -> None:
    (path / ".zattrs").write_text('{"multiscales": [')


def _pickled(path: Path) -> None:
    about = json.loads((path / "0" / ".zarray").read_text())
    text = json.dumps({**about, "filters": [{"id": "pickle", "protocol": 5}]})
    (path / "0" / ".zarray").write_text(text.replace("pickle", "\\u0070ickle"))  # the same, as JSON


def _unknown_codec(path: Path) -> None:
    about = json.loads((path / "0" / ".zarray").read_text())
    (path / "0" / ".zarray").write_text(json.dumps({**about, "compressor": {"id": "own_thing"}}))


def _elsewhere(path: Path, at: str) -> None:
    shutil.copytree(path, path.with_name("secret"))
    about = json.loads((path / ".zattrs").read_text())
    about["multiscales"][0]["datasets"][0]["path"] = at.format(parent=path.parent)
    (path / ".zattrs").write_text(json.dumps(about))


def _above(path: Path) -> None:
    _elsewhere(path, "../secret/0")


def _absolute(path: Path) -> None:
    _elsewhere(path, "{parent}/secret/0")


def _linked(path: Path) -> None:
    _elsewhere(path, "0")
    shutil.rmtree(path / "0")
    (path / "0").symlink_to(path.with_name("secret") / "0")


def _odd_axes(path: Path) -> None:
    about = json.loads((path / ".zattrs").read_text())
    about["multiscales"][0]["axes"] = [{"name": name} for name in "cyx"]
    (path / ".zattrs").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_level, "cannot be opened"),
        (_no_multiscales, "name no multiscales"),
        (_plate, "is a plate of many wells"),
        (_broken, "cannot be opened"),
        (_pickled, "packed with the codec 'pickle', which runs code that it finds"),
        (_unknown_codec, "packed with the codec 'own_thing', which is not known here"),
        (_above, "names a level outside of its own folder"),
        (_absolute, "names a level outside of its own folder"),
        (_linked, "names a level outside of its own folder"),
        (_odd_axes, "one for each dimension|cannot be opened"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, pixels: NDArray[np.uint8], spoil: Any, message: str) -> None:
    spoil(write_ome_zarr(tmp_path / "a", pixels))
    with pytest.raises(SlideError, match=message) as error:
        open_slide(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)


def test_five_channels_are_no_picture(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    five = np.concatenate((pixels, pixels[..., :2]), axis=2)
    with pytest.raises(SlideError, match="one picture of red, green and blue"):
        open_slide(write_ome_zarr(tmp_path / "a", five, levels=1))


def test_a_folder_is_embedded_as_a_slide_and_known_when_it_changes(study: Study) -> None:
    whole = np.asarray(Image.open(study.folder / "s0.png").convert("RGB"))
    write_ome_zarr(study.folder / "s0.ome.zarr", whole)
    study.manifest.write_text(study.manifest.read_text().replace("s0.png", "s0.ome.zarr"))
    assert study.embed().done == ["s0", "s1", "s2"]
    assert study.embed().kept == ["s0", "s1", "s2"]
    before = fingerprint(study.folder / "s0.ome.zarr")
    shutil.copytree(study.folder / "s0.ome.zarr", study.folder / "copy")
    (study.folder / "copy" / "0" / ".DS_Store").write_bytes(b"hidden")
    assert fingerprint(study.folder / "copy") == before
    zarr.open_array(study.folder / "s0.ome.zarr" / "0", mode="r+")[..., :50] = 7
    assert fingerprint(study.folder / "s0.ome.zarr") != before
    assert "its image changed" in study.embed().failed["s0"]


def test_a_folder_that_is_no_slide_is_named_by_the_manifest(study: Study) -> None:
    (study.folder / "empty").mkdir()
    study.manifest.write_text(study.manifest.read_text().replace("s0.png", "empty"))
    with pytest.raises(ManifestError, match=r"slide: .*empty is a folder, and not one of OME-Zarr"):
        study.embed()


@pytest.mark.parametrize(
    ("codecs", "named"),
    [
        ([{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "pickle"}]}}], "pickle"),
        ([{"name": "sharding_indexed", "configuration": {"index_codecs": [{"name": "own"}]}}], "own"),
        (["bytes", "own"], "own"),
        ([{"name": "numcodecs.pickle"}], "numcodecs.pickle"),
        ([{"name": "bytes"}, {"name": "numcodecs.zlib"}, {"name": "zstd"}, {"name": "crc32c"}], None),
    ],
)
def test_codecs_are_known_wherever_they_stand(tmp_path: Path, codecs: Any, named: str | None) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "zarr.json").write_text(json.dumps({"codecs": codecs}))
    check_codecs(tmp_path / "a")  # there is no array in this folder itself
    if named is None:
        check_codecs(tmp_path / "a", below=True)
    else:
        with pytest.raises(ExpressionError, match=f"a/b is packed with the codec '{named}'"):
            check_codecs(tmp_path / "a", below=True)
