"""A run made again from what it keeps of itself, and held against the first bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.recipes.train import TrainRecipe, as_kept
from nh2st_pipe.recipes.values import validate
from nh2st_pipe.runs.checksums import sha256
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.training.run import Run, train

__all__ = ["Repeated", "repeat"]

_MODEL = "model/model.safetensors"


@dataclass(frozen=True)
class Repeated:
    """What came of it."""

    run: Run
    of: Path
    same: list[str]
    """Files whose numbers are the same bit for bit: the model, and each slide's prediction out of fold, with all its
    layers and what it says of spots and genes."""
    other: list[str]
    """Those that differ, or are in one run alone."""
    reasons: list[str]
    """What is not as it was then: versions, device, slides."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        about = {"of": str(self.of), "same": self.same, "other": self.other, "reasons": self.reasons}
        return {"path": str(self.run.path), "repeat": about, **self.run.metrics}


def repeat(
    run: str | Path,
    embeddings: str | Path | None = None,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Repeated:
    """Train again what is in the run folder `run`: its recipe with its seed, genes and folds, on its store.

    What is left None is as it was then: `embeddings` the store's path, `device`, and `jobs`, on which sums depend in
    their last bits. `out` is <run>-repeat. On a CPU the same versions give the same numbers bit for bit.

    Raises RunError where `run` is none, and what `train` raises.
    """
    of = Path(run)
    then = read_metrics(of)
    try:
        kept = yaml.safe_load((of / "recipe.yaml").read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{of}/recipe.yaml cannot be read: {reason_of(error)}") from error
    if isinstance(kept, dict) and "targets" in kept:
        kept = {**kept, "targets": as_kept(kept["targets"])}
    recipe = validate(TrainRecipe, kept, f"{of}/recipe.yaml")
    again = train(
        embeddings if embeddings is not None else then["store"]["path"],
        recipe=recipe,
        out=out if out is not None else of.with_name(f"{of.name}-repeat"),
        device=device if device is not None else then["software"]["device"],
        jobs=jobs if jobs is not None else then.get("jobs", 1),
        progress=progress,
    )
    same, other = list[str](), list[str]()
    for name in sorted({_MODEL, *_predictions(of), *_predictions(again.path)}):
        (same if _alike(of / name, again.path / name) else other).append(name)
    return Repeated(again, of, same, other, _reasons(then, again.metrics) if other else [])


def _predictions(run: Path) -> list[str]:
    return [f"predictions/{path.name}" for path in (run / "predictions").glob("*.h5ad")]


def _alike(one: Path, two: Path) -> bool:
    """Whether two files hold the same numbers, to the bit."""
    if not (one.is_file() and two.is_file()):
        return False
    if one.suffix != ".h5ad":
        return sha256(one) == sha256(two)
    import anndata

    with quiet_warnings():
        first, second = anndata.read_h5ad(one), anndata.read_h5ad(two)
    if not (first.obs.equals(second.obs) and first.var.equals(second.var) and {*first.layers} == {*second.layers}):
        return False
    pairs = [(first.X, second.X), *((first.layers[name], second.layers[name]) for name in first.layers)]
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs)


def _reasons(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say what differs between two runs of one recipe."""
    found = [
        f"{name} was {then['software'].get(name)}, and is {value}"
        for name, value in now["software"].items()
        if then["software"].get(name) != value
    ]
    found += [
        f"{what} were {then.get(key)}, and are {now.get(key)}"
        for key, what in (("jobs", "jobs"), ("n_slides", "slides"), ("n_spots", "spots"))
        if then.get(key) != now.get(key)
    ]
    if then["store"]["weights_sha256"] != now["store"]["weights_sha256"]:
        found.append("the embeddings are of other weights")
    return found or ["versions, device and slides are the same: the numbers in the store may be others"]
