"""Frozen encoders: a recipe and its weights → uint8 tiles in, embeddings out.

Letters: b tiles, V dihedral views, c channels, h and w the tile's sides in px, d the embedding's dimension.

This module imports torch and numpy alone; timm is imported when an encoder is built, the hub when weights are
fetched. Weight files are read without unpickling code (safetensors, or `torch.load(weights_only=True)`).
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nh2st_pipe.core.errors import EncoderError, listed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision

__all__ = ["Encoder", "dihedral", "load_encoder"]

# Classes that recipes may name in `arguments`; nothing else is looked up.
_CLASSES = {
    "SwiGLUPacked": ("timm.layers", "SwiGLUPacked"),
    "SiLU": ("torch.nn", "SiLU"),
    "GELU": ("torch.nn", "GELU"),
}


def dihedral(images_bchw: torch.Tensor, view: int) -> torch.Tensor:
    """Return view 0..7 of square images: a quarter turn counter-clockwise `view % 4` times, mirrored from 4 on.

    View 0 is the image itself. The eight are the symmetries of the square, under which tissue looks as likely.
    """
    turned = torch.rot90(images_bchw, view % 4, (2, 3))
    return turned.flip(3) if view >= 4 else turned


class Encoder(nn.Module):
    """A frozen encoder with its own preprocessing, on one device."""

    def __init__(self, recipe: EncoderRecipe, backbone: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.recipe = recipe
        self.device = device
        self.dtype: torch.dtype = getattr(torch, precision)
        # A CPU is fastest while the activations stay in its caches; a GPU wants all there is.
        self.images_at_once = 16 if device.type == "cpu" else 1 << 30
        self.backbone = backbone.eval().requires_grad_(False).to(device, self.dtype)
        if device.type != "mps":
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        # uint8 → (x / 255 − mean) / std in one multiplication and one addition.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.mean, recipe.std))
        self.gain = (1 / (255 * std)).to(device)
        self.bias = (-mean / std).to(device)

    @torch.inference_mode()
    def encode(self, tiles_bhwc: NDArray[np.uint8], views: int = 1) -> NDArray[np.float16]:
        """Return the embeddings b × V × d of uint8 RGB tiles b × h × w × 3, h = w = the recipe's `input_px`.

        Half the tiles at a time are tried where the device runs out of memory, down to a single one.
        """
        try:
            return self._encode(tiles_bhwc, views)
        except torch.OutOfMemoryError:
            if len(tiles_bhwc) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(tiles_bhwc) // 2
            return np.concatenate([self.encode(tiles_bhwc[:half], views), self.encode(tiles_bhwc[half:], views)])

    def _encode(self, tiles_bhwc: NDArray[np.uint8], views: int) -> NDArray[np.float16]:
        tiles = torch.from_numpy(np.require(tiles_bhwc, requirements=["C", "W"]))
        if self.device.type == "cuda":
            tiles = tiles.pin_memory()
        tiles = tiles.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = torch.addcmul(self.bias, tiles.float(), self.gain).to(self.dtype)
        b = len(images)
        images_vb = torch.cat([dihedral(images, view) for view in range(views)])
        if self.device.type != "mps":
            images_vb = images_vb.contiguous(memory_format=torch.channels_last)
        emb_vbd = torch.cat([self._pool(part) for part in images_vb.split(self.images_at_once)])
        if emb_vbd.shape != (views * b, self.recipe.dim):
            raise EncoderError(
                f"encoder {self.recipe.name} returned {tuple(emb_vbd.shape[1:])} values per tile and its recipe says "
                f"{self.recipe.dim}; check dim and pooling"
            )
        emb_bvd = emb_vbd.view(views, b, -1).transpose(0, 1)
        half = emb_bvd.to(torch.float16)
        if not torch.isfinite(half).all():
            raise EncoderError(
                f"encoder {self.recipe.name} returned values that are not finite in float16; "
                "try --precision float32, and check that the weights are the recipe's"
            )
        return half.cpu().numpy()

    def _pool(self, images: torch.Tensor) -> torch.Tensor:
        pooling = self.recipe.pooling
        if pooling == "model":
            return self._features(self.backbone(images)).float()
        out = self._features(self.backbone.forward_features(images))  # type: ignore[operator]
        if pooling == "flatten":
            return out.float().flatten(1)
        if out.ndim != 3:
            raise EncoderError(f"pooling '{pooling}' of {self.recipe.name} needs tokens; its architecture has none")
        prefix = int(getattr(self.backbone, "num_prefix_tokens", 1))
        cls, mean = out[:, 0].float(), out[:, prefix:].float().mean(1)
        return {"cls": cls, "mean": mean, "cls+mean": torch.cat((cls, mean), 1)}[pooling]

    @staticmethod
    def _features(out: Any) -> torch.Tensor:
        if not isinstance(out, torch.Tensor):
            raise EncoderError(f"the encoder returned {type(out).__name__} where a tensor is expected")
        return out


class FakeBackbone(nn.Module):
    """Colour statistics of a 4 × 4 grid of cells: means and spreads per channel, 96 values, no weights.

    A real if humble encoder: it makes the pipeline testable and a dry run quick.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return b × 96 from b × 3 × h × w."""
        cells = nn.functional.adaptive_avg_pool2d(images, 4)
        squares = nn.functional.adaptive_avg_pool2d(images.square(), 4)
        spread = (squares - cells.square()).clamp(min=0).sqrt()
        return torch.cat((cells, spread), 1).flatten(1)


def load_encoder(
    recipe: EncoderRecipe,
    weights: Path | None,
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
) -> Encoder:
    """Build the recipe's encoder with the weights in the file `weights` (None for an encoder without weights).

    Raises EncoderError where timm does not know the architecture or the weights do not fit it.
    """
    device = device or torch.device("cpu")
    if recipe.kind == "fake":
        return Encoder(recipe, FakeBackbone(), device, precision)
    import timm

    arguments = {key: _argument(value) for key, value in recipe.arguments.items()}
    try:
        backbone = timm.create_model(recipe.architecture, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(f"timm cannot build {recipe.architecture} for encoder {recipe.name}: {error}") from error
    if weights is None:
        raise EncoderError(f"encoder {recipe.name} has no weights; give their file with --weights")
    _load_weights(backbone, recipe, weights)
    return Encoder(recipe, backbone, device, precision)


def _argument(value: Any) -> Any:
    if isinstance(value, str) and value in _CLASSES:
        module, name = _CLASSES[value]
        return getattr(importlib.import_module(module), name)
    return value


def _load_weights(backbone: nn.Module, recipe: EncoderRecipe, path: Path) -> None:
    """Load `path` into `backbone`; every tensor must be there with its shape, and no other."""
    state = {}
    for name, tensor in _read_tensors(path).items():
        for prefix in recipe.strip_prefixes:
            name = name.removeprefix(prefix)
        if not name.startswith(recipe.drop):
            state[name] = tensor
    own = backbone.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [f"missing: {listed(missing, 3)}"] if missing else []
    faults += [f"unknown: {listed(unknown, 3)}"] if unknown else []
    faults += [f"of another shape: {listed(shapes, 3)}"] if shapes else []
    if faults:
        raise EncoderError(
            f"{path} does not fit encoder {recipe.name} ({recipe.architecture}); tensors {'; '.join(faults)}. "
            "Is it the file of another encoder?"
        )
    backbone.load_state_dict(state, strict=False)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} holds more than tensors, and code in a pickle is never run here; convert it to .safetensors"
        ) from error
    except Exception as error:  # safetensors and torch raise many kinds for a broken file
        raise EncoderError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    while isinstance(loaded, dict):
        nested = next((loaded[key] for key in ("state_dict", "model", "teacher") if key in loaded), None)
        if not isinstance(nested, dict):
            break
        loaded = nested
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise EncoderError(f"{path} does not hold a state dict (names and tensors)")
    return loaded
