"""What a store says about itself: its contract, and one record per slide. The format's page is stages/embed/STORE.md.

Both are typed values with a checksum of themselves, kept as attributes of Zarr groups. What does not read as one is
damaged, or of a newer version; it is never half believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import google_crc32c
import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nh2st_pipe.core.hashes import LARGE, cache_of, remembered_sha256
from nh2st_pipe.recipes.encoder import EncoderRecipe
from nh2st_pipe.recipes.values import Strict
from nh2st_pipe.tiles.options import GridOptions

__all__ = [
    "FORMAT",
    "KEY",
    "THUMBNAIL",
    "Contract",
    "ImageSource",
    "Imported",
    "ManifestRow",
    "Picture",
    "Resolved",
    "SlideRecord",
    "SlideState",
    "WeightsOf",
    "counts_fingerprint",
    "crc32c",
    "fingerprint",
    "read_signed",
    "sampled_fingerprint",
    "signed",
    "spots_fingerprint",
    "tile_words",
    "to_json",
]

FORMAT = 3
KEY = "nh2st_pipe"
THUMBNAIL = "thumbnail.png"
_MPP_TOLERANCE = 1e-3  # as far as an estimate may move between two versions; a tile of 224 px by less than a quarter px
_TILE_TOLERANCE = 0.02  # between tools, which round to px of the slide
Count = Annotated[int, Field(ge=0)]
Value = TypeVar("Value", bound=BaseModel)


class WeightsOf(BaseModel):
    """The encoder's weights."""

    model_config = ConfigDict(frozen=True)
    sha256: str
    """Of the file, and of the code beside it where that runs; "none" for an encoder without weights."""
    source: str
    """Where they are from, in words."""


class Imported(BaseModel):
    """What is known of embeddings that another tool made."""

    model_config = ConfigDict(frozen=True)
    tool: str
    version: str = ""
    """Of the tool, as its files say; empty where they do not."""
    encoder: str
    """What the tool calls it."""
    stored: str
    """Type in which the tool keeps values: float16, float32 …"""
    assumed: tuple[str, ...] = ()
    """What of the contract its files do not tell and was taken from what the tool does by default."""

    def in_words(self) -> str:
        """Return it in words."""
        return f"{self.tool} (its encoder {self.encoder}, values in {self.stored})"


