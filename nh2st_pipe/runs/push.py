"""A trained head to the Hugging Face hub: one commit with its card, its weights and their hashes.

Names of slides and patients stay here: their fingerprints go along, by which a prediction tells that a slide was
trained on. Embeddings of training tiles are made from patients' slides, and go along where that is asked for alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nh2st_pipe.core.errors import RunError, UsageError, fault_of
from nh2st_pipe.core.hub import Pushed, has_file, push_files
from nh2st_pipe.evaluation.reference import REFERENCE
from nh2st_pipe.heads.carry import CARRY
from nh2st_pipe.recipes.plugins import by_reference
from nh2st_pipe.runs.about import About, hidden
from nh2st_pipe.runs.card import model_card
from nh2st_pipe.runs.checksums import SUMS, check_files, sha256
from nh2st_pipe.runs.folder import find_run
from nh2st_pipe.runs.model import HUB, load_model, model_folder

__all__ = ["PushSummary", "push"]

_CARD = "README.md"


@dataclass
class PushSummary:
    """What was pushed."""

    model: str
    """As `predict --model` takes it."""
    url: str
    files: list[str]
    notices: list[str] = field(default_factory=list)


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    with_reference: bool = False,
    dataset: str | None = None,
    task: str = "default",
) -> PushSummary:
    """Push the head of a run (or a `model/` folder) to the repository `repo`, "owner/name", in one commit.

    The repository is made where there is none, `private` if asked for; with `create_pr` the commit is proposed to
    somebody else's. A card that is there stays. `dataset` and `task` are those of a benchmark on the hub, to whose
    leaderboard the PCC on what was held out is told.

    Raises UsageError where `repo` is no name of a repository, RunError where there is no model or it has changed, and
    where its weights hold embeddings of training tiles without `with_reference`; HubError with what the hub says.
    """
    name = repo.removeprefix(HUB)
    if name.count("/") != 1 or "@" in name or not all(name.split("/")):
        raise UsageError(f"{repo} is no repository of the hub; owner/name is expected")
    folder, found = model_folder(run), find_run(Path(run))
    head = load_model(folder)
    about = About.of(head.about, folder)
    tiles = head.training_tiles()
    if tiles and not with_reference:
        raise RunError(
            f"the weights of {about.recipe} hold embeddings of {tiles:,} training tiles, which are made from patients' "
            "slides: --with-reference pushes them, if that may be; heads without are mlp, ridge and ridge-context"
        )
    if by_reference(str(getattr(head, "kind", ""))):
        raise RunError(
            f"{folder} is a head that a file defines, and from the hub only those are loaded that a package registers "
            "(entry point nh2st_pipe.heads)"
        )
    notices = list[str]()
    files: dict[str, bytes | Path] = {"config.json": _config(folder), "model.safetensors": folder / "model.safetensors"}
    if (folder / CARRY).is_file():
        files[CARRY] = folder / CARRY
    if with_reference and (folder / REFERENCE).is_file():
        check_files(folder, (REFERENCE,))
        files[REFERENCE] = folder / REFERENCE
    metrics = None if found is None else found.metrics
    if dataset is not None:
        files[".eval_results/nh2st-pipe.yaml"] = _result(metrics, dataset, task, run)
    if has_file(name, _CARD):
        notices.append(f"{name} has a card, which stays; what is new is in it alone if you write it there")
    else:
        files[_CARD] = _card(folder, metrics, about, name, dataset)
    listed = [f"{_digest(files[each])}  {each}\n" for each in sorted(files) if each != _CARD]
    files[SUMS] = "".join(listed).encode()
    made = push_files(name, files, f"{about.recipe} by nh2st-pipe {about.version}", private, create_pr)
    return PushSummary(_as_model(name, made), made.url, sorted(files), notices)


def _as_model(name: str, made: Pushed) -> str:
    return f"{HUB}{name}@{made.revision}"


def _config(folder: Path) -> bytes:
    """Return config.json without names of slides and patients."""
    path = folder / "config.json"
    with fault_of(RunError, f"{path} is damaged"):
        config = json.loads(path.read_text(encoding="utf-8"))
        about = config["about"]
        for slide in about.get("trained_on", ()):
            slide["patient"], slide["slide_id"] = hidden(slide["patient"]), hidden(slide["slide_id"])
        about["likeness"] = {hidden(name): value for name, value in about.get("likeness", {}).items()}
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def _card(folder: Path, metrics: Mapping[str, Any] | None, about: About, name: str, dataset: str | None) -> bytes:
    """Return the card: the one beside the head where a person has changed it, else one of what is known."""
    path = folder / _CARD
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    if metrics is None or _changed(folder):
        text = written
    else:
        names = {slide.slide_id for slide in about.trained_on} | {slide.patient for slide in about.trained_on}
        kept = [note for note in metrics["notes"] if not any(each and each in note for each in names)]
        text = model_card({**metrics, "notes": kept}, about, dataset)
    if not text:
        raise RunError(f"{folder} has no card ({_CARD}): push the run, which has the figures for one")
    return text.replace("OWNER/NAME", name).encode()


def _changed(folder: Path) -> bool:
    """Whether a card is not as it was written."""
    try:
        check_files(folder, (_CARD,))
    except RunError:
        return True
    return False


def _result(metrics: Mapping[str, Any] | None, dataset: str, task: str, run: str | Path) -> bytes:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    summary = None if metrics is None else metrics["summary"]
    if metrics is None or summary is None:
        raise RunError(f"{run} was judged on nothing: there is no result to tell a leaderboard")
    notes = f"PCC, mean over genes; {len(metrics['folds'])} folds by {metrics['folds_by']}, {metrics['protocol']}"
    entry = EvalResultEntry(dataset_id=dataset, task_id=task, value=round(float(summary["pcc"]), 4), notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()


def _digest(content: bytes | Path) -> str:
    return sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
