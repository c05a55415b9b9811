"""Frozen encoders: a recipe and its weights → uint8 tiles in, embeddings out.

Letters: b tiles, V dihedral views, c channels, h and w the tile's sides in px, d the embedding's dimension.

This module imports torch and numpy alone; timm is imported when an encoder is built, the hub when weights are
fetched. Weight files are read without unpickling code (safetensors, or `torch.load(weights_only=True)`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from nh2st_pipe.core.errors import EncoderError
from nh2st_pipe.encoders.transfer import Arriving, transfer_of
from nh2st_pipe.encoders.views import dihedral

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nh2st_pipe.core.shared import SharedArray
    from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision

__all__ = ["Coming", "Encoder", "TileEncoder", "Underway"]


class Coming(Protocol):
    """Embeddings that are being made."""

    def result(self) -> NDArray[np.float16]:
        """Wait for the embeddings b × V × d. Raises EncoderError where a value is not finite in float16."""


class TileEncoder(Protocol):
    """What stage one needs of an encoder: it is on one device, or on several that share its batches."""

    recipe: EncoderRecipe
    batches_ahead: int
    """Batches that may still be at work when the next is begun."""

    @property
    def kind(self) -> str:
        """What kind of device it is on: cpu, cuda or mps."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that it is on."""

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array of `shape` to read tiles into, from which the way to the device is shortest."""

    def pinned(self, memory: SharedArray) -> AbstractContextManager[None]:
        """Make the way to the device short from memory that others have made, while entered."""

    def busy(self) -> list[float]:
        """Return how many processors (CPU ÷ wall) each process of its own kept at work."""

    def fits(self, views: int) -> int:
        """Return how many tiles of `views` views to encode at once."""

    def start(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> Coming:
        """Begin with what `encode` does. `tiles_bhwc` stay as they are until its result is there."""

    def encode(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> NDArray[np.float16]:
        """Return the embeddings b × V × d of uint8 RGB tiles b × h × w × 3, h = w = the recipe's `input_px`.

        The first `views` dihedral views, or `view` alone (V is 1 then).
        """


class Underway:
    """Embeddings that the device is at work on, or that are on their way back from it."""

    def __init__(self, name: str, parts: list[tuple[Arriving, Arriving]]) -> None:
        self._name, self._parts = name, parts

    def result(self) -> NDArray[np.float16]:
        """Wait for the embeddings b × V × d. Raises EncoderError where a value is not finite in float16."""
        done: list[NDArray[np.float16]] = []
        for values, finite in self._parts:
            done.append(values.numpy())
            if not finite.numpy():
                raise EncoderError(
                    f"encoder {self._name} returned values that are not finite in float16; "
                    "try --precision float32, and check that the weights are the recipe's"
                )
        return done[0] if len(done) == 1 else np.concatenate(done)


class Encoder(nn.Module):
    """A frozen encoder with its own preprocessing, on one device.

    `compiled` has torch compile the backbone, which takes a minute or two at the first batch.
    """

    def __init__(
        self,
        recipe: EncoderRecipe,
        backbone: nn.Module,
        device: torch.device,
        precision: Precision,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.device = device
        self.dtype: torch.dtype = getattr(torch, precision)
        self.autocast = recipe.autocast and precision != "float32"
        """Whether the weights stay in float32 and torch chooses what is computed in half precision."""
        # A CPU is fastest while the activations stay in its caches; a GPU wants many, in a bounded memory.
        self.images_at_once = 16 if device.type == "cpu" else 512
        self.batches_ahead = 1 if device.type == "cuda" else 0
        """Batches that may still be at work when the next is begun."""
        self.batch: int | None = None
        """Tiles that fit the device, where that has been tried (see `encoders.batches`)."""
        self.tiles_at_once = 1 << 30
        """Of `encode`: halved where the device runs out of memory."""
        stored = torch.float32 if self.autocast else self.dtype
        self.backbone = backbone.eval().requires_grad_(False).to(device, stored)
        if device.type != "mps":
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        # uint8 → (x / 255 − mean) / std in one multiplication and one addition.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.mean, recipe.std))
        self.gain = (1 / (255 * std)).to(device)
        self.bias = (-mean / std).to(device)
        self._transfer = transfer_of(device)
        self._turn = threading.Lock()
        self._embed = torch.compile(self._pool, dynamic=True) if compiled else self._pool

    def blank(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array of `shape` to read tiles into, from which the way to the device is shortest."""
        return self._transfer.blank(shape)

    @property
    def kind(self) -> str:
        """See TileEncoder."""
        return self.device.type

    @property
    def devices(self) -> tuple[str, ...]:
        """See TileEncoder."""
        return (str(self.device),)

    def pinned(self, memory: SharedArray) -> AbstractContextManager[None]:
        """See TileEncoder."""
        return self._transfer.pinned(memory.array)

    def busy(self) -> list[float]:
        """See TileEncoder."""
        return []

    def fits(self, views: int) -> int:
        """See TileEncoder."""
        from nh2st_pipe.encoders.batches import batch_that_fits

        return batch_that_fits(self, views)

    def encode(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> NDArray[np.float16]:
        """Return the embeddings b × V × d of uint8 RGB tiles b × h × w × 3, h = w = the recipe's `input_px`.

        The first `views` dihedral views, or `view` alone (V is 1 then).
        """
        return self.start(tiles_bhwc, views, view).result()

    @torch.inference_mode()
    def start(self, tiles_bhwc: NDArray[np.uint8], views: int = 1, view: int | None = None) -> Underway:
        """Begin with what `encode` does. On a GPU this returns while it is still at work, and the next batch may be
        begun: it goes up, and the one before comes down, while one is encoded.

        Where the device runs out of memory, half of the tiles at a time are tried, from then on too. Raises
        EncoderError where a single one is too much. Of several threads, one has its turn at a time.
        """
        with self._turn:
            return self._start(tiles_bhwc, views, view)

    def _start(self, tiles_bhwc: NDArray[np.uint8], views: int, view: int | None) -> Underway:
        wanted = range(views) if view is None else (view,)
        done: list[tuple[Arriving, Arriving]] = []
        at = 0
        while at < len(tiles_bhwc) or not done:
            part = tiles_bhwc[at : at + self.tiles_at_once]
            encoded = self._tried(part, wanted)
            if encoded is not None:
                done.append(encoded)
                at += len(part)
                continue
            # Here the failed attempt's tensors are gone: they live as long as its exception.
            if len(part) <= 1:
                raise EncoderError(
                    f"{self.device} runs out of memory with encoder {self.recipe.name} and a single tile"
                    + (f" of {len(wanted)} views" if len(wanted) > 1 else "")
                    + "; take a smaller encoder, or free the device"
                )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.tiles_at_once = len(part) // 2
        return Underway(self.recipe.name, done)

    def _tried(self, tiles_bhwc: NDArray[np.uint8], views: Sequence[int]) -> tuple[Arriving, Arriving] | None:
        """Return the embeddings, and whether they are finite; None where the device runs out of memory."""
        try:
            return self._encode(tiles_bhwc, views)
        except torch.OutOfMemoryError:
            return None

    def _encode(self, tiles_bhwc: NDArray[np.uint8], views: Sequence[int]) -> tuple[Arriving, Arriving]:
        tiles = self._transfer.up(np.require(tiles_bhwc, requirements=["C", "W"])).permute(0, 3, 1, 2)
        # Views are made of as many tiles as go through the encoder at once, and not of the whole batch.
        step = max(1, self.images_at_once // len(views))
        parts = [self._views(part, views) for part in tiles.split(step)]
        half = torch.cat(parts)
        return self._transfer.down(half), self._transfer.down(torch.isfinite(half).all())

    def _views(self, tiles_bchw: torch.Tensor, views: Sequence[int]) -> torch.Tensor:
        """Return the embeddings b × V × d, float16, of uint8 tiles on the device."""
        images = torch.addcmul(self.bias, tiles_bchw.float(), self.gain)
        if not self.autocast:
            images = images.to(self.dtype)
        b = len(images)
        images_vb = torch.cat([dihedral(images, view) for view in views])
        if self.device.type != "mps":
            images_vb = images_vb.contiguous(memory_format=torch.channels_last)
        with self._arithmetic():
            emb_vbd = torch.cat([self._embed(part) for part in images_vb.split(self.images_at_once)])
        if emb_vbd.shape != (len(views) * b, self.recipe.dim):
            raise EncoderError(
                f"encoder {self.recipe.name} returned {tuple(emb_vbd.shape[1:])} values per tile and its recipe says "
                f"{self.recipe.dim}; check dim and pooling"
            )
        return emb_vbd.view(len(views), b, -1).transpose(0, 1).to(torch.float16)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext()

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