class Contract(BaseModel):
    """What all slides of a store have in common: if any of it differs, the embeddings are others."""

    model_config = ConfigDict(frozen=True)  # keys of other formats are passed over
    encoder: dict[str, Any]
    """The recipe, whole."""
    identity: dict[str, Any]
    """The recipe's fields that decide the numbers; one that is missing has its default."""
    weights: WeightsOf
    precision: Literal["float32", "bfloat16", "float16"]
    tile: dict[Literal["size_um", "size_level0_px"], float | None]
    views: Literal[1, 8]
    grid: GridOptions = GridOptions()
    """How tiles lie on slides without spots: which they are, and not what their embeddings are."""
    origin: Literal["embedded", "imported"] = "embedded"
    """Whether the embeddings were made by `embed`, or by another tool."""
    imported: Imported | None = None
    """Of those by another tool."""

    @pydantic.model_validator(mode="after")
    def _says_where_from(self) -> Contract:
        if (self.origin == "imported") != (self.imported is not None):
            raise ValueError("origin and imported contradict each other")
        return self

    def attributes(self) -> dict[str, Any]:
        """Return the contract as JSON values, with the format's number."""
        own = {"origin", "imported"} if self.origin == "embedded" else set[str]()
        return {"format": FORMAT, **self.model_dump(mode="json", exclude=own)}

    @property
    def dim(self) -> int:
        """Values per embedding."""
        return int(self.encoder["dim"])

    def differences(self, other: Contract, *, one_store: bool = True) -> list[str]:
        """Return in words where `other` differs, so that both values are named.

        What has to be the same within `one_store` alone, and not for a model of another one, is views and grid. There
        a tool's embeddings mix with its own alone; a model of one may be applied to another's where what decides their
        meaning agrees (see `across`).
        """
        found = []
        if one_store and self._tool() != other._tool():
            found.append(f"{self.made_by()}, not {other.made_by()}")
        if not one_store and self.across(other):
            return self._differences_across(other)
        mine, theirs = self.identity, other.identity
        if mine["name"] != theirs["name"]:
            found.append(f"encoder {mine['name']}, not {theirs['name']}")
        else:
            for key in sorted(mine.keys() | theirs.keys()):
                one, two = (side.get(key, EncoderRecipe.default_of(key)) for side in (mine, theirs))
                if one != two and not (key == "autocast" and self.precision == other.precision == "float32"):
                    found.append(f"encoder {mine['name']} with {key} {one!r}, not {two!r}")
            if self.weights.sha256 != other.weights.sha256:
                found.append(f"weights with SHA-256 {self.weights.sha256[:12]}…, not {other.weights.sha256[:12]}…")
        if self.tile != other.tile:
            found.append(f"tiles of {tile_words(self.tile)}, not {tile_words(other.tile)}")
        if self.precision != other.precision:
            found.append(f"precision {self.precision}, not {other.precision}")
        if one_store and self.grid != other.grid:
            found.append(f"a grid of {grid_words(self.grid)}, not {grid_words(other.grid)}")
        if one_store and self.views != other.views:
            found.append(f"{self.views} views, not {other.views}")
        return found

    def across(self, other: Contract) -> bool:
        """Whether the two were made by different tools: their weights cannot be held against each other then."""
        return self._tool()[:2] != other._tool()[:2]

    def _differences_across(self, other: Contract) -> list[str]:
        """Return where encoder, pooling, dimension, input or tile size differ, as far as both know them."""
        found = []
        for key in ("name", "pooling", "dim", "input_px"):
            one, two = self.identity.get(key), other.identity.get(key)
            if one != two:
                found.append(f"{'encoder' if key == 'name' else key} {one}, not {two}")
        if not _same_tile(self.tile, other.tile):
            found.append(f"tiles of {tile_words(self.tile)}, not {tile_words(other.tile)}")
        return found

    def _tool(self) -> tuple[str, ...]:
        made = self.imported
        return (self.origin,) if made is None else (self.origin, made.tool, made.encoder, made.stored)

    def made_by(self) -> str:
        """Return in words what made the embeddings."""
        return "embeddings of embed" if self.imported is None else f"features imported from {self.imported.in_words()}"


def _same_tile(one: dict[Any, float | None], two: dict[Any, float | None]) -> bool:
    return all(_alike(one[side], two[side], _TILE_TOLERANCE) for side in ("size_um", "size_level0_px"))


def grid_words(grid: GridOptions) -> str:
    """Return in words how tiles lie on slides without spots."""
    return f"{grid.overlap:.4g} overlap and {grid.min_tissue:.4g} least tissue"


def tile_words(tile: dict[Any, float | None]) -> str:
    """Return a tile size with its unit."""
    return f"{tile['size_um']:g} µm" if tile["size_um"] is not None else f"{tile['size_level0_px']:g} px"


class ManifestRow(Strict):
    """A slide's row of the manifest; files by their names, no folder of any machine."""

    slide_id: str
    slide: str
    expression: str | None = None
    patient: str
    mpp: float | None = None
    tissue: str | None = None
    extra: dict[str, str] = Field(default_factory=dict)


class ImageSource(Strict):
    """What decides a slide's embeddings besides the contract and the places of its spots."""

    image: str
    """Fingerprint of the image file."""
    tissue: str | None = None
    """Fingerprint of the tissue mask's file."""
    mpp: float | None = None
    """The manifest's, where it has one."""
    features: str | None = None
    """Fingerprint of the file of another tool from which the embeddings were imported."""

    def same(self, other: ImageSource) -> bool:
        """Whether embeddings of the two are the same; an mpp that differs by less than 0.1 % is."""
        return not self.differences(other)

    def differences(self, other: ImageSource) -> list[str]:
        """Return the names of what differs."""
        found = [name for name in ("image", "tissue", "features") if getattr(self, name) != getattr(other, name)]
        return found if _alike(self.mpp, other.mpp) else [*found, "mpp"]


