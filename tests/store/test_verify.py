from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nh2st_pipe.core.errors import NH2STError, StoreError, UsageError
from nh2st_pipe.embedding.repair import repair
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import set_aside, verify
from tests.cli.test_commands import call
from tests.conftest import Study

V1 = Path(__file__).parents[1] / "stores" / "v1"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_good_store_is_good(study: Study) -> None:
    study.embed(views=8)
    done = call("verify", study.folder / "store.zarr")
    assert done.returncode == 0
    assert "3 slides" in done.stdout
    assert "0 damaged" in done.stdout
    assert not verify(V1 / "whole").damaged  # format 1 has no list of files, and is read whole
    assert verify(V1 / "interrupted").incomplete == ["s1"]


@pytest.mark.parametrize("how", ["flipped", "deleted", "cut record", "no record"])
def test_damage_is_named_and_repaired_and_nothing_else_is_encoded(study: Study, how: str) -> None:
    study.embed(views=8)
    store = study.folder / "store.zarr"
    before = open_store(store)["s1"]
    slide = store / "slides" / "s1"
    if how == "flipped":
        flip(slide / "embedding/X/c/0/0")  # not read where there are views, and found all the same
    elif how == "deleted":
        (slide / "embedding/obsm/spatial/c/0/0").unlink()
    elif how == "no record":
        (slide / "zarr.json").unlink()
    else:
        text = (slide / "zarr.json").read_text()
        (slide / "zarr.json").write_text(text[: len(text) // 2])
    words = {
        "flipped": "s1: embedding/X/c/0/0 has changed since it was written",
        "deleted": "s1: embedding/obsm/spatial/c/0/0 is missing",
        "no record": "s1: its zarr.json is missing",
        "cut record": "s1: its zarr.json cannot be read",
    }
    done = call("verify", store)
    assert done.returncode == 1
    assert words[how] in done.stdout
    assert "--repair --slides manifest.csv makes what is damaged anew" in done.stdout
    assert call("verify", store, "--repair").returncode == 2
    mended = call("verify", store, "--repair", "--slides", study.manifest, "--json")
    assert mended.returncode == 0, mended.stderr
    said = json.loads(mended.stdout)
    assert (said["repaired"], said["encoded_tiles"]) == (["s1"], 25)
    assert call("verify", store).returncode == 0
    assert np.array_equal(open_store(store)["s1"].views, before.views)


@pytest.mark.parametrize("what", ["expression/X/data/c/0", "stain_shift/c/0/0"])
def test_damaged_counts_and_stain_shifts_are_mended_without_encoding(study: Study, what: str) -> None:
    study.embed()
    store = study.folder / "store.zarr"
    flip(store / "slides/s2" / what)
    with pytest.raises(StoreError, match="slide s2"):
        open_store(store)["s2"]
    mended = call("verify", store, "--repair", "--slides", study.manifest)
    assert mended.returncode == 0, mended.stderr
    assert "repaired: s2; 0 tiles encoded" in mended.stdout
    assert not verify(store).damaged


def test_a_store_all_of_whose_slides_are_damaged_is_repaired_as_it_was_made(study: Study) -> None:
    """Nothing in it is complete then, and it is a store all the same, of its own tile size, views and encoder."""
    study.embed(views=8)
    store = study.folder / "store.zarr"
    whole = {name: open_store(store).read(name).views for name in open_store(store).slides()}
    for name in whole:
        record = store / f"slides/{name}/zarr.json"
        record.write_bytes(record.read_bytes()[:200])
    found = verify(store)
    assert set(found.damaged) == set(whole)
    assert repair(found, study.manifest).done == sorted(whole)
    assert all(np.array_equal(open_store(store).read(name).views, views) for name, views in whole.items())


def test_a_repair_whose_slide_is_gone_says_so(study: Study) -> None:
    study.embed()
    store = study.folder / "store.zarr"
    flip(store / "slides/s2/embedding/X/c/0/0")
    lines = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join(lines[:3]) + "\n")
    done = call("verify", store, "--repair", "--slides", study.manifest)
    assert done.returncode == 2
    assert "has no slide s2, which is damaged; nothing was changed" in done.stderr
    assert list(verify(store).damaged) == ["s2"]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_set_aside_that_cannot_be_made_anew(study: Study, tmp_path: Path) -> None:
    """Whatever stands in the way of making a slide anew is said before a byte of it is touched."""
    study.embed()
    store = study.folder / "store.zarr"
    flip(store / "slides/s2/embedding/X/c/0/0")
    found, before = verify(store), everything(store)
    image = (study.folder / "s2.png").read_bytes()
    (study.folder / "s2.png").write_bytes((study.folder / "s1.png").read_bytes())
    with pytest.raises(UsageError, match=r"of slide s2 changed since it was embedded.*Nothing was changed"):
        repair(found, study.manifest)
    (study.folder / "s2.png").unlink()
    with pytest.raises(NH2STError, match=r"s2\.png"):
        repair(found, study.manifest)
    (study.folder / "s2.png").write_bytes(image)
    with pytest.raises(UsageError, match="encoder fake has no weights"):
        repair(found, study.manifest, weights=tmp_path / "w.safetensors")
    assert everything(store) == before
    assert repair(found, study.manifest).done == ["s2"]


def test_of_an_earlier_format_nothing_is_deleted(tmp_path: Path, study: Study) -> None:
    store = tmp_path / "store"
    shutil.copytree(V1 / "whole", store)
    names = open_store(store).slides()
    lines = [f"{name},s0.png" for name in names]
    study.manifest.write_text("slide_id,slide\n" + "\n".join(lines) + "\n")
    for file in (store / "slides" / names[0]).rglob("c/0*"):
        if file.is_file() and "expression" in file.as_posix():
            file.write_bytes(b"1234" + file.read_bytes()[4:])
    found, before = verify(store), everything(store)
    assert list(found.damaged) == [names[0]]
    done = call("verify", store, "--repair", "--slides", study.manifest)
    assert done.returncode == 1
    assert "has format 1, in which no slide can be made anew" in done.stderr
    assert "Nothing was changed" in done.stderr
    assert everything(store) == before


def test_a_repair_that_was_killed_is_finished_by_the_next(study: Study) -> None:
    study.embed()
    store = study.folder / "store.zarr"
    flip(store / "slides/s2/embedding/X/c/0/0")
    set_aside(store, verify(store))  # and then it was killed
    assert verify(store).incomplete == ["s2"]
    mended = call("verify", store, "--repair", "--slides", study.manifest)
    assert mended.returncode == 0, mended.stderr
    assert "repaired: s2" in mended.stdout
    assert open_store(store).slides() == ["s0", "s1", "s2"]
    flip(store / "slides/s2/embedding/X/c/0/0")
    set_aside(store, verify(store))
    lines = study.manifest.read_text().splitlines()
    study.manifest.write_text("\n".join(lines[:3]) + "\n")
    left = call("verify", store, "--repair", "--slides", study.manifest)
    assert left.returncode == 1
    assert "s2: unfinished" in left.stdout
