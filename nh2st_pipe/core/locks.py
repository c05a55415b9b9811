"""Whether a file system keeps locks: asked once for each folder, before anything is left to them."""

from __future__ import annotations

import errno
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from nh2st_pipe.core.errors import NH2STError

__all__ = ["check_locks"]

_PROBE = ".probe-"
_SURELY_LEFT = 60.0  # s
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@cache
def check_locks(folder: Path, of: Path, kind: type[NH2STError], instead: str) -> None:
    """Raise `kind` where no file in `folder` can be locked, which keeps processes apart that write to `of`.

    `instead` is what else may be given.
    """
    try:
        import fcntl
    except ImportError:  # Windows, whose locks are of another kind
        return
    try:
        for left in folder.glob(f"{_PROBE}*"):  # by a process that was killed, and not by one that is asking now
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _SURELY_LEFT:
                    left.unlink()
        with tempfile.TemporaryFile(prefix=_PROBE, dir=folder) as probe:  # which has no name, where the system can
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise kind(f"{folder} cannot be written to: {error.strerror or error}") from error
        raise kind(
            f"the file system of {of} keeps no locks ({error.strerror}), without which two processes would write over "
            f"each other; take a local disk, another mount (Lustre: -o flock; NFS: version 4), or {instead}"
        ) from error
