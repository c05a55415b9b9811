"""The one way to a trained head: a run, its model/, or a Hugging Face repository."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from nh2st_pipe.core.errors import HubError, RecipeError, RunError, fault_of, nearest, reason_of
from nh2st_pipe.evaluation.reference import REFERENCE, Reference
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.carry import CARRY
from nh2st_pipe.heads.registry import head_class
from nh2st_pipe.recipes.plugins import by_reference
from nh2st_pipe.runs.checksums import SUMS, check_files, write_sums

__all__ = ["HUB", "load_model", "load_reference", "model_files", "model_folder", "save_model"]


HUB = "hf-hub:"


def load_model(where: str | Path, files: Path | None = None) -> HeadModel:
    """Load a saved head: the folder of a run, its `model/`, or "hf-hub:owner/name" (optionally "@revision").

    `files` is the folder of its files, where `model_files` has given that already. Only the last goes to the network.
    Its files are held against their SHA-256 where the model has a list of them.
    Raises RunError where there is no model, it has been changed, or it is of a kind that this version does not know.
    """
    folder = model_files(where) if files is None else files
    if not (folder / "model.safetensors").is_file():
        raise RunError(f"{folder} holds no model.safetensors; weights in other forms are not loaded")
    config_file = folder / "config.json"
    beside = [CARRY] if (folder / CARRY).is_file() else []
    check_files(folder, ("config.json", "model.safetensors", *beside))  # its card may be edited
    with fault_of(RunError, f"{config_file} is damaged"):
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kind, made_by = config.get("kind"), (config.get("about") or {}).get("plug_in")
    if str(where).startswith(HUB) and by_reference(str(kind)):
        raise RunError(f"{where} names its code by {kind}: from a hub, only heads that a package registers are loaded")
    try:
        kind_of_head = head_class(kind)
    except (RunError, RecipeError) as error:
        needs = f"; it was trained with {made_by}: install that, or lay it where it was" if made_by else ""
        raise RunError(f"{config_file} describes {error}{needs}") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin announces itself on stdout
            model = kind_of_head.from_pretrained(str(folder))
    except Exception as error:  # a truncated weight file, tensors that do not fit
        raise RunError(f"the model at {where} cannot be loaded: {reason_of(error)}") from error
    return model.eval()


def load_reference(where: str | Path) -> Reference | None:
    """Load the training tiles that are kept beside a head; None where it has none, as those of earlier versions.

    Raises RunError where they have been changed or cannot be read.
    """
    folder = model_files(where)
    if (folder / REFERENCE).is_file():
        check_files(folder, (REFERENCE,))
    return Reference.load(folder)


def model_files(where: str | Path) -> Path:
    """Return the folder of a head's files, fetched where they are on the hub; see `load_model`."""
    text = str(where)
    return _from_hub(text) if text.startswith(HUB) else model_folder(where)


def model_folder(where: str | Path) -> Path:
    """Return the folder of a head's files, given a run or that folder. Raises RunError where there is none."""
    folder = Path(where)
    for place in (folder / "model", folder):
        if (place / "config.json").is_file():
            return place
    if folder.exists():
        raise RunError(f"{where} holds no trained model (no model/config.json); was the training finished?")
    near = nearest(folder.name, [path.name for path in folder.parent.glob("*")] if folder.parent.is_dir() else [])
    raise RunError(f"there is no run at {where}{near} (a model on the Hugging Face hub is {HUB}owner/name)")


def save_model(model: HeadModel, folder: Path, card: str, reference: Reference | None = None) -> None:
    """Write a head as config.json, model.safetensors, its model `card` and its `reference`, with a list of hashes."""
    model.cpu().save_pretrained(folder)
    if reference is not None:
        reference.save(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")  # in place of the hub's empty one
    write_sums(folder)


def _from_hub(text: str) -> Path:
    from nh2st_pipe.core.hub import fetch_folder

    repo, _, revision = text.removeprefix(HUB).partition("@")
    if repo.count("/") != 1:
        raise RunError(f"{text} is no model on the hub; {HUB}owner/name is expected")
    try:
        found = fetch_folder(repo, ["config.json", "model.safetensors", REFERENCE, CARRY, SUMS], revision or None)
    except HubError as error:
        raise RunError(f"{text} cannot be had: {error}") from error
    if not (found / "config.json").is_file():
        raise RunError(f"{text} holds no trained head (no config.json)")
    return found
