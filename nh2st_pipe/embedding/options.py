"""What may be asked of `embed`: one value, which the command line, Python and every process share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.recipes.encoder import EncoderRecipe, Precision
from nh2st_pipe.slides.resolution import check_tile_options
from nh2st_pipe.tiles.options import GridOptions

__all__ = ["DecodeOn", "EmbedOptions", "EngineName", "ReadersKind"]

EngineName = Literal["local", "ray"]
ReadersKind = Literal["auto", "threads", "processes"]
DecodeOn = Literal["cpu", "gpu"]

_ONE_OF: dict[str, tuple[object, ...]] = {
    "views": (1, 8),
    "readers": ("auto", "threads", "processes"),
    "stain_shift": ("auto", "off"),
    "decode": ("cpu", "gpu"),
    "engine": ("local", "ray"),
    "precision": ("float32", "bfloat16", "float16"),
}


class EmbedOptions(BaseModel):
    """How slides are to be embedded. What is None is as in the store where there is one, else the recipe's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    encoder: str | Path | EncoderRecipe | None = None
    """A recipe, its name or its YAML file."""
    weights: str | Path | None = None
    """A file that takes the place of the hub's."""
    store: Any = "store.zarr"
    """A folder, a URL, or a Location."""
    views: Literal[1, 8] | None = None
    """Dihedral views kept of each tile; 1 where nothing says it."""
    tile_um: float | None = None
    """A tile's side, µm."""
    tile_px: float | None = None
    """The same in level-0 px, instead."""
    overlap: float | None = None
    """Of slides without spots: the share of a tile that the next one shows too."""
    min_tissue: float | None = None
    """Of slides without spots: the share of a tile that has to be tissue."""
    device: str = "auto"
    """cpu, cuda, mps, or several with commas between them; "auto" is every GPU of the machine, or the CPU."""
    batch_size: PositiveInt | None = None
    """Tiles encoded at once; None: what fits."""
    workers: PositiveInt | None = None
    """How many read tiles; None: 2 beside a CPU's encoder, else one for each core but one."""
    readers: ReadersKind = "auto"
    """Whether slides are opened and tiles read in processes, of which a GPU needs many, or in threads of this one;
    "auto" is processes beside a GPU."""
    decode: DecodeOn = "cpu"
    """"gpu" has JPEG and JPEG 2000 pieces of TIFF slides decoded by nvImageCodec, for small encoders and few cores."""
    precision: Precision | None = None
    """The encoder's arithmetic; None: the store's, else the recipe's on a GPU and float32 on a CPU."""
    redo_changed: bool = False
    """Whether slides whose files have changed are embedded anew."""
    stain_shift: Literal["auto", "off"] = "auto"
    """"auto" finds how far embeddings move under other stains, for slides with expression that lack it: heads are
    trained on those. It encodes 48 tiles a slide under 8 stains, and nothing that is there already."""
    only: Collection[str] | None = None
    """Slides to embed, the others being left out."""
    shard: str | None = Field(default=None, pattern=r"^\d+/\d+$")
    """"2/8": the second of eight parts of the manifest; without it, processes share a store's slides by leases."""
    trust_remote_code: bool = False
    """Whether an encoder's repository may run the code it brings along."""
    compiled: bool = False
    """Whether torch compiles the encoder."""
    stage: str | Path | None = None
    """A folder on a local disk to which slides are copied ahead of need, a few at a time."""
    engine: EngineName = "local"
    """"ray" does the work on a Ray cluster; the store is then in a shared folder or an object store."""
    address: str | None = None
    """Of the Ray cluster; None: RAY_ADDRESS, or one made on this machine."""
    actors: PositiveInt | None = None
    """On Ray; None: one for each GPU, or each CPU where there is none."""

    @classmethod
    def of(cls, options: EmbedOptions | None = None, **changes: Any) -> EmbedOptions:
        """Return options with changes. Raises UsageError, naming what cannot be."""
        unknown = sorted(changes.keys() - cls.model_fields.keys())
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, 1)
            more = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"embed has no option {unknown[0]}{more}")
        values = {} if options is None else {name: getattr(options, name) for name in options.model_fields_set}
        try:
            return cls(**{**values, **changes})
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, UsageError):
                raise cause from None
            name = str(first["loc"][0]) if first["loc"] else "options"
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} takes no {first['input']!r}: {first['msg'].lower()}") from error

    @field_validator(*_ONE_OF, mode="before")
    @classmethod
    def _one_of(cls, value: Any, info: Any) -> Any:
        every = _ONE_OF[info.field_name]
        if value is not None and value not in every:
            words = [str(each) for each in every]
            listed = f"{', '.join(words[:-1])} or {words[-1]}"
            raise UsageError(f"--{info.field_name.replace('_', '-')} takes {listed}, not {value}")
        return value

    @model_validator(mode="after")
    def _together(self) -> EmbedOptions:
        check_tile_options(self.tile_um, self.tile_px)
        GridOptions().changed(self.overlap, self.min_tissue)
        part, parts = self.part
        if not 1 <= part <= parts:
            raise UsageError(f"--shard takes a part and how many there are, 1/8 to 8/8, not {self.shard}")
        return self

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the manifest is meant, from 1, and of how many."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        assert found is not None
        return int(found[1]), int(found[2])
