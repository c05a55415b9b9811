"""Imported sections looked at: their spots held against the tissue, and drawn on one picture of them all."""

from __future__ import annotations

from math import ceil, sqrt
from pathlib import Path

from PIL import Image, ImageDraw

from nh2st_pipe.checking.run import check
from nh2st_pipe.core.whole import written_whole

__all__ = ["look_at"]

_SIDE, _LABEL = 480, 22  # px of a section on the picture
_MOST_DRAWN = 100


def look_at(manifest: Path, picture: Path) -> dict[str, list[str]]:
    """Draw the sections of a manifest to `picture`, and return what speaks against each, by slide_id."""
    slides = check(manifest).slides
    drawn = [slide for slide in slides if slide.picture is not None][:_MOST_DRAWN]
    columns = max(1, ceil(sqrt(len(drawn))))
    sheet = Image.new("RGB", (columns * _SIDE, max(1, ceil(len(drawn) / columns)) * (_SIDE + _LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, slide in enumerate(drawn):
        left, top = number % columns * _SIDE, number // columns * (_SIDE + _LABEL)
        assert slide.picture is not None
        image = Image.fromarray(slide.picture)
        image.thumbnail((_SIDE - 8, _SIDE - 8))
        sheet.paste(image, (left + 4, top + _LABEL))
        on = next(iter(slide.on_tissue.values()), None)
        share = "" if on is None else f", {on:.0%} on tissue"
        pen.text((left + 6, top + 5), f"{slide.slide_id}: {slide.tiles or 0} spots{share}", fill="black")
    with written_whole(picture) as part:
        sheet.save(part, format="PNG")
    return {slide.slide_id: [*slide.faults, *slide.doubts] for slide in slides if not slide.good}
