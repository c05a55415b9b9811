"""Slides copied to a local disk ahead of need."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.embedding.staging import Stage
from nh2st_pipe.slides import open_slide
from tests.conftest import Study
from tests.store.same import same


def test_slides_are_read_from_copies_of_which_few_lie_there_and_none_stays(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(7)
    study.embed(store=study.folder / "plain.zarr", stain_shift="off")
    opened, most = list[Path](), 0
    plain = open_slide

    def opening(path: Path) -> Any:
        nonlocal most
        opened.append(path)
        # os.walk passes over what is deleted meanwhile.
        most = max(most, sum(name.endswith(".png") for _, _, names in os.walk(stage) for name in names))
        return plain(path)

    stage = study.folder / "local" / "disk"
    monkeypatch.setattr("nh2st_pipe.embedding.opener.open_slide", opening)
    summary = study.embed(stage=stage, workers=2, stain_shift="off")
    assert len(summary.done) == 7
    assert len(opened) == 7
    assert all(path.is_relative_to(stage) for path in opened)
    assert 1 <= most <= 3  # two that are open beside two readers, and one that waits
    assert list(stage.iterdir()) == []
    assert same(study.folder / "plain.zarr", study.folder / "store.zarr")


def full(*_: Any) -> Any:
    return shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000)


def test_what_does_not_fit_is_read_from_where_it_is(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.embed(store=study.folder / "plain.zarr")
    monkeypatch.setattr(shutil, "disk_usage", full)
    summary = study.embed(stage=study.folder / "local")
    assert summary.done == ["s0", "s1", "s2"]
    assert [note for note in summary.notices if "s1: not staged, as" in note and "is full (0.00 GB free" in note]
    monkeypatch.undo()

    def fills(self: Stage, file: Path, target: Path) -> None:
        target.write_bytes(file.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Stage, "_copy", fills)
    summary = study.embed(stage=study.folder / "local", store=study.folder / "other.zarr")
    assert [note for note in summary.notices if note.startswith("s1: not staged (No space left on device); it is read")]
    for name in ("store.zarr", "other.zarr"):
        assert same(study.folder / "plain.zarr", study.folder / name)
    assert list((study.folder / "local").iterdir()) == []


def test_a_fault_names_the_file_of_the_manifest(study: Study) -> None:
    (study.folder / "s1.png").write_text("no image at all")
    (study.folder / "s2.png").write_bytes(b"")
    failed = study.embed(stage=study.folder / "local").failed
    assert set(failed) == {"s1", "s2"}
    for slide, cause in failed.items():
        assert str(study.folder / f"{slide}.png") in cause
        assert "nh2st-stage" not in cause


def test_slides_that_are_done_are_not_copied(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.embed(only=["s0"])
    copied = list[str]()
    plain = Stage.copy

    def copying(self: Stage, slide: Path) -> Any:
        copied.append(slide.name)
        return plain(self, slide)

    monkeypatch.setattr(Stage, "copy", copying)
    study.embed(stage=study.folder / "local")
    assert copied == ["s1.png", "s2.png"]


def test_an_error_elsewhere_ends_the_run_and_empties_the_stage(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nh2st_pipe.store.write import SlideWriter

    def failing(self: SlideWriter, *_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    study = make_study(6)
    monkeypatch.setattr(SlideWriter, "append", failing)
    with pytest.raises(OSError, match="Input/output error"):
        study.embed(stage=study.folder / "local")
    assert list((study.folder / "local").iterdir()) == []
    monkeypatch.undo()
    assert len(study.embed(stage=study.folder / "local").done) == 6


LEAVES = """
import os, sys
from pathlib import Path
from nh2st_pipe.core.leftovers import new_folder
folder, held = new_folder(Path(sys.argv[1]), "nh2st-stage")
(folder / "slide.svs").write_bytes(b"x")
os.utime(folder, (0, 0))
print(folder, flush=True)
if sys.argv[2] == "lives":
    sys.stdin.read()
os._exit(9)
"""


def test_what_killed_processes_left_is_deleted_and_what_others_have_is_not(tmp_path: Path) -> None:
    """Told by a lock, which ends with the process: its number says nothing of one in another container."""
    processes = [
        subprocess.Popen([sys.executable, "-c", LEAVES, str(tmp_path), how], stdin=-1, stdout=-1, text=True)
        for how in ("dies", "lives")
    ]
    dead, alive = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
    processes[0].communicate(timeout=100)
    assert processes[0].returncode == 9
    just_made = tmp_path / "nh2st-stage-just-made"  # and not locked yet
    just_made.mkdir()
    with Stage(tmp_path):
        assert not dead.exists()
        assert (alive / "slide.svs").exists()
    processes[1].communicate("")
    assert just_made.exists()
    with Stage(tmp_path):
        assert not alive.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--stage .*file cannot be used"), Stage(tmp_path / "file"):
        pass


def test_all_files_of_a_slide_are_copied(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b.ome.zarr/zarr.json", "b.ome.zarr/0/c/0/0", "c.svs"):
        (slides / name).parent.mkdir(parents=True, exist_ok=True)
        (slides / name).write_text(name)
    (slides / "d.dcm").write_text("one of several")
    with Stage(tmp_path / "local") as stage:
        for name, also in (("a.mrxs", "a/Data0000.dat"), ("b.ome.zarr", "b.ome.zarr/0/c/0/0"), ("c.svs", "c.svs")):
            copy, why = stage.copy(slides / name)
            assert (copy.name, why) == (name, None)
            assert (copy.parent / also).read_text() == also
            assert copy.is_relative_to(tmp_path / "local")
            stage.delete(copy)
            assert not copy.exists()
        copy, why = stage.copy(slides / "d.dcm")
        assert copy == slides / "d.dcm"
        assert why is not None
        stage.delete(copy)
    assert (slides / "d.dcm").exists()
