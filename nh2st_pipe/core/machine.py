"""What this machine has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nh2st_pipe.core.errors import UsageError

__all__ = ["bytes_of", "cores", "memory", "peak"]

_UNITS = {"": 10**9, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CGROUPS = Path("/sys/fs/cgroup")
_USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
_OWN_CGROUP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Return how many bytes of memory are free for this process, a batch system's limit considered."""
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    for file in _limit_files():
        with suppress(OSError):
            limits += [max(0, int(text) - _used(file)) for text in [file.read_text().strip()] if text.isdigit()]
    return min(limits)


def peak() -> int:
    """Return the most bytes of memory that this process has had, as far as the system knows; 0 where it does not."""
    with suppress(OSError, ValueError, IndexError):
        return 1024 * int(_STATUS.read_text().partition("VmHWM:")[2].split()[0])
    return 0


def _used(limit: Path) -> int:
    """Return the bytes that the group of a limit uses, files that give way aside; 0 where it does not say."""
    try:
        used = int((limit.parent / _USED[limit.name]).read_text())
    except (OSError, ValueError):
        return 0
    with suppress(OSError, ValueError):
        for line in (limit.parent / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return used - int(value)
    return used


def _limit_files() -> Iterator[Path]:
    """Yield the files that may hold a limit: of this process's control group, as Slurm makes one, and those above."""
    with suppress(OSError):
        for line in _OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = _CGROUPS / controllers
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            own = root / path.lstrip("/")
            yield from (each / name for each in (own, *own.parents) if each.is_relative_to(root))


def bytes_of(size: str | float, option: str) -> int:
    """Return a size in bytes: "8GB", "500MB", or a number of GB. Raises UsageError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size), re.IGNORECASE)
    unit = found.group(2).upper() if found else ""
    unit = unit if unit in _UNITS else f"{unit}B"
    if found is None:
        raise UsageError(f"{option} takes a size such as 8GB or 500MB, not {size}")
    return int(float(found.group(1)) * _UNITS[unit])
