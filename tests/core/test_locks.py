from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.locks import check_locks

KILLED = """
import os, sys, tempfile
tempfile._O_TMPFILE_WORKS = sys.argv[2] == "nameless"
if not tempfile._O_TMPFILE_WORKS:
    os.unlink = lambda *arguments, **options: os._exit(9)  # before the name is taken away
else:
    import fcntl
    fcntl.flock = lambda *arguments: os._exit(9)
from pathlib import Path
from nh2st_pipe.core.errors import StoreError
from nh2st_pipe.core.locks import check_locks
check_locks(Path(sys.argv[1]), Path(sys.argv[1]), StoreError, "")
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="of Linux")
@pytest.mark.parametrize("system", ["nameless", "named"])
def test_nothing_is_left_of_asking_whoever_is_killed_meanwhile(tmp_path: Path, system: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), system])
    assert done.returncode == 9
    left = list(tmp_path.iterdir())
    assert len(left) == (system == "named")
    check_locks(tmp_path, tmp_path, StoreError, "")
    assert list(tmp_path.iterdir()) == left  # it may be that of a process which is asking at this moment
    for path in left:
        os.utime(path, (0, 0))
    check_locks.cache_clear()
    check_locks(tmp_path, tmp_path, StoreError, "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StoreError, match=r"cannot be written to: No space left on device"):
        check_locks(tmp_path, tmp_path, StoreError, "")
