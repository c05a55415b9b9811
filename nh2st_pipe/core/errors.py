"""The errors this package raises on purpose.

Each carries one message for a person: what was expected, what arrived, where, and what to try. The command
line prints it without a traceback and exits with `exit_status`.

    NH2STError                      status 1: something failed
    ├── UsageError (ValueError)     status 2: the call itself is wrong
    │   └── RecipeError             a recipe that is not there, or does not say what it must
    ├── ManifestError (ValueError)  manifest.csv, all of its faults at once
    ├── SlideError (OSError)        an image that cannot be read, or tiles that are not on it
    ├── ExpressionError (ValueError)  an .h5ad or a dataset's own files that cannot be used
    ├── HubError (OSError)          a file of the Hugging Face hub that cannot be had
    ├── EncoderError (RuntimeError) weights that cannot be had or do not fit
    ├── StoreError (ValueError)     a store that is not one, is another's, or is damaged
    │   ├── DamageError             one slide of a store that cannot be believed; the others can
    │   └── LeaseError              one slide that another process has taken over
    ├── TrainError (ValueError)     data that cannot be trained on as asked
    ├── RunError (ValueError)       a run folder that cannot be written or read
    ├── WriteError (OSError)        a file that cannot be written
    └── ResourceError (OSError)     too little memory, threads, open files or room; no file is at fault
"""

from __future__ import annotations

import difflib
import errno
import json
import pickle
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "OF_ONE_SLIDE",
    "DamageError",
    "EncoderError",
    "ExpressionError",
    "HubError",
    "LeaseError",
    "ManifestError",
    "NH2STError",
    "RecipeError",
    "ResourceError",
    "RunError",
    "SlideError",
    "StoreError",
    "TrainError",
    "UsageError",
    "WriteError",
    "fault_of",
    "for_want_of",
    "listed",
    "nearest",
    "reason_of",
    "sendable",
    "written_to",
]


class NH2STError(Exception):
    """The root: something failed, and the message says what to do."""

    exit_status = 1


class UsageError(NH2STError, ValueError):
    """The call itself is wrong; nothing was started."""

    exit_status = 2


class RecipeError(UsageError):
    """A recipe that does not exist or does not validate."""


class ManifestError(NH2STError, ValueError):
    """Faults of a manifest, all of them, each with row and column."""


class SlideError(NH2STError, OSError):
    """A slide that cannot be opened, read or tiled."""


class ExpressionError(NH2STError, ValueError):
    """Expression data that cannot be used."""


class HubError(NH2STError, OSError):
    """A file that the Hugging Face hub does not give."""


class EncoderError(NH2STError, RuntimeError):
    """An encoder that cannot be built, found or loaded."""


class StoreError(NH2STError, ValueError):
    """An embedding store that cannot be used as asked."""


class DamageError(StoreError):
    """One slide of a store that is damaged; the others are not touched by it. `what` is wrong with it."""

    def __init__(self, store: object, slide_id: str, what: str) -> None:
        self.what = what
        self._made_of = str(store), slide_id, what
        super().__init__(
            f"{store}, slide {slide_id} is damaged: {what}; nh2st-pipe verify {store} --repair --slides manifest.csv "
            "makes it anew"
        )

    def __reduce__(self) -> tuple[type[DamageError], tuple[str, str, str]]:
        return type(self), self._made_of


class LeaseError(StoreError):
    """A slide that this process was writing, and another has taken over; the others are not touched by it."""


class ResourceError(NH2STError, OSError):
    """The machine has too little of something: memory, threads, open files, room. Nothing that was read is at fault."""


class WriteError(NH2STError, OSError):
    """A file that cannot be written: a disk that is full, a folder that may not be written to."""

    def __init__(self, what: str, number: int | None = None) -> None:
        super().__init__(what)
        self.errno = number


