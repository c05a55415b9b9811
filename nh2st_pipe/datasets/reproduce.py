"""From a dataset's files as published to a table: what is published, and what is reached here.

Every step is kept and gone on with: the manifest, the embeddings, each run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.data.folds import Listed, checked_folds
from nh2st_pipe.datasets import import_dataset
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.recipes.dataset import DatasetRecipe, load_dataset_recipe
from nh2st_pipe.runs.folder import read_metrics
from nh2st_pipe.tiles.manifest import read_manifest
from nh2st_pipe.training.run import resolve, train

__all__ = ["Reproduced", "reproduce"]

_HEADS = ("nh2st", "nh2st-context")
_PROTOCOLS = ("paper", "nested")
_FIGURES = ("mse", "mae", "pcc", "pcc_top50_train", "pcc_top50", "pcc_top50_null")


@dataclass
class Reproduced:
    """What came of it."""

    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Published figures first, then those of the runs: `head`, how it was judged, and its figures."""
    failed: dict[str, str] = field(default_factory=dict)
    """Sections left out, each with its cause."""
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "out": str(self.out)}


def reproduce(
    name: str | Path | DatasetRecipe,
    data: str | Path,
    *,
    out: str | Path | None = None,
    encoder: str | Path | None = None,
    weights: str | Path | None = None,
    views: int = 8,
    folds: str | None = None,
    settings: tuple[str, ...] = (),
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Reproduced:
    """Import, embed and train on the dataset `name` (see manifests/), whose files are in the folder `data`.

    Each head is trained twice: as the paper judged (`paper`: panel from all slides, best epoch on the test fold), and
    as it should be (`nested`, patients on one side alone). `folds` takes the place of the dataset's (which, by patient,
    become by slide or by block where what is there is of one patient, or one slide); `settings` are
    changes to the heads' recipes. All of it is kept in `out` (reproduce/<name>), and a call that was cut short goes on.

    Raises RunError where a run in `out` was made in another way; TrainError, before anything is embedded, where the
    slides cannot be folded so.
    """
    dataset = name if isinstance(name, DatasetRecipe) else load_dataset_recipe(name)
    progress = progress or Progress()
    done = Reproduced(Path(out) if out is not None else Path("reproduce") / dataset.name)
    manifest, imported = done.out / "manifest.csv", done.out / "imported.json"
    if not manifest.is_file():
        made = import_dataset(dataset.importer, Path(data), manifest, progress.say, where=dataset.where)
        notes = [f"{slide_id}: {words}" for slide_id, doubts in made.doubts.items() for words in doubts]
        with written_whole(imported) as part:
            part.write_text(json.dumps({"failed": made.failed, "notes": notes}, indent=1) + "\n", "utf-8")
    if imported.is_file():
        said = json.loads(imported.read_text("utf-8"))
        done.failed |= said["failed"]
        done.notes += said["notes"]
        if said["failed"]:
            done.notes.append(f"delete {manifest} to import again what was left out, where its files are right by now")
    slides = [Listed(row.slide_id, row.patient, row.extra) for row in read_manifest(manifest)]
    by_protocol: dict[str, str] = {}
    for protocol in _PROTOCOLS:  # what cannot be folded is told before anything is embedded
        usual = (dataset.honest_folds if protocol == "nested" else None) or dataset.folds
        by_protocol[protocol], why = checked_folds(slides, folds, usual, dataset.seed)
        if why and why not in done.notes:
            progress.say(why)
            done.notes.append(why)
    embedded = embed(
        manifest,
        encoder=encoder,
        weights=weights,
        store=done.out / "store.zarr",
        views=views,
        tile_px=dataset.tile_px,
        device=device,
        progress=progress,
    )
    done.failed |= embedded.failed
    for each in dataset.published:
        row = {"head": f"{each.method}, {each.source}", "judged": "as published", each.figure: each.value}
        done.rows.append(row)
    for head in _HEADS:
        for protocol in _PROTOCOLS:
            by = by_protocol[protocol]
            changes = [f"protocol={protocol}", *(["baselines=[]"] if protocol == "paper" else []), *settings]
            metrics = _run(done, dataset, head, protocol, by, changes, device, jobs, progress)
            judged = f"{protocol}, folds by {by}"
            done.rows.append({"head": head, "judged": judged, **_figures(metrics)})
            if protocol == "nested" and head == _HEADS[-1]:
                for baseline, values in metrics["baselines"].items():
                    done.rows.append({"head": baseline, "judged": judged, **_figures(values)})
            done.notes += [note for note in metrics["notes"] if note not in done.notes]
    return done


def _run(
    done: Reproduced,
    dataset: DatasetRecipe,
    head: str,
    protocol: str,
    folds: str,
    settings: list[str],
    device: str,
    jobs: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return the metrics of a run: that which is there, where it was made in the same way, or a new one."""
    path = done.out / "runs" / f"{head}-{protocol}"
    if (path / "metrics.json").is_file():
        wanted = resolve(head, settings, dataset.genes, folds, dataset.seed).model_dump(mode="json")
        there = yaml.safe_load((path / "recipe.yaml").read_text("utf-8"))
        other = _other(there, wanted)
        if other:
            raise RunError(f"{path} was made with other {', '.join(other)}; give another --out, or delete it")
        progress.say(f"{path}: kept")
        return read_metrics(path)
    run = train(
        done.out / "store.zarr",
        recipe=head,
        genes=dataset.genes,
        folds=folds,
        out=path,
        settings=settings,
        seed=dataset.seed,
        device=device,
        jobs=jobs,
        progress=progress,
    )
    return run.metrics


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    summary = metrics["summary"] or {}
    return {key: summary.get(key) for key in _FIGURES}


def _other(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(key for key in wanted if there.get(key) != wanted[key])
