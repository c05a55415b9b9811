"""What one call of `embed` did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PARTS", "EmbedSummary", "Part", "merge"]

Part = Literal["encoder", "opening", "reading", "writing"]
PARTS: tuple[Part, ...] = ("encoder", "opening", "reading", "writing")
_MUCH = 0.2  # share of the time


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
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Where the time of the calling thread went: in the encoder, waiting for slides to be opened, for tiles to be read,
    for what is written; and `total`."""
    busy: dict[str, list[float]] = field(default_factory=dict)
    """How many processors each process kept at work (CPU ÷ wall): `main`; `readers`; `encoders`, where
    there is one for each of several devices."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What decided the speed: device, precision, batch_size, workers, readers, cores; empty where none was encoded."""

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {**vars(self), "tiles_per_second": self.tiles_per_second, "advice": self.advice()}

    @property
    def tiles_per_second(self) -> float | None:
        """Tiles encoded in a second in which tiles were read, encoded or written; None where there were none."""
        busy = sum(self.seconds[part] for part in PARTS)
        return self.encoded_tiles / busy if self.encoded_tiles and busy > 0 else None

    def advice(self) -> str | None:
        """Say what the time went to, and what would shorten it; None where nothing was encoded."""
        if self.tiles_per_second is None:
            return None
        busy = sum(self.seconds[part] for part in PARTS)
        share = {part: self.seconds[part] / busy for part in PARTS}
        if share["reading"] + share["opening"] > _MUCH:
            workers, cores = self.settings.get("workers"), self.settings.get("cores")
            more = f"--workers ({workers} now, on {cores} cores), or " if workers and cores and workers < cores else ""
            what = "tiles" if share["reading"] > share["opening"] else "slides to be opened and their tissue found"
            return f"the encoder waits for {what}: {more}slides on a faster disk would shorten it{self._how_busy()}"
        if share["writing"] > _MUCH:
            return "writing takes long: a faster disk for the store would shorten it"
        if str(self.settings.get("device")).startswith("cpu"):
            return "the encoder takes the time: a GPU or a smaller encoder would shorten it"
        return "the encoder takes the time, as it should: a faster GPU or a smaller encoder would shorten it"

    def _how_busy(self) -> str:
        """Say how busy the processors of whoever reads were: a share near 1 asks for cores, a small one for a disk."""
        readers, main = self.busy.get("readers"), self.busy.get("main")
        if readers:
            return f" (the reading processes were at work {sum(readers) / len(readers):.0%} of the time)"
        return f" (one process with threads kept {sum(main) / len(main):.1f} cores at work)" if main else ""


def merge(into: EmbedSummary, parts: Sequence[EmbedSummary]) -> None:
    """Add what processes did side by side: what one finished the others kept, and times are their mean."""
    for part in parts:
        into.encoded_tiles += part.encoded_tiles
        into.settings = into.settings or {**part.settings, "processes": len(parts)}
        for name, busy in part.busy.items():
            into.busy.setdefault(name, []).extend(busy)
    for name in ("done", "stain_shifts", "notices"):  # each once, and in time that is linear: parts may be thousands
        mine: list[str] = getattr(into, name)
        mine[:] = dict.fromkeys([*mine, *(each for part in parts for each in getattr(part, name))])
    known = set(into.done)
    kept = dict.fromkeys([*into.kept, *(each for part in parts for each in part.kept)])
    into.kept[:] = [each for each in kept if each not in known]
    known.update(into.kept)
    for part in parts:
        into.failed |= {each: cause for each, cause in part.failed.items() if each not in known}
    for name in PARTS:
        into.seconds[name] += sum(part.seconds[name] for part in parts) / max(len(parts), 1)
