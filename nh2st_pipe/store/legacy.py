"""Formats 1 and 2, read for ever.

In format 1 every slide's row was in the root's attributes, `state` in the slide's, and there was no list of files. Both
kept what is known of a slide's image and its thumbnail in `embedding/uns`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.store.format import (
    Contract,
    ImageSource,
    ManifestRow,
    Picture,
    Resolved,
    SlideRecord,
    SlideState,
)

__all__ = ["UNKNOWN_SPOTS", "record_of", "resolved_of"]

UNKNOWN_SPOTS = ""  # format 1 keeps no fingerprint of the spots; `upgrade` makes it


def record_of(attributes: dict[str, Any], row: dict[str, Any], slide_id: str) -> SlideRecord | None:
    """Return a format-1 slide's attributes and its row of the manifest as a record; None where it has no state."""
    state = attributes.get("state")
    if state is None:
        return None
    source = state["source"]
    return SlideRecord(
        row=ManifestRow.model_validate(
            {"slide": "", **row, "slide_id": slide_id, "patient": row.get("patient") or slide_id}
        ),
        image=ImageSource(image=source["image"] or "", tissue=source.get("tissue"), mpp=source.get("mpp")),
        spots=UNKNOWN_SPOTS,
        expression=source.get("expression"),
        state=SlideState(
            tiles=state["tiles"],
            rows=state["rows"],
            partial=state["partial"],
            ready=True,
            complete=state["complete"],
        ),
    )


def resolved_of(uns: dict[str, Any], contract: Contract) -> tuple[Resolved, Picture | None, NDArray[np.uint8] | None]:
    """Return what `embedding/uns` says of a slide's tiles, of its thumbnail, and that; None where there is none yet."""
    image = uns.get("image", {})
    mpp = None if image.get("mpp") is None else float(image["mpp"])
    tile = image.get("tile_level0_px") or contract.tile["size_level0_px"]
    if tile is None:
        raise ValueError("it does not say how large its tiles are (uns/image/tile_level0_px)")
    resolved = Resolved(
        width=int(image.get("width", 0)),
        height=int(image.get("height", 0)),
        mpp=mpp,
        mpp_source=str(image.get("mpp_source", "unknown")),
        tile_level0_px=float(tile),
    )
    for found in uns.get("spatial", {}).values():
        for name, picture in found["images"].items():
            scales = found["scalefactors"]
            width = float(scales.get("spot_diameter_fullres", tile))
            return resolved, Picture(scale=float(scales[f"tissue_{name}_scalef"]), spot_px=width), picture
    return resolved, None, None
