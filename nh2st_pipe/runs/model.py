"""The one way to a trained head: a run, its model/, or a Hugging Face repository."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.registry import head_class

__all__ = ["load_model"]


def load_model(path: str | Path) -> HeadModel:
    """Load a saved head: the folder of a run, its `model/`, or a Hugging Face repository.

    Raises RunError where there is no model, or one of a kind that this version does not know.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    config_file = folder / "config.json"
    if not config_file.is_file():
        if folder.exists():
            raise RunError(f"{path} holds no trained model (no model/config.json); was the training finished?")
        config_file = _hub_config(str(path))
    try:
        kind = json.loads(config_file.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError) as error:
        raise RunError(f"{config_file} is damaged: {error}") from error
    try:
        kind_of_head = head_class(kind)
    except RunError as error:
        raise RunError(f"{config_file} describes {error}") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin announces itself on stdout
            model = kind_of_head.from_pretrained(str(folder) if folder.exists() else str(path))
    except Exception as error:  # a truncated weight file, tensors that do not fit
        raise RunError(f"the model at {path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return model.eval()


def _hub_config(repo: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    if repo.count("/") != 1:
        raise RunError(f"there is no run at {repo}")
    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise RunError(
            f"there is no run folder at {repo}, and as a Hugging Face repository it cannot be had: "
            f"{str(error).splitlines()[0]}"
        ) from error
