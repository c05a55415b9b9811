"""Embeddings streamed from a file: the same numbers, the same heads, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.core.machine import bytes_of, memory
from nh2st_pipe.data import streamed
from nh2st_pipe.data.streamed import StreamedCache, scratch_file
from nh2st_pipe.data.study import Study
from nh2st_pipe.runs.checksums import sha256
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.run import train
from tests.conftest import Study as Folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(streamed, "_file_system", lambda folder: "ext4")
    return folder


def test_whatever_is_gathered_is_what_a_resident_cache_gives(study: Folder, scratch: Path) -> None:
    study.stored(views=8)
    store = open_store(study.folder / "store.zarr")
    said = list[str]()
    resident = Study.load(store, store.slides())
    flat = Study.load(store, store.slides(), max_memory=1000, say=said.append)
    assert isinstance(flat.cache, StreamedCache)
    assert len(said) == 1
    assert "are streamed from disk" in said[0]
    assert (flat.cache.n_views, flat.cache.dim) == (resident.cache.n_views, resident.cache.dim)
    draw = torch.Generator().manual_seed(0)
    some = torch.randint(75, (40,), generator=draw)
    square, views = torch.randint(75, (6, 9), generator=draw), torch.randint(8, (40,), generator=draw)
    for rows, view in ((some, views), (some, 3), (torch.arange(20, 60), slice(None)), (square, views[:6, None])):
        assert torch.equal(flat.cache.gather(rows, view), resident.cache.gather(rows, view))
    other = pickle.loads(pickle.dumps(flat.cache))  # as another process gets it
    assert torch.equal(other.gather(some, 0), resident.cache.gather(some, 0))
    del other
    gc.collect()
    assert len(list(scratch.glob("nh2st-*"))) == 1
    del flat
    gc.collect()
    assert list(scratch.glob("nh2st-*")) == []


@pytest.mark.parametrize(("recipe", "jobs"), [("nh2st", 1), ("nh2st-context", 2)])
def test_a_run_comes_to_the_same_bit_for_bit(study: Folder, scratch: Path, recipe: str, jobs: int) -> None:
    study.stored(views=8)
    few = ["fit.epochs=2"] if recipe == "nh2st" else ["head.network.epochs=1", "head.network.members=1"]
    heads = ("ridge", "ridge-context", "knn") if recipe == "nh2st" else ("knn",)
    made = {}
    for name, most in (("plain", None), ("flat", "0.001MB")):
        made[name] = train(
            study.folder / "store.zarr",
            recipe=recipe,
            genes=6,
            settings=[*few, f"baselines=[{', '.join(heads)}]"],
            out=study.folder / name,
            jobs=jobs,
            max_memory=most,
        )
    notes = made["flat"].metrics["notes"]
    assert [note for note in notes if "streamed from disk" in note]
    for name in ("model/model.safetensors", *(f"predictions/s{i}.h5ad" for i in range(3))):
        assert sha256(made["flat"].path / name) == sha256(made["plain"].path / name), name
    for head in heads:
        one, two = ([fold["pcc"] for fold in run.metrics["baselines"][head]["folds"]] for run in made.values())
        assert one == two, head
    gc.collect()
    assert list(scratch.glob("nh2st-*")) == []


def test_what_was_read_is_given_back_to_the_system(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = list[int]()
    plain = StreamedCache._advise

    def advised(self: StreamedCache, what: str, *where: int) -> None:
        advice.append(getattr(mmap, what))
        plain(self, what, *where)

    monkeypatch.setattr(StreamedCache, "_advise", advised)
    cache = scratch_file((5000, 1, 64), CPU, 1 << 20, [scratch])
    with cache.place(0, 5000) as place:
        place.copy_(torch.arange(5000, dtype=torch.float16)[:, None, None].expand(-1, 1, 64))
    assert advice.count(mmap.MADV_DONTNEED) == 1
    for _ in range(4):
        cache.gather(torch.tensor([1, 4, 9]), 0)
    assert advice.count(mmap.MADV_DONTNEED) == 1  # a few rows are kept
    for _ in range(4):
        cache.gather(torch.randperm(5000)[:200], 0)
    assert advice.count(mmap.MADV_DONTNEED) == 3
    assert cache.gather(torch.tensor([7]), 0)[0, 0] == 7  # and nothing is lost


def test_a_disk_without_room_is_passed_over_and_then_named(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = (1 << 40, 1, 64)
    with pytest.raises(TrainError, match=r"nowhere on disk: .*scratch \(\d.* GB free\), .*set TMPDIR"):
        scratch_file(huge, CPU, 1, [scratch, tmp_path / "absent"])
    plain, done = os.posix_fallocate, list[bool]()

    def full(handle: int, start: int, size: int) -> None:
        if not done:
            done.append(True)
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = scratch_file((10, 1, 8), CPU, 1, [scratch, tmp_path])
    assert list(scratch.glob("nh2st-*")) == []
    assert cache._file.parent == tmp_path
    monkeypatch.setattr(streamed, "_file_system", lambda folder: "tmpfs")
    with pytest.raises(TrainError, match="is memory itself"):
        scratch_file((10, 1, 8), CPU, 1, [scratch])


def test_what_a_killed_process_left_is_deleted(scratch: Path) -> None:
    alive = scratch_file((10, 1, 8), CPU, 1, [scratch])
    dead = scratch / "nh2st-cache-x"
    dead.write_bytes(b"x")
    for file in scratch.iterdir():
        os.utime(file, (0, 0))
    another = scratch_file((10, 1, 8), CPU, 1, [scratch])
    assert not dead.exists()
    assert len(list(scratch.iterdir())) == 2
    del alive, another
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "size"), [("8GB", 8e9), ("500 MB", 5e8), ("1.5g", 1.5e9), (2, 2e9), ("64kb", 64e3), ("100B", 100)]
)
def test_sizes_are_read_as_people_write_them(said: Any, size: float) -> None:
    assert bytes_of(said, "--max-memory") == size


def test_what_is_no_size_is_refused(study: Folder) -> None:
    for said in ("much", "-1GB", "8 apples"):
        with pytest.raises(UsageError, match="--max-memory takes a size such as 8GB"):
            bytes_of(said, "--max-memory")


def test_a_batch_systems_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup").write_text("0::/slurm/job_7/step_0\n")
    monkeypatch.setattr("nh2st_pipe.core.machine._CGROUPS", tmp_path)
    monkeypatch.setattr("nh2st_pipe.core.machine._OWN_CGROUP", tmp_path / "cgroup")
    limit = tmp_path / "slurm/job_7/memory.max"  # the job's, above the step's own group
    limit.parent.mkdir(parents=True)
    free = memory()
    assert free > 1 << 20
    limit.write_text("max\n")
    assert memory() > 1 << 20
    limit.write_text("1048576\n")
    assert memory() == 1 << 20
    limit.with_name("memory.current").write_text("1000000\n")
    assert memory() == (1 << 20) - 1_000_000
    limit.with_name("memory.stat").write_text("anon 7\ninactive_file 900000\n")  # files that give way
    assert memory() == (1 << 20) - 100_000
    assert np.isfinite(free)
