"""What the machine has too little of is never taken for a fault of what was being read."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
import zarr

from nh2st_pipe.core.errors import DamageError, ResourceError, SlideError, fault_of, for_want_of
from nh2st_pipe.store.read import open_store
from tests.conftest import Study


def within(error: Exception, by: str) -> Exception:
    """The error as libraries hand it on."""
    outer = RuntimeError("the chunk cannot be read")
    if by == "cause":
        outer.__cause__ = error
    elif by == "context":
        outer.__context__ = error
    return ExceptionGroup("several", [error]) if by == "group" else outer


LACKING = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("can't start new thread"),
    MemoryError(),
]


@pytest.mark.parametrize("error", LACKING, ids=str)
@pytest.mark.parametrize("by", ["", "cause", "context", "group"])
def test_a_slide_is_not_called_damaged_for_want_of_resources(
    study: Study, monkeypatch: pytest.MonkeyPatch, error: Exception, by: str
) -> None:
    study.stored(views=1)
    store = open_store(study.folder / "store.zarr")

    def fail(*given: Any, **named: Any) -> None:
        raise within(error, by) if by else error

    monkeypatch.setattr(zarr, "open_group", fail)
    with pytest.raises(ResourceError, match="slide s0 could not be read for want of resources") as raised:
        store.read("s0")
    assert "repair" not in str(raised.value)
    monkeypatch.setattr(zarr, "open_group", lambda *given, **named: {})
    with pytest.raises(DamageError, match="--repair"):
        store.read("s0")


def test_what_is_wrong_with_a_file_is_no_want(tmp_path: Any) -> None:
    for error in (ValueError("bad"), OSError(errno.EIO, "Input/output error"), FileNotFoundError(2, "none")):
        assert for_want_of(error) is None
        with pytest.raises(SlideError, match=r"a\.tif: "), fault_of(SlideError, "a.tif"):
            raise error
    wanted = r"a\.tif could not be read for want of resources: .*open files"
    with pytest.raises(ResourceError, match=wanted), fault_of(SlideError, "a.tif"):
        raise LACKING[0]
    with pytest.raises(SlideError, match="too large"), fault_of(SlideError, "a.tif"):  # what it asks for is its fault
        raise ValueError("too large") from MemoryError("cannot have 3 TB")
    circle = ValueError("a")
    circle.__cause__ = within(circle, "context")
    assert for_want_of(circle) is None


def test_too_few_open_files_are_told_as_such(study: Study) -> None:
    """For real: a process that may open no more files reads a store."""
    study.stored(views=1)
    code = (
        "import os, resource, sys; from nh2st_pipe.store.read import open_store\n"
        "store = open_store(sys.argv[1]); store.read('s0')\n"
        "held = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (held[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "store.read('s1')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    call = [sys.executable, "-c", code, str(study.folder / "store.zarr")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "is damaged" not in done.stderr
    assert "open files" in done.stderr
