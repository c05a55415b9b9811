"""What a store says about itself: its contract, the state of a slide, the fingerprint of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FORMAT", "KEY", "Contract", "SlideState", "fingerprint", "tile_words"]

FORMAT = 1

KEY = "nh2st_pipe"


@dataclass(frozen=True)
class Contract:
    """What all slides of a store have in common: if any of it differs, the embeddings are others."""

    encoder: dict[str, Any]
    """The recipe, whole."""
    identity: dict[str, Any]
    """The recipe's fields that decide the numbers."""
    weights_sha256: str
    weights_source: str
    precision: str
    tile: dict[str, float | None]
    views: int

    def attributes(self) -> dict[str, Any]:
        """Return the root attributes, without the manifest."""
        return {
            "format": FORMAT,
            "encoder": self.encoder,
            "identity": self.identity,
            "weights": {"sha256": self.weights_sha256, "source": self.weights_source},
            "precision": self.precision,
            "tile": self.tile,
            "views": self.views,
            "sub_tiles": 0,
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> Contract:
        """Return the contract written in a store's root."""
        return cls(
            encoder=attributes["encoder"],
            identity=attributes["identity"],
            weights_sha256=attributes["weights"]["sha256"],
            weights_source=attributes["weights"]["source"],
            precision=attributes["precision"],
            tile=attributes["tile"],
            views=attributes["views"],
        )

    @property
    def dim(self) -> int:
        """Values per embedding."""
        return int(self.encoder["dim"])

    def differences(self, other: Contract, *, views: bool = True) -> list[str]:
        """Return in words where `other` differs, so that both values are named."""
        found = []
        mine, theirs = self.identity, other.identity
        if mine["name"] != theirs["name"]:
            found.append(f"encoder {mine['name']}, not {theirs['name']}")
        else:
            found += [
                f"encoder {mine['name']} with {key} {mine.get(key)!r}, not {theirs.get(key)!r}"
                for key in sorted(mine.keys() | theirs.keys())
                if mine.get(key) != theirs.get(key)
            ]
            if self.weights_sha256 != other.weights_sha256:
                found.append(f"weights with SHA-256 {self.weights_sha256[:12]}…, not {other.weights_sha256[:12]}…")
        if self.tile != other.tile:
            found.append(f"tiles of {tile_words(self.tile)}, not {tile_words(other.tile)}")
        if self.precision != other.precision:
            found.append(f"precision {self.precision}, not {other.precision}")
        if views and self.views != other.views:
            found.append(f"{self.views} views, not {other.views}")
        return found


def tile_words(tile: dict[str, float | None]) -> str:
    """Return a tile size with its unit."""
    return f"{tile['size_um']:g} µm" if tile["size_um"] is not None else f"{tile['size_level0_px']:g} px"


@dataclass(frozen=True)
class SlideState:
    """How far a slide is; see STORE.md."""

    complete: bool
    rows: int
    partial: int
    tiles: int
    source: dict[str, Any]


def fingerprint(path: Path) -> str:
    """Return a fingerprint of a file's content: its size and SHA-256, of sixteen samples where it is large.

    It survives copying and moving; up to 16 MiB it sees every byte.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= 1 << 24:
            digest.update(file.read())
        else:
            block = 1 << 18
            for start in np.linspace(0, size - block, 16).astype(int):
                file.seek(int(start))
                digest.update(file.read(block))
    return f"{size}-{digest.hexdigest()[:32]}"
