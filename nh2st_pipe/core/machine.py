"""What this machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nh2st_pipe.core.errors import UsageError

__all__ = ["bytes_of", "cores", "memory"]

_UNITS = {"": 10**9, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Return how many bytes of memory are free for this process, a batch system's limit considered."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit in _LIMITS:
        file = Path(limit)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return min(free, int(text))
    return free


def bytes_of(size: str | float, option: str) -> int:
    """Return a size in bytes: "8GB", "500MB", or a number of GB. Raises UsageError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size), re.IGNORECASE)
    unit = found.group(2).upper() if found else ""
    unit = unit if unit in _UNITS else f"{unit}B"
    if found is None:
        raise UsageError(f"{option} takes a size such as 8GB or 500MB, not {size}")
    return int(float(found.group(1)) * _UNITS[unit])
