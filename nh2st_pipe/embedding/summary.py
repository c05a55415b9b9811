"""What one call of `embed` did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["EmbedSummary"]


@dataclass
class EmbedSummary:
    """What one call of `embed` did."""

    store: str
    encoded_tiles: int = 0
    done: list[str] = field(default_factory=list)
    """Slides finished by this call."""
    kept: list[str] = field(default_factory=list)
    """Slides that were complete already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Slides passed over, each with its cause."""
    stain_shifts: list[str] = field(default_factory=list)
    """Slides whose shift under other stains was found by this call."""
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("encoder", "reading", "writing"), 0.0))
    """Where the time of the calling thread went: in the encoder, waiting for tiles, writing; and `total`."""

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return dict(vars(self))
