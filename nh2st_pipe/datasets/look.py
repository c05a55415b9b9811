"""Imported sections looked at: their spots held against the tissue, and drawn on one picture of them all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

from PIL import Image, ImageDraw

from nh2st_pipe.checking.examine import Examined
from nh2st_pipe.checking.run import check
from nh2st_pipe.core.whole import written_whole

__all__ = ["look_at"]

_SIDE, _LABEL = 760, 22  # px of a section on the picture
_MOST_DRAWN = 100


def look_at(manifest: Path, picture: Path) -> dict[str, list[str]]:
    """Draw the sections of a manifest to `picture`, and return what speaks against each, by slide_id.

    That a dataset does not say its resolution is no fault of the import; `check` and `embed` say how it is estimated.
    """
    slides = check(manifest).slides
    drawn = [slide for slide in slides if slide.picture is not None][:_MOST_DRAWN]
    columns = max(1, ceil(sqrt(len(drawn))))
    strips = [_strip(drawn[at : at + columns], columns) for at in range(0, len(drawn), columns)]
    sheet = Image.new("RGB", (columns * _SIDE, max(1, sum(strip.height for strip in strips))), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    with written_whole(picture) as part:
        sheet.save(part, format="PNG")
    said = {
        slide.slide_id: [*slide.faults, *(words for words in slide.doubts if words not in slide.estimates)]
        for slide in slides
    }
    return {slide_id: words for slide_id, words in said.items() if words}


def _strip(slides: Sequence[Examined], columns: int) -> Image.Image:
    """Return slides beside each other, as high as the highest of them, each with its name and how its spots lie."""
    images = [Image.open(io.BytesIO(slide.picture)) for slide in slides if slide.picture is not None]
    for image in images:
        image.thumbnail((_SIDE - 8, _SIDE - 8))
    strip = Image.new("RGB", (columns * _SIDE, max(image.height for image in images) + _LABEL + 8), "white")
    pen = ImageDraw.Draw(strip)
    for number, (slide, image) in enumerate(zip(slides, images, strict=True)):
        strip.paste(image, (number * _SIDE + 4, _LABEL))
        on = next(iter(slide.on_tissue.values()), None)
        share = "" if on is None else f", {on:.0%} on tissue"
        pen.text((number * _SIDE + 6, 4), f"{slide.slide_id}: {slide.tiles or 0} spots{share}", fill="black")
    return strip
