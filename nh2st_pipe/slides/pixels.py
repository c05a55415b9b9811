"""What the samples of a picture mean, and how they become red, green and blue of eight bits: one rule for every reader.

Transparent ground is white. Samples of more than eight bits are read as the upper eight of those that are used: as many
as the file says, or as the largest value found takes, for a camera's 12 bits are kept in words of 16. Values with a
fraction are refused, as nothing says what white is.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import SlideError

__all__ = ["Samples", "check_dtype", "icc_notices", "to_rgb", "with_bits"]

_NOMINAL = (8, 10, 12, 14, 16)  # bits that cameras and scanners have


@dataclass(frozen=True)
class Samples:
    """What the samples of a px are, in the order in which they lie."""

    colours: Literal["rgb", "grey", "cmyk"] = "rgb"
    alpha: Literal["none", "straight", "premultiplied"] = "none"
    """Whether opacity follows the colours, and whether these have been multiplied by it."""
    inverted: bool = False
    """Whether zero is white."""
    bits: int = 8
    """Used of a sample; white is 2 ** bits - 1."""

    @property
    def count(self) -> int:
        """Samples of a px that are looked at; more may follow."""
        return {"rgb": 3, "grey": 1, "cmyk": 4}[self.colours] + (self.alpha != "none")


def to_rgb(values: NDArray[Any], of: Samples) -> NDArray[np.uint8]:
    """Return h × w × 3 (uint8) from h × w × s samples of eight or sixteen bits."""
    values = values[..., : of.count]
    if values.dtype != np.uint8:
        values = np.minimum(values >> max(0, of.bits - 8), 255).astype(np.uint8)
    alpha = None
    if of.alpha != "none":
        values, alpha = values[..., :-1], values[..., -1:]
        alpha = None if alpha.min(initial=255) == 255 else alpha.astype(np.uint16)
    if of.inverted:
        values = 255 - values
    if of.colours == "cmyk":
        light = 255 - values.astype(np.uint16)
        values = ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)
    if alpha is not None:
        light = values if of.alpha == "premultiplied" else (values.astype(np.uint16) * alpha + 127) // 255
        values = np.minimum(light + (255 - alpha), 255).astype(np.uint8)
    if of.colours == "grey":
        return np.repeat(values, 3, axis=2)
    return np.ascontiguousarray(values)


def check_dtype(path: Path, dtype: Any) -> None:
    """Raise SlideError where samples are of a kind whose white is not known: signed, with a fraction, of 32 bits."""
    kind = np.dtype(dtype)
    if kind in (np.uint8, np.uint16):
        return
    what = "floating-point px" if kind.kind == "f" else f"px of {kind.name}"
    raise SlideError(f"{path} holds {what}, whose white is not known; save it with 8 bits a px")


def with_bits(
    path: Path, of: Samples, dtype: Any, said: int | None, pieces: Iterable[NDArray[Any]]
) -> tuple[Samples, list[str]]:
    """Return `of` with the bits that are used of a sample, and what to say of it.

    `said` is how many the file says; `pieces` some of its px (h × w × s), looked at where it says none, or all sixteen,
    as programs do that do not know. Raises SlideError where nothing tells: all of those are zero.
    """
    if np.dtype(dtype) == np.uint8:
        return of, []
    alpha, largest = of.alpha != "none", 0
    for values in pieces:
        colours = values[..., : of.count - alpha]
        largest = max(largest, int(colours.max(initial=0)))
    if said is not None and said < 16 and largest < 1 << said:
        return replace(of, bits=said), [f"{said} bits a px are read as their upper 8"]
    if largest == 0:
        raise SlideError(
            f"{path} holds px of 16 bits that are all zero where it was looked at, so that its white is not known; "
            "save it with 8 bits a px"
        )
    bits = next(bits for bits in _NOMINAL if largest < 1 << bits)
    used = "" if bits == 16 else f" (of 16; the largest value found is {largest:,})"
    return replace(of, bits=bits), [f"{bits} bits a px{used} are read as their upper 8"]


def icc_notices(profile: bytes | None) -> list[str]:
    """Say that a picture's own description of its colours is not applied; nothing where it is that of every screen."""
    if not profile:
        return []
    from PIL import ImageCms

    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except Exception:  # damaged, or of a kind that is not known
        name = "unreadable"
    if "srgb" in name.lower():
        return []
    return [f"its ICC profile ('{name[:60]}') is not applied: colours are taken as they are stored"]
