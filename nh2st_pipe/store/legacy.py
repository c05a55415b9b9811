"""Format 1, read for ever: every slide's row in the root's attributes, `state` in the slide's, no list of files."""

from __future__ import annotations

from typing import Any

from nh2st_pipe.store.format import ImageSource, ManifestRow, SlideRecord, SlideState

__all__ = ["UNKNOWN_SPOTS", "record_of"]

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