def sendable(error: BaseException) -> BaseException:
    """Return an error as it can be raised in another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error


OF_ONE_SLIDE = (SlideError, ExpressionError, DamageError, LeaseError)
"""Faults of a single slide: it is passed over by name, and the others go on."""


class TrainError(NH2STError, ValueError):
    """Data that cannot be trained on as asked."""


class RunError(NH2STError, ValueError):
    """A run folder that cannot be written or read."""


@contextmanager
def written_to(where: object) -> Iterator[None]:
    """Make what a disk refuses a WriteError that names `where`: the error of a write does not say of which file."""
    try:
        yield
    except NH2STError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise WriteError(f"{where} cannot be written: {error.strerror or error}", error.errno) from error


_TOO_LITTLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT}
_WORDS = ("can't start new thread", "can't allocate memory", "Cannot allocate memory", "out of memory")


def for_want_of(error: BaseException) -> str | None:
    """Return what the machine has too little of where that is why `error` arose, in its words; None where it is not.

    Such an error says nothing of the file that was being read: what it was made of may be what it always was.
    """
    seen = set[int]()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        few = isinstance(each, OSError) and each.errno in _TOO_LITTLE
        if few or isinstance(each, MemoryError) or any(words in str(each) for words in _WORDS):
            return " ".join(str(each).split())[:200] or "there is not enough memory"
        todo += [each.__cause__, each.__context__, *(each.exceptions if isinstance(each, BaseExceptionGroup) else ())]
    return None


def _of_memory(error: BaseException) -> bool:
    chain = (error, error.__cause__, error.__context__)
    return any(isinstance(each, MemoryError) or "memory" in str(each) for each in chain)


_PYTHON = re.compile(
    r"has no attribute|NoneType|Traceback|unhashable|not subscriptable|not iterable|\b(int|float|str|bytes|len)\(\)|"
    r"invalid literal for|list index|index out of range|out of bounds|[a-z]Error\b|dtype|<class|<built-in|ndarray|"
    r"positional argument|keyword argument|codec can't|cannot reshape|broadcast|must be (str|real)|unsupported operand|"
    r"not supported between|recursion|values to unpack|\[Errno|0x[0-9a-f]{6,}|object at |truth value|zero-size array|"
    r"'(str|int|float|list|dict|bool|tuple)\'|argument must be|timezone|isoformat"
)
"""What Python, and libraries in its words, say of values, which says nothing to a person who has a file."""

_AT_KEY = re.compile(r"(?:reading|writing) key '([^']+)'")


def reason_of(error: BaseException) -> str:
    """Return in a person's words why a file of somebody else could not be used, with the place in it where it is known.

    What a library says stays as it is, but for what only a programmer reads.
    """
    text = " ".join(str(error).split())
    notes = " ".join([text, *getattr(error, "__notes__", ())])
    found = _AT_KEY.search(notes)
    at = f" (at '{found.group(1)}')" if found else ""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON (line {error.lineno:,}, column {error.colno:,})"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 text (byte {error.start:,}){at}"
    if isinstance(error, KeyError) and error.args and not _PYTHON.search(str(error.args[0])[:80]):
        return f"it lacks '{str(error.args[0])[:80]}'{at}"
    if isinstance(error, RecursionError):
        return "what it holds is nested too deeply"
    if isinstance(error, _OF_A_PROGRAM) or not text or _PYTHON.search(text):
        return f"what it holds is not of the form expected there{at}"
    return text[:200] + (at if found and found.group(1) not in text[:200] else "")


_OF_A_PROGRAM = (
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    ZeroDivisionError,
    NotImplementedError,
    StopIteration,
    NameError,
)


@contextmanager
def fault_of(kind: type[NH2STError], where: str) -> Iterator[None]:
    """Make whatever goes wrong inside a fault of the file that is read: `kind`, naming `where` and the cause.

    For what parses files of others, which may hold anything: the slide is passed over, not the whole run.
    """
    try:
        yield
    except (NH2STError, MemoryError):
        raise
    except Exception as error:
        lacking = for_want_of(error)
        if lacking and not _of_memory(error):  # a file may ask for more memory than there is on any machine
            raise ResourceError(f"{where} could not be read for want of resources: {lacking}") from error
        raise kind(f"{where}: {reason_of(error)}") from error


def nearest(wrong: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name most like `wrong`, or an empty string."""
    match = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.4)
    return f"; did you mean '{match[0]}'?" if match else ""


def listed(items: Iterable[object], most: int = 5) -> str:
    """Return "a, b, c and 7 more": enough to find the fault, never a screenful."""
    every = [str(item) for item in items]
    shown = ", ".join(every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most:,} more"