class Resolved(Strict):
    """What a slide's tiles came to be: what the options, the manifest, the files and the libraries here made of it."""

    width: Count
    """Of the image, level-0 px."""
    height: Count
    mpp: float | None = None
    """µm per level-0 px, None where nothing says it."""
    mpp_source: str = "unknown"
    """manifest, file, spots, or unknown."""
    tile_level0_px: float
    """Side of a tile."""
    reader: str = ""
    """The library that decoded the image, and its version; empty where an earlier format did not keep it."""
    origin: tuple[int, int] | None = None
    """Where QuPath counts from, level-0 px; None where it was not kept."""

    def differences(self, other: Resolved) -> list[str]:
        """Return in words what tiles of `other` have that these have not: their size, or the image's."""
        found = []
        if (self.width, self.height) != (other.width, other.height):
            found.append(f"image ({self.width} × {self.height} px, now {other.width} × {other.height})")
        if not _alike(self.tile_level0_px, other.tile_level0_px):
            found.append(f"tile ({self.tile_level0_px:g} level-0 px, now {other.tile_level0_px:g})")
        if not _alike(self.mpp, other.mpp):
            one, two = (f"{side.mpp:.4g} by the {side.mpp_source}" if side.mpp else "unknown" for side in (self, other))
            found.append(f"mpp ({one}, now {two})")
        return found

    def mixes_with(self, other: Resolved) -> bool:
        """Whether tiles of the two may stand in one slide: none differs, and the same library decoded them."""
        return not self.differences(other) and (self.reader == other.reader or not self.reader)


def _alike(one: float | None, two: float | None, tolerance: float = _MPP_TOLERANCE) -> bool:
    return one == two or (one is not None and two is not None and abs(one / two - 1) < tolerance)


class Picture(Strict):
    """How the slide's thumbnail is to be drawn on."""

    scale: float
    """Px of it per level-0 px."""
    spot_px: float
    """How wide a spot is drawn, level-0 px."""


class SlideState(Strict):
    """How far a slide is."""

    tiles: Count
    rows: Count = 0
    """Tiles safely in the arrays."""
    partial: Count = 0
    """Tiles behind them in the array `partial_<rows>`."""
    ready: bool = False
    """Whether all that is known before the first tile is written."""
    complete: bool = False


Seen = tuple[Count, int]


class SlideRecord(Strict):
    """All that a store knows of one slide besides its data."""

    row: ManifestRow
    image: ImageSource
    spots: str
    """Fingerprint of the spots' barcodes and places."""
    expression: str | None = None
    """Fingerprint of the file whose counts are in `expression/`, None where there are none."""
    stain_shift: str | None = None
    """Which synthetic stains the array `stain_shift` is the mean shift under; None where there is none."""
    resolved: Resolved | None = None
    """What its tiles came to be; None in formats 1 and 2, which keep it in `embedding/uns`."""
    picture: Picture | None = None
    """On `thumbnail.png`; None until the slide is complete."""
    lease: str | None = None
    """The fence of whoever is writing the slide; None when it is complete."""
    slide_embeddings: tuple[str, ...] = ()
    """Names of the vectors of the whole slide in `slide_embedding/`."""
    seen: dict[str, Seen] = Field(default_factory=dict)
    """Size and time (ns) of the files whose fingerprints are here, when those were taken: `image`, `tissue`,
    `expression`. A file that has both still is not read anew; without them it is."""
    state: SlideState
    files: dict[str, tuple[Count, str]] = Field(default_factory=dict)
    """Every file of a complete slide below its folder: size in bytes and CRC-32C."""

    def with_state(self, **changes: Any) -> SlideRecord:
        """Return the record with parts of its state changed."""
        return self.model_copy(update={"state": self.state.model_copy(update=changes)})


