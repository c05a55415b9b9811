"""SHA256SUMS: a folder's files with their hashes, in the form that `sha256sum --check` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

from nh2st_pipe.core.errors import RunError

__all__ = ["SUMS", "check_files", "sha256", "write_sums"]

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the hashes of every file below `folder`, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    files = sorted(path for path in found if not path.name.startswith("."))
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_files(folder: Path, names: Iterable[str] | None = None, *, but: Collection[str] = ()) -> None:
    """Hold `names` (by default every file that is listed, `but` for some) against the list in `folder`.

    A folder without a list was made before there was one, and passes. Raises RunError naming the first file that is
    not what was written.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    listed = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for name in [each for each in listed if each not in but] if names is None else names:
        path = folder / name
        if name not in listed:
            raise RunError(f"{path} is not in the list of files {sums}; was it added, or the list cut short?")
        if not path.is_file():
            raise RunError(f"{path} is missing; {sums} lists it")
        if sha256(path) != listed[name]:
            raise RunError(f"{path} has changed since it was written ({sums} has another SHA-256); train again")
