"""Warnings of other libraries that say nothing to our users, kept quiet where they arise.

`warnings.catch_warnings` swaps a list that all threads share; stage one reads and writes in two threads, so only one of
them may be inside at a time.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_warnings"]

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Ignore warnings raised inside."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
