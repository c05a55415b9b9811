"""The dihedral views of a tile: the symmetries of the square, under which tissue looks as likely."""

from __future__ import annotations

import torch

__all__ = ["dihedral"]


def dihedral(images_bchw: torch.Tensor, view: int) -> torch.Tensor:
    """Return view 0..7 of square images: a quarter turn counter-clockwise `view % 4` times, mirrored from 4 on.

    View 0 is the image itself. The eight are the symmetries of the square, under which tissue looks as likely.
    """
    turned = torch.rot90(images_bchw, view % 4, (2, 3))
    return turned.flip(3) if view >= 4 else turned
