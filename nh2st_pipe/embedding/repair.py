"""What is damaged in a store, made anew from the slides, and nothing else."""

from __future__ import annotations

from pathlib import Path

from nh2st_pipe.core.errors import UsageError, listed
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.embedding.summary import EmbedSummary
from nh2st_pipe.store.verify import Verified, set_aside
from nh2st_pipe.tiles.manifest import read_manifest

__all__ = ["repair"]


def repair(
    found: Verified,
    slides: str | Path,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed anew, from the manifest `slides`, what `verify` found damaged; where only counts are, renew those.

    Raises UsageError, before anything is touched, where the manifest lacks one of them.
    """
    absent = sorted(set(found.damaged) - {row.slide_id for row in read_manifest(slides)})
    if absent:
        raise UsageError(f"{slides} has no slide {listed(absent)}, which is damaged; nothing was changed")
    set_aside(found.store, found)
    return embed(
        slides,
        store=found.store,
        weights=weights,
        device=device,
        only=list(found.damaged),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
