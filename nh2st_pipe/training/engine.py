"""Where heads are trained on folds: in this process and others beside it, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nh2st_pipe.core.errors import UsageError

if TYPE_CHECKING:
    from nh2st_pipe.training.on_ray import TrainingOnRay

__all__ = ["training_engine"]


@contextmanager
def training_engine(
    engine: str | TrainingOnRay, device: str, address: str | None, actors: int | None, jobs: int | None
) -> Iterator[TrainingOnRay | None]:
    """Give the cluster that folds are done on; None for this machine. Raises UsageError where it cannot be had."""
    if engine not in ("local", "ray") and isinstance(engine, str):
        raise UsageError(f"--engine takes local or ray, not {engine}")
    if engine == "local":
        if address is not None or actors is not None:
            raise UsageError("--address and --actors are of --engine ray")
        yield None
        return
    if jobs is not None and jobs != 1:
        raise UsageError("--jobs is of --engine local; on Ray --actors says how many train side by side")
    if not isinstance(engine, str):
        yield engine
        return
    from nh2st_pipe.training.on_ray import training_on_ray

    with training_on_ray(device, address, actors) as cluster:
        yield cluster