def to_json(record: SlideRecord) -> bytes:
    """Return a record as the metadata of the Zarr group that a slide is, signed."""
    attributes = {KEY: signed(json.loads(record.model_dump_json()))}
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def signed(values: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values with a checksum of them under `check`."""
    return {**values, "check": crc32c(_canonical(values))}


def read_signed(kind: type[Value], values: Any) -> Value:
    """Return checked `values` as `kind`. Raises ValueError, in words, where they are not what was written."""
    if not isinstance(values, dict):
        raise ValueError("is no mapping of keys to values")
    rest = {key: value for key, value in values.items() if key != "check"}
    if values.get("check") != crc32c(_canonical(rest)):
        raise ValueError("does not have the checksum that was written with it")
    rest.pop("format", None)
    try:
        return kind.model_validate(rest)
    except pydantic.ValidationError as error:
        from nh2st_pipe.recipes.values import faults_in_words

        raise ValueError(f"{faults_in_words(error, kind)} (was it written by a newer version?)") from error


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def crc32c(data: bytes | memoryview) -> str:
    """Return the CRC-32C of bytes as eight hexadecimal digits."""
    return f"{google_crc32c.value(bytes(data)):08x}"


def spots_fingerprint(barcodes: Sequence[str], xy: NDArray[np.float64]) -> str:
    """Return a fingerprint of spots' names and places: where it is the same, so are the embeddings."""
    digest = hashlib.sha256("\n".join(barcodes).encode())
    digest.update(np.ascontiguousarray(xy, dtype="<f8").tobytes())
    return digest.hexdigest()[:32]


def counts_fingerprint(path: Path) -> str:
    """Return a fingerprint of all of a file's content, or of all files of a folder: a few bytes of it are counts.

    That of a file of 16 MiB at most is the same as `fingerprint`'s.
    """
    if not path.is_dir():
        return f"{path.stat().st_size}-{remembered_sha256(path, cache_of(path))[:32]}"
    digest, total = hashlib.sha256(), 0
    for name, file in sorted((each.relative_to(path).as_posix(), each) for each in path.rglob("*") if each.is_file()):
        if not file.name.startswith("."):
            total += file.stat().st_size
            digest.update(f"{name} {counts_fingerprint(file)}\n".encode())
    return f"{total}-{digest.hexdigest()[:32]}"


def sampled_fingerprint(path: Path) -> str | None:
    """Return the `fingerprint` of counts as formats 1 and 2 have it; None where it is that of all of them."""
    return fingerprint(path) if path.is_dir() or path.stat().st_size > LARGE else None


_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup")


def fingerprint(path: Path) -> str:
    """Return a fingerprint of an image's content: its size and SHA-256, of sixteen samples where it is large.

    It survives copying and moving; up to 16 MiB it sees every byte. Of a folder (OME-Zarr) it is that of the names and
    sizes of its files, of its metadata, and of sixteen others; what an operating system hides in it is passed over.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        every = ((each.relative_to(path).as_posix(), each) for each in path.rglob("*") if each.is_file())
        files = sorted(each for each in every if not each[1].name.startswith(".") or each[1].name in _METADATA)
        sizes = [each.stat().st_size for _, each in files]
        digest.update("\n".join(f"{name} {n}" for (name, _), n in zip(files, sizes, strict=True)).encode())
        sampled = {int(i) for i in np.linspace(0, max(0, len(files) - 1), 16)}
        for number, (_, each) in enumerate(files):
            if number in sampled or each.name in _METADATA:
                digest.update(fingerprint(each).encode())
        return f"{sum(sizes)}-{digest.hexdigest()[:32]}"
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= LARGE:
            digest.update(file.read())
        else:
            block = 1 << 18
            for start in np.linspace(0, size - block, 16).astype(int):
                file.seek(int(start))
                digest.update(file.read(block))
    return f"{size}-{digest.hexdigest()[:32]}"
