"""Parts of architectures that timm lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["ConvStem"]


class ConvStem(nn.Module):
    """CTransPath's way into a Swin transformer: convolutions in place of patches of 4 × 4 px.

    Wang et al., Medical Image Analysis 2022, after Xiao et al., "Early Convolutions Help Transformers See Better",
    NeurIPS 2021. From b × 3 × h × w to b × h/4 × w/4 × d. Takes the arguments that timm gives a patch embedding.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        first, second = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            *_halving(in_chans, first), *_halving(first, second), nn.Conv2d(second, embed_dim, kernel_size=1)
        )
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the map, channels last."""
        out: torch.Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return out


def _halving(channels: int, wider: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, wider, kernel_size=3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(wider), nn.ReLU(inplace=True)
