"""Encoders of the Hugging Face transformers library (extra `[transformers]`): those it knows, and those with own code.

The known ones are built from the recipe, and their weights read from a file as all others are; transformers renames the
tensors of older files. Code that a repository brings along is run only where that was allowed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nh2st_pipe.core.errors import EncoderError, listed, reason_of
from nh2st_pipe.core.quiet import quiet_warnings

if TYPE_CHECKING:
    from nh2st_pipe.recipes.encoder import EncoderRecipe

__all__ = ["Tokens", "build_known", "load_known", "load_remote"]

_CLASSES = {
    "vit": ("ViTConfig", "ViTModel", {"add_pooling_layer": False}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {}),
}
_FINDINGS = {"missing": "missing_keys", "unknown": "unexpected_keys", "of another shape": "mismatched_keys"}
_NOT_USED = ("mask_token",)  # tensors for training alone, which some files leave out


class Tokens(nn.Module):
    """A model of transformers, with the names that timm's have."""

    def __init__(self, model: nn.Module, method: str = "forward") -> None:
        super().__init__()
        self.model = model
        self.num_prefix_tokens = 1 + int(getattr(getattr(model, "config", None), "num_register_tokens", 0) or 0)
        self._method = method

    def forward_features(self, images: torch.Tensor) -> Any:
        """Return all tokens, b × t × d, behind the last normalisation."""
        return self.model(pixel_values=images).last_hidden_state

    def forward(self, images: torch.Tensor) -> Any:
        """Return the model's own embedding, b × d: its pooled output, or what its method for images gives."""
        if self._method == "forward":
            return getattr(self.model(pixel_values=images), "pooler_output", None)
        return self.model(images) if self._method == "return_conch" else getattr(self.model, self._method)(images)


def build_known(recipe: EncoderRecipe) -> Tokens:
    """Return an architecture that transformers knows, with random weights."""
    config, cls, options = _known(recipe)
    with _quiet():
        return Tokens(cls(config, **options))


def load_known(recipe: EncoderRecipe, state: Mapping[str, torch.Tensor]) -> tuple[Tokens | None, list[str]]:
    """Build it with tensors, whatever version of transformers named them; return in words what does not fit.

    There is no model where a tensor has another shape.
    """
    config, cls, options = _known(recipe)
    try:
        with _quiet():
            model, found = cls.from_pretrained(
                None, config=config, state_dict=dict(state), output_loading_info=True, **options
            )
    except (RuntimeError, ValueError) as error:
        return None, [reason_of(error)]
    named = {
        what: sorted(str(name) for name in found[key] if not str(name).endswith(_NOT_USED))
        for what, key in _FINDINGS.items()
    }
    return Tokens(model), [f"{what}: {listed(names, 3)}" for what, names in named.items() if names]


def load_remote(recipe: EncoderRecipe, weights: Path) -> Tokens:
    """Load a repository's folder, in which `weights` lies, with the code in it. The caller has made sure it may run."""
    folder = weights.parent
    if not (folder / "config.json").is_file():
        raise EncoderError(
            f"encoder {recipe.name} is code and weights in one folder: {weights} has no config.json beside it; fetch "
            f"{recipe.repo} whole"
        )
    library = _library(recipe)
    try:
        with _quiet():
            model: Any = library.AutoModel.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
            if recipe.method == "return_conch":
                model = model.return_conch()[0]
    except Exception as error:  # it is somebody's code
        raise EncoderError(f"the code of {recipe.repo} failed: {type(error).__name__}: {error}") from error
    return Tokens(model, recipe.method)


def _known(recipe: EncoderRecipe) -> tuple[Any, Any, dict[str, Any]]:
    library = _library(recipe)
    config, cls, options = _CLASSES[recipe.architecture]
    try:
        return getattr(library, config)(**recipe.arguments), getattr(library, cls), options
    except (TypeError, ValueError) as error:
        raise EncoderError(f"transformers cannot build {recipe.architecture} for {recipe.name}: {error}") from error


def _library(recipe: EncoderRecipe) -> Any:
    try:
        with quiet_warnings():
            return importlib.import_module("transformers")
    except ImportError as error:
        raise EncoderError(
            f"encoder {recipe.name} needs the library transformers: pip install 'nh2st-pipe[transformers]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out progress bars and reports: what matters of them is raised here."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_warnings():
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
