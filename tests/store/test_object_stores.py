"""Stores in object stores: what is refused once, what is refused for ever, and the same store as in a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.lease import ObjectLease
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.verify import verify
from tests.conftest import Study
from tests.remote import URL, refusing, s3_server
from tests.store.same import same


def test_writes_that_are_refused_are_made_again(study: Study) -> None:
    study.embed(store=study.folder / "plain.zarr", views=8, stain_shift="off")
    parts = ("embedding/X/c", "s1/zarr.json", "tissue.png", ".leases", "thumbnail.png")
    with refusing() as store:
        store.each = dict.fromkeys(parts, 2)
        summary = study.embed(store=URL, views=8, stain_shift="off")
        assert (summary.done, summary.failed, store.refused) == (["s0", "s1", "s2"], {}, 2 * len(parts))
        assert same(study.folder / "plain.zarr", URL)


def test_reads_that_are_refused_are_made_again(study: Study) -> None:
    study.embed(store=study.folder / "plain.zarr", stain_shift="off")
    parts = ("s1/embedding/X/c", "s1/tissue.png", "s1/expression/zarr.json")
    with refusing() as store:
        store.each, store.reads = dict.fromkeys(parts, 2), True
        summary = study.embed(store=URL, stain_shift="off")
        assert summary.done == ["s0", "s1", "s2"]
        assert same(study.folder / "plain.zarr", URL)
        assert not verify(URL).damaged
        assert store.refused == 2 * len(parts)


def test_what_was_written_is_not_read_back(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what another process had written of a slide before, which nobody here has the checksum of."""
    from nh2st_pipe.core.location import Location

    read, url = list[str](), "memory://read-back/store.zarr"
    plain = Location.read_all

    def reading(self: Location, folder: str, names: list[str]) -> Any:
        read.extend(f"{folder}/{name}" for name in names)
        return plain(self, folder, names)

    monkeypatch.setattr(Location, "read_all", reading)
    study.embed(store=url, views=8)
    assert read == []
    assert not verify(url).damaged
    records = [open_store(url).record(name) for name in ("s0", "s1", "s2")]
    assert all(record is not None and len(record.files) > 20 for record in records)
    read.clear()
    counts = anndata.read_h5ad(study.folder / "s1.h5ad")
    counts.X[0, 0] += 1
    counts.write_h5ad(study.folder / "s1.h5ad")
    study.embed(store=url)  # its counts are renewed
    assert read
    assert not any(name.startswith("slides/s1/expression/X") for name in read)
    assert any(name.startswith("slides/s1/embedding/X") for name in read)
    assert not verify(url).damaged


@pytest.mark.parametrize("part", ["s1/embedding/X/c", "s1/zarr.json", "s1/tissue.png"])
def test_a_store_that_refuses_for_ever_ends_the_run_and_keeps_what_is_there(study: Study, part: str) -> None:
    study.embed(store=study.folder / "plain.zarr", stain_shift="off")
    with refusing() as store:
        store.part, store.times = part, 1 << 30
        with pytest.raises(StoreError, match=r"^s3://bucket/store\.zarr: the store is busy"):
            study.embed(store=URL, stain_shift="off")
        store.times = 0
        assert open_store(URL).slides() == ["s0"]
        assert study.embed(store=URL, stain_shift="off").kept == ["s0"]
        assert same(study.folder / "plain.zarr", URL)


def test_a_slide_that_another_process_took_over_is_left_to_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ObjectLease.check

    def lost(self: ObjectLease) -> None:
        self._lost = self._lost or "slide-s1" in self._name
        plain(self)

    monkeypatch.setattr(ObjectLease, "check", lost)
    with refusing():
        summary = study.embed(store=URL)
        assert summary.done == ["s0", "s2"]
        assert "the lease on slide-s1 was taken over by another process" in summary.failed["s1"]


def test_what_groups_a_slide_has_is_asked_of_an_object_store_a_few_times(study: Study) -> None:
    with refusing() as store:
        study.embed(store=URL)
        assert store.asked["slides/s1/embedding/X/zarr.json"] > 0
        most = max(times for name, times in store.asked.items() if name.startswith("slides/s1/"))
        assert most <= 10, store.asked  # zarr asks for whatever lies above what it makes, a hundred times for one slide


def test_an_s3_store_is_written_read_verified_and_shared(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(4)
    study.embed(store=study.folder / "plain.zarr")
    command = (
        "import sys; from nh2st_pipe.embedding.run import embed\n"
        "done = embed(sys.argv[1], encoder='fake', store=sys.argv[2], tile_px=48, batch_size=5, device='cpu')\n"
        "print(done.encoded_tiles, len(done.failed))"
    )
    url = "s3://bucket/some/store.zarr"
    with s3_server():
        both = [
            subprocess.Popen([sys.executable, "-c", command, str(study.manifest), url], stdout=-1, text=True)
            for _ in range(2)
        ]
        said = [[int(word) for word in process.communicate(timeout=100)[0].split()] for process in both]
        assert sum(tiles for tiles, _ in said) == 4 * 25  # every slide once
        assert [failed for _, failed in said] == [0, 0]
        assert same(study.folder / "plain.zarr", url)
        assert not verify(url).damaged
        with pytest.raises(StoreError, match=r"^s3://nowhere/store\.zarr: The specified bucket does not exist"):
            study.embed(store="s3://nowhere/store.zarr")


def test_inspect_reads_each_record_once(study: Study) -> None:
    from tests.cli.test_commands import call

    with refusing() as store:
        study.embed(store=URL)
        store.asked.clear()
        done = call("inspect", URL)
        assert "s1: 25 tiles of 48 level-0 px (" in done.stdout
        assert [store.asked[f"slides/{name}/zarr.json"] for name in ("s0", "s1", "s2")] == [1, 1, 1]


def test_credentials_may_be_those_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.core.location import Location

    heard = list[str]()
    with refusing() as store:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = OFLAB\naws_secret_access_key = x\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "lab")
        store.signed = heard.append
        Location(URL).write("a", b"one")
    assert heard
    assert all("Credential=OFLAB/" in words for words in heard)
