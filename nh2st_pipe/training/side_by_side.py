"""Heads on folds, one after another or side by side in processes that share one copy of the embeddings."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch

from nh2st_pipe.core.children import fresh_processes, without_main
from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.machine import cores
from nh2st_pipe.data.study import Study
from nh2st_pipe.training.fold import FoldResult, FoldTask, run_fold

__all__ = ["run_all"]

_LISTEN = 0.25  # seconds between two looks at whether the end was asked for
_study: Study | None = None  # of a worker, for all of its tasks


def run_all(
    tasks: Sequence[FoldTask],
    study: Study,
    jobs: int,
    tell: Callable[[int, str], None],
    keep: Callable[[int, FoldResult], None] = lambda number, result: None,
) -> Iterator[FoldResult]:
    """Yield the results of `tasks` in their order, `jobs` of them at work at a time.

    `tell(done, words)` hears how many are done and what is, several times a second, and may raise to end it. `keep`
    gets each with its place as soon as it is done. With several jobs `study`'s embeddings have to lie in shared memory;
    each process has its share of the processors. Raises TrainError where a process is killed.
    """
    if not tasks:
        return
    jobs = max(1, min(jobs, len(tasks)))  # what is not needed would take processors from the others
    if jobs == 1:
        for done, task in enumerate(tasks):
            tell(done, task.recipe.name)
            result = run_fold(task, study, partial(_told, tell, done, task.recipe.name))
            keep(done, result)
            yield result
        return
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=fresh_processes(__name__),
        initializer=_begin,
        initargs=(study, max(1, cores() // jobs)),
    )
    try:
        with without_main():
            futures = [pool.submit(_run, task) for task in tasks]
        tell(0, f"{jobs} side by side")
        words, kept = f"{jobs} side by side", set[int]()
        for done, (task, future) in enumerate(zip(tasks, futures, strict=True)):
            while not wait([future], timeout=_LISTEN).done:
                tell(done, words)
                for number, each in enumerate(futures):
                    if number not in kept and each.done() and each.exception() is None:
                        keep(number, each.result())
                        kept.add(number)
            if done not in kept:
                keep(done, future.result())
                kept.add(done)
            result, words = future.result(), f"{task.recipe.name}, {task.fold.name}"
            tell(done + 1, words)
            yield result
    except BrokenProcessPool as error:
        raise TrainError(
            f"one of {jobs} training processes was killed, most likely because memory ran out; train with fewer: "
            f"--jobs {max(1, jobs // 2)}"
        ) from error
    except BaseException:
        for process in list((getattr(pool, "_processes", None) or {}).values()):  # what they do is of no use any more
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _told(tell: Callable[[int, str], None], done: int, head: str, words: str) -> None:
    tell(done, f"{head}, {words}")


def _begin(study: Study, threads: int) -> None:
    global _study
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process hears it, and ends this one
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    _study = study


def _run(task: FoldTask) -> FoldResult:
    assert _study is not None
    return run_fold(task, _study)
