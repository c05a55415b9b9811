"""Warnings of other libraries that say nothing to our users, kept quiet where they arise.

`warnings.catch_warnings` swaps a list that all threads share; stage one reads and writes in several, so only one of
them may be inside at a time. Whatever else sets a value of the whole process does so under the same lock: with two of
them, one thread could wait for the second inside the first while another did the reverse.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PROCESS_WIDE", "quiet_warnings"]

PROCESS_WIDE = threading.RLock()
"""Held while a value that all threads share is another than usual."""


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Ignore warnings raised inside."""
    with PROCESS_WIDE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
