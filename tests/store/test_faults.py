"""Whatever strikes at whichever write of `embed` or `upgrade`, the next run ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nh2st_pipe.core.errors import NH2STError
from nh2st_pipe.embedding.repair import repair
from nh2st_pipe.store import write
from nh2st_pipe.store.read import open_store
from nh2st_pipe.store.upgrade import upgrade
from nh2st_pipe.store.verify import verify
from tests.conftest import Study
from tests.store.faults import KINDS, Faults, Killed, Kind, struck

STEP = int(os.environ.get("NH2ST_PIPE_FAULT_STEP", "31"))
"""Every so many writes are struck, each with one kind in turn; 0 strikes every write with every kind."""


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, but for the locks, and what was half written, which goes when it is old enough."""
    every = (file for file in store.rglob("*") if file.is_file() and file.suffix != ".partial")
    files = (file for file in every if not {".leases", "log.jsonl"} & {*file.parts})
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in files}


def walk(writes: int, kinds: tuple[Kind, ...] = KINDS) -> list[tuple[int, Kind]]:
    if STEP == 0:
        return [(at, kind) for at in range(1, writes + 1) for kind in kinds]
    return [(at, kinds[(at // STEP) % len(kinds)]) for at in range(1, writes + 1, STEP)]


WITHOUT_HANDLER = tuple(kind for kind in KINDS if kind != "SIGTERM")
"""Where nothing hears it, a signal ends the process, which is what "killed" does."""


@pytest.fixture
def tiny(make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> Study:
    """A slide of nine tiles in shards of four, every batch followed by a checkpoint."""
    monkeypatch.setattr(write, "_MOST_SHARD_TILES", 4)
    monkeypatch.setattr(write, "_CHUNK_TILES", 2)
    monkeypatch.setattr(write, "_CHECKPOINT_SECONDS", 0.0)
    return make_study(1, 3)


def test_a_store_whose_very_first_write_was_cut_short_is_none_yet(tiny: Study) -> None:
    """Of it there is a half written file alone, which is nothing."""
    with struck(Faults(1, "killed in it")), suppress(Killed):
        tiny.embed(views=8, batch_size=3, device="cpu")
    (left,) = (path for path in (tiny.folder / "store.zarr").iterdir() if not path.name.startswith("."))
    assert left.name.endswith(".partial")
    assert tiny.embed(views=8, batch_size=3, device="cpu").done == ["s0"]
    assert open_store(tiny.folder / "store.zarr").slides() == ["s0"]
    assert not verify(tiny.folder / "store.zarr").damaged


@pytest.mark.timeout(1800)
def test_any_write_of_embed_may_be_the_last(tiny: Study) -> None:
    def embed(name: str) -> Path:
        tiny.embed(store=tiny.folder / name, views=8, batch_size=3, device="cpu")
        return tiny.folder / name

    with struck(Faults()) as counting:
        whole = content(embed("whole"))
    assert counting.writes > 30
    for at, kind in walk(counting.writes):
        with struck(Faults(at, kind)), suppress(Killed, OSError, KeyboardInterrupt):
            embed("store")
        embed("store")
        assert content(tiny.folder / "store") == whole, f"{kind} at write {at} of {counting.writes}"
        shutil.rmtree(tiny.folder / "store")


@pytest.mark.timeout(1800)
def test_any_write_of_a_renewal_may_be_the_last(tiny: Study) -> None:
    """Counts that have changed are written anew and a stain shift is added, the embeddings kept, cut short or not."""
    import anndata

    def embed(name: str, **options: str) -> int:
        return int(tiny.embed(store=tiny.folder / name, batch_size=3, device="cpu", **options).encoded_tiles)

    embed("before", stain_shift="off")
    path = tiny.folder / "s0.h5ad"
    data = anndata.read_h5ad(path)
    data.X = data.X * 2
    data.write_h5ad(path)
    shutil.copytree(tiny.folder / "before", tiny.folder / "whole")
    with struck(Faults()) as counting:
        assert embed("whole") == 0
    whole = content(tiny.folder / "whole")
    assert whole != content(tiny.folder / "before")
    for at, kind in walk(counting.writes):
        shutil.copytree(tiny.folder / "before", tiny.folder / "store")
        with struck(Faults(at, kind)), suppress(Killed, OSError, KeyboardInterrupt):
            embed("store")
        assert embed("store") == 0
        assert content(tiny.folder / "store") == whole, f"{kind} at write {at} of {counting.writes}"
        shutil.rmtree(tiny.folder / "store")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["v1/whole", "v1/interrupted", "v2/whole", "v2/interrupted"])
def test_any_write_of_upgrade_may_be_the_last(name: str, tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "stores" / name
    shutil.copytree(old, tmp_path / "whole")
    with struck(Faults()) as counting:
        upgrade(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    for at, kind in walk(counting.writes, WITHOUT_HANDLER):
        shutil.copytree(old, tmp_path / "store")
        with struck(Faults(at, kind)), suppress(Killed, OSError, NH2STError):
            upgrade(tmp_path / "store")
        assert open_store(tmp_path / "store").slides()[0] == "s0"  # readable at any moment
        upgrade(tmp_path / "store")
        assert content(tmp_path / "store") == whole, f"{kind} at write {at} of {counting.writes}"
        shutil.rmtree(tmp_path / "store")


def test_a_part_that_was_begun_by_an_upgrade_is_written_whole_by_the_next(tmp_path: Path) -> None:
    """Killed between its description and its values, it would be read as tiles of zeros, encoded anew at best."""
    old = Path(__file__).parents[1] / "stores/v1/interrupted"
    for name in ("whole", "store"):
        shutil.copytree(old, tmp_path / name)
    upgrade(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    (description,) = (name for name in whole if name.startswith("slides/s1/partial_") and name.endswith("zarr.json"))
    (tmp_path / "store" / description).parent.mkdir()
    (tmp_path / "store" / description).write_bytes(whole[description])
    upgrade(tmp_path / "store")
    assert content(tmp_path / "store") == whole


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["embedding/X/c/0/0", "expression/X/data/c/0"])
def test_any_write_of_a_repair_may_be_the_last(tiny: Study, what: str) -> None:
    """Of a slide that is encoded anew, and of one whose counts alone are renewed."""

    def mend(store: Path) -> None:
        assert not repair(verify(store), tiny.manifest, device="cpu").failed

    tiny.embed(store=tiny.folder / "whole", views=8, batch_size=3, device="cpu")
    whole = content(tiny.folder / "whole")
    shutil.copytree(tiny.folder / "whole", tiny.folder / "damaged")
    file = tiny.folder / "damaged/slides/s0" / what
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    shutil.copytree(tiny.folder / "damaged", tiny.folder / "store")
    with struck(Faults()) as counting:
        mend(tiny.folder / "store")
    assert content(tiny.folder / "store") == whole
    for at, kind in walk(counting.writes, WITHOUT_HANDLER):
        shutil.rmtree(tiny.folder / "store")
        shutil.copytree(tiny.folder / "damaged", tiny.folder / "store")
        with struck(Faults(at, kind)), suppress(Killed, OSError, NH2STError, KeyboardInterrupt):
            mend(tiny.folder / "store")
        mend(tiny.folder / "store")
        assert content(tiny.folder / "store") == whole, f"{kind} at write {at} of {counting.writes}"
        assert not verify(tiny.folder / "store").incomplete
