"""What a person may say of how tiles lie, on slides without spots."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nh2st_pipe.core.errors import UsageError

__all__ = ["GridOptions"]

_MOST_OVERLAP = 0.9


@dataclass(frozen=True)
class GridOptions:
    """How a grid of tiles lies on a slide without spots."""

    overlap: float = 0.0
    """Share of a tile's side that the next tile shows too, 0 to 0.9."""
    min_tissue: float = 0.5
    """Share of a tile that has to be tissue, above 0 to 1."""

    def changed(self, overlap: float | None, min_tissue: float | None) -> GridOptions:
        """Return these options with what is given in their place. Raises UsageError where a value cannot be."""
        given = {"overlap": overlap, "min_tissue": min_tissue}
        options = replace(self, **{key: value for key, value in given.items() if value is not None})
        options._check()
        return options

    def _check(self) -> None:
        if not (math.isfinite(self.overlap) and 0 <= self.overlap <= _MOST_OVERLAP):
            raise UsageError(f"--overlap takes a share of a tile's side, 0 to {_MOST_OVERLAP:g}, not {self.overlap}")
        if not (math.isfinite(self.min_tissue) and 0 < self.min_tissue <= 1):
            raise UsageError(f"--min-tissue takes a share of a tile, above 0 to 1, not {self.min_tissue}")
