"""The run folder: what training leaves behind, and how it is read back.

    recipe.yaml      the recipe as it was used, with every default; training again from it repeats the run
    metrics.json     summary and folds of the head and of every baseline, protocol, store, versions
    per_gene.csv     head, gene, folds it was judged in, and its mean figures over them
    per_slide.csv    head, fold, slide, figures
    history.csv      one row per epoch
    predictions/     <slide_id>.h5ad, out of fold: X predicted, layers["target"]
    model/           the head trained on all slides
    log.jsonl        what happened when
    SHA256SUMS       every file with its hash, checked when the run is read; `sha256sum --check` reads it too

A run is written beside its place and renamed when it is whole. What a run that was stopped had finished (fits/) stays
there, and the next of the same name goes on with it where it asks the same question; else it is cleared.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from filelock import FileLock, Timeout

from nh2st_pipe.core.errors import RunError, fault_of, listed, written_to
from nh2st_pipe.core.locks import check_locks
from nh2st_pipe.evaluation.judged import SlideFigures
from nh2st_pipe.evaluation.statistics import figures_from, summary
from nh2st_pipe.runs.about import RUN_FORMAT
from nh2st_pipe.runs.checksums import check_files, write_sums

__all__ = ["FoundRun", "RunFolder", "find_run", "read_metrics"]

_CARD = "model/README.md"  # which people edit
_PART, _LOCK, _FITS = ".part", ".lock", "fits"
_WHOLE = ("recipe.yaml", "metrics.json", "per_gene.csv", "model/config.json", "model/model.safetensors")


class RunFolder:
    """A run being written, in a folder of its own beside its place. `commit` makes it appear there.

    `question` is all that its figures depend on: a run that was stopped is gone on with where it asked the same. As a
    context it goes away with an exception where it had no finished fit. A lock, held until the run has its name, tells
    one that was killed from one that is at work.

    Raises RunError where a run of this name is there, or is being trained.
    """

    def __init__(self, path: Path, question: str = "") -> None:
        if path.exists():
            raise RunError(f"{path} exists already; give another --out, or move it away")
        self.path = path
        with written_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(question.encode()).hexdigest() if question else uuid.uuid4().hex
        self.part = path.with_name(f"{path.name}.{key[:8]}{_PART}")
        with written_to(self.part):
            self.part.mkdir(exist_ok=True)
        try:
            check_locks(self.part, path.parent, RunError, "another --out")
        except RunError:
            with contextlib.suppress(OSError):  # what a killed run left stays
                self.part.rmdir()
            raise
        self._lock = FileLock(self.part / _LOCK, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise self._taken() from None
        self.resumed = (self.part / "log.jsonl").is_file()
        """Whether there is something of it from before."""
        for left in path.parent.glob(f"{path.name}.*{_PART}"):
            if left != self.part and not _clear_if_dead(left):
                self._lock.release()
                if not self.resumed:
                    shutil.rmtree(self.part, ignore_errors=True)
                raise self._taken()
        if path.exists():  # it was finished between the two looks
            self._lock.release()
            shutil.rmtree(self.part, ignore_errors=True)
            raise RunError(f"{path} exists already; give another --out, or move it away")
        (self.part / "predictions").mkdir(exist_ok=True)

    def _taken(self) -> RunError:
        return RunError(f"{self.path} is being trained by another process; wait for it, or give another --out")

    @property
    def fits(self) -> Path:
        """Where finished fits are kept until the run is whole."""
        return self.part / _FITS

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, at: object) -> None:
        kept = len(list(self.fits.glob("*.safetensors"))) if kind is not None else 0
        if kind is not None and not kept:
            shutil.rmtree(self.part, ignore_errors=True)
        self._lock.release()
        if kept and isinstance(error, BaseException):
            error.add_note(f"{kept} finished fit{'s are' if kept > 1 else ' is'} kept, and the same command goes on")

    def logged(self, event: str, *keys: str) -> set[tuple[Any, ...]]:
        """Return the values under `keys` of every `event` in log.jsonl."""
        return {tuple(each.get(key) for key in keys) for each in _events(self.part) if each.get("event") == event}

    def log(self, event: str, **values: Any) -> None:
        """Add a line to log.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with (self.part / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": event, **values}) + "\n")

    def write_yaml(self, name: str, values: dict[str, Any]) -> None:
        """Write a mapping as YAML, in its own order."""
        (self.part / name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a mapping as JSON; a number that is not finite is an error, never NaN in a file."""
        text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False)
        (self.part / name).write_text(text + "\n", encoding="utf-8")

    def write_table(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Write records as CSV; what is undefined is an empty cell."""
        table = pl.DataFrame(list(records), infer_schema_length=None)
        floats = [column for column, kind in table.schema.items() if kind.is_float()]
        table.with_columns(pl.col(floats).fill_nan(None)).write_csv(self.part / name)

    def commit(self) -> None:
        """Make the run appear under its name."""
        missing = [name for name in _WHOLE if not (self.part / name).is_file()]
        if missing:
            raise RunError(f"the run lacks {listed(missing)}; was something deleted in {self.part} while training?")
        shutil.rmtree(self.fits, ignore_errors=True)
        write_sums(self.part)
        place = self.path
        try:
            self.part.rename(place)
        except OSError as error:  # a folder with something in it is there
            place = self.path.with_name(f"{self.path.name}-{self.part.name.split('.')[-2]}")
            self.part.rename(place)
            raise RunError(f"{self.path} appeared while training; the finished run is at {place}") from error
        finally:  # held until here, so that none takes it for a dead one
            (place / _LOCK).unlink(missing_ok=True)
            self._lock.release()


def _clear_if_dead(part: Path) -> bool:
    """Clear what a killed run left; False where it is at work."""
    if _at_work(part):
        return False
    shutil.rmtree(part, ignore_errors=True)
    return True


def _at_work(part: Path) -> bool:
    """Whether some process is writing a run."""
    lock = FileLock(part / _LOCK)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


@dataclass(frozen=True)
class FoundRun:
    """A run, or what there is of one that was interrupted."""

    path: Path
    name: str
    metrics: dict[str, Any]
    """As `read_metrics` returns them; of an interrupted run without what comes last ("model")."""
    report: Path
    """Where its report goes if nothing else is asked for."""
    missing: tuple[str, ...] = ()
    """What an interrupted run lacks, in words."""


def find_run(of: Path) -> FoundRun | None:
    """Return the run at `of`, or what there is of it where it was interrupted or is at work; None where there is none.

    Raises RunError as `read_metrics`.
    """
    with fault_of(RunError, f"{of} is not as training writes it"):
        return _found(of)


def _found(of: Path) -> FoundRun | None:
    if (of / "metrics.json").is_file():
        return FoundRun(of, of.resolve().name, read_metrics(of), of / "report.html")
    parts = [of] if of.name.endswith(_PART) else [] if of.exists() else sorted(of.parent.glob(f"{of.name}.*{_PART}"))
    begun = [part for part in parts if (part / "log.jsonl").is_file()]
    for part in sorted(begun, key=lambda part: part.stat().st_mtime, reverse=True):
        name = part.name.removesuffix(_PART).rpartition(".")[0]
        metrics, missing = _so_far(part)
        if metrics is not None:
            state = "is still being trained" if _at_work(part) else "was interrupted"
            words = (f"This run {state}: the page shows what there is of it. {missing}",)
            return FoundRun(part, name, metrics, part.with_name(f"{name}.report.html"), words)
    return None


def _events(part: Path) -> Iterator[dict[str, Any]]:
    """Yield what log.jsonl holds, without lines that are no events: cut off while they were written."""
    file = part / "log.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _so_far(part: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the figures of a run's folds that are done, from its log (None where it had none), and what it lacks."""
    begun: dict[str, Any] | None = None
    done: dict[str, list[dict[str, Any]]] = {}
    slides: dict[str, list[SlideFigures]] = {}
    for event in _events(part):
        if event.get("event") == "start":
            begun = event.get("run")
        elif event.get("event") == "fold" and "figures" in event:
            done.setdefault(event["head"], []).append(event["figures"])
            slides.setdefault(event["head"], []).extend(figures_from(row) for row in event.get("slides", ()))
    if begun is None:
        return None, ""
    folds, heads = begun.pop("fold_names"), begun.pop("heads")
    records = {
        name: {
            "summary": summary(slides.get(name, []), sum(fold["train_seconds"] for fold in done.get(name, []))),
            "folds": done.get(name, []),
        }
        for name in heads
    }
    own, *baselines = heads
    lacking = [
        f"{name} {len(folds) - len(done.get(name, []))}" for name in heads if len(done.get(name, [])) < len(folds)
    ]
    missing = "There is no model, and no figures by gene of the baselines; the same command goes on with it."
    if lacking:
        missing += (
            f" Of {len(folds)} folds there are still to be trained: {', '.join(lacking)}; means are over the others."
        )
    return {**begun, **records[own], "baselines": {name: records[name] for name in baselines}}, missing


def read_metrics(run: str | Path) -> dict[str, Any]:
    """Return a run's metrics.json. Raises RunError where `run` is no finished run, or not as it was written."""
    path = Path(run) / "metrics.json"
    if not path.is_file():
        raise RunError(f"{run} is not a finished run (there is no metrics.json in it)")
    check_files(Path(run), but=(_CARD,))
    with fault_of(RunError, f"{path} is damaged"):
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(metrics, dict):
        raise RunError(f"{path} is damaged: it should hold a mapping")
    found = metrics.get("format", 0)
    if not isinstance(found, int) or found > RUN_FORMAT:
        raise RunError(
            f"{run} has run format {found}, and this version of nh2st-pipe reads {RUN_FORMAT} and older; "
            "a newer version may read it"
        )
    return metrics
