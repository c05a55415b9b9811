"""SHA-256 of files, kept where reading them takes long: known by size, time of change and inode."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from nh2st_pipe.core.whole import written_whole

__all__ = ["LARGE", "cache_of", "remembered_sha256"]

LARGE = 1 << 24  # bytes; what is smaller is read in no time
_SURELY_BEFORE = 2.0  # s: a file may change once more within one tick of its clock


def remembered_sha256(path: Path, kept: Path) -> str:
    """Return a file's SHA-256; that of a large one is kept in the file `kept`, with size, time of change and inode."""
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    large = stat.st_size > LARGE
    if large:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(kept.read_text("utf-8"))
            if known["of"] == state:
                return str(known["sha256"])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if large and time.time() - stat.st_mtime > _SURELY_BEFORE:
        with suppress(OSError), written_whole(kept) as part:  # where it may not be written, it is not kept
            part.write_text(json.dumps({"of": state, "sha256": found}), "utf-8")
    return found


def cache_of(path: Path) -> Path:
    """Return where in the user's cache the SHA-256 of a file is kept that somebody else may own."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return home / "nh2st-pipe" / "sha256" / f"{name}.json"
