"""What was found, as a page: each hit's H&E, where it lies on its slide, and what is predicted there."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from nh2st_pipe.core.errors import SlideError
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.searching.search import Hit, Hits
from nh2st_pipe.searching.stores import Stores, together
from nh2st_pipe.slides import Slide, open_slide
from nh2st_pipe.slides.base import read_tile
from nh2st_pipe.store.format import THUMBNAIL
from nh2st_pipe.store.read import Store
from nh2st_pipe.tiles.manifest import slide_files

__all__ = ["write_page"]

_TILES, _CROP_PX, _MAP_PX = 3, 336, 160

_STYLE = """
:root { color-scheme: light dark; --line: #d9dde4; --card: #ffffff; --ground: #f4f5f8; --ink: #1d2129;
  --soft: #5a6270; }
@media (prefers-color-scheme: dark) {
  :root { --line: #353c49; --card: #1a1f28; --ground: #12151b; --ink: #e6e9ef; --soft: #a3acba; }
}
body { margin: 0 auto; max-width: 1400px; padding: 20px 16px; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0; color: var(--soft); overflow-wrap: anywhere; }
ol { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; min-width: 0; }
li.asker { border-width: 3px; }
h2 { font-size: 1rem; margin: 0 0 6px; overflow-wrap: anywhere; }
.pictures { display: flex; gap: 8px; align-items: flex-start; }
.pictures > div { position: relative; }
.pictures img { display: block; max-width: 100%; border-radius: 4px; }
.crop { flex: 2 1 0; } .map { flex: 1 1 0; }
.crop::after { content: ""; position: absolute; left: 33.33%; top: 33.33%; width: 33.33%; height: 33.33%;
  box-sizing: border-box; border: 2px solid #ffffff; outline: 1px solid #111111; }
.map i { position: absolute; width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%;
  border: 2px solid #ffffff; background: #d00000; box-sizing: border-box; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0 12px; margin: 8px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def write_page(
    path: Path, hits: Hits, store: Store | Stores, slides: Path | None, title: str, asker: Hit | None
) -> None:
    """Write hits as one page that needs no network; `slides` is a manifest, without which there is no H&E.

    `asker` is the tile that was asked for. Raises SlideError where an image cannot be read.
    """
    images = {} if slides is None else slide_files(slides)
    with _Pictures(together(store), images) as pictures:
        cards = [] if asker is None else [_card(asker, "What was asked for", pictures, "asker")]
        cards += [_card(hit, f"{rank}. {hit.slide_id}", pictures) for rank, hit in enumerate(hits, start=1)]
    said = [*hits.notices, f"{len(hits):,} found among {hits.searched:,} tiles."]
    said += [f"Values: {hits.unit}."] if hits.unit else []
    words = "".join(f"<p>{html.escape(line)}</p>\n" for line in said)
    text = _HEAD.format(title=html.escape(title), style=_STYLE)
    with written_whole(path) as part:
        part.write_text(
            f"{text}<h1>{html.escape(title)}</h1>\n{words}<ol>\n{''.join(cards)}</ol>\n</body>\n</html>\n",
            encoding="utf-8",
        )


class _Pictures:
    """The slides that pictures are cut from, each opened once."""

    def __init__(self, store: Stores, images: Mapping[str, Path]) -> None:
        self._store, self._images = store, images
        self._open: dict[str, Slide] = {}

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        for slide in self._open.values():
            slide.close()

    def crop(self, hit: Hit) -> str:
        """Return the H&E around a tile, "" where no manifest says where its slide is."""
        if hit.x is None or hit.y is None or hit.slide_id not in self._images:
            return ""
        record = self._store.record(hit.slide_id)
        if record is None or record.resolved is None:
            return ""
        slide = self._open.get(hit.slide_id)
        if slide is None:
            slide = self._open[hit.slide_id] = open_slide(self._images[hit.slide_id])
            if slide.size != (record.resolved.width, record.resolved.height):
                raise SlideError(f"{self._images[hit.slide_id]} is not the image that slide {hit.slide_id} was made of")
        side = _TILES * record.resolved.tile_level0_px
        pixels = read_tile(slide, (hit.x, hit.y), side, _CROP_PX, "bicubic")
        return f'<div class="crop"><img alt="" src="{_data(Image.fromarray(pixels))}"></div>'

    def where(self, hit: Hit) -> str:
        """Return the slide made small, with a mark where the tile is; "" where the store has no thumbnail."""
        record = self._store.record(hit.slide_id)
        if record is None or record.resolved is None:
            return ""
        try:
            png = self._store.file(hit.slide_id, THUMBNAIL)
        except FileNotFoundError:
            return ""
        with Image.open(io.BytesIO(png)) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_MAP_PX, _MAP_PX))
        mark = ""
        if hit.x is not None and hit.y is not None:
            left, top = (100 * at / of for at, of in ((hit.x, record.resolved.width), (hit.y, record.resolved.height)))
            mark = f'<i style="left: {left:.2f}%; top: {top:.2f}%"></i>'
        return f'<div class="map"><img alt="" src="{_data(picture)}">{mark}</div>'


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _card(hit: Hit, title: str, pictures: _Pictures, kind: str = "") -> str:
    lines = [("patient", hit.patient)]
    if hit.likeness is not None:
        lines.append(("likeness", f"{hit.likeness:.3f}"))
    if hit.tile is not None:
        lines.append(("tile", f"{hit.tile}, at {hit.x:.0f}, {hit.y:.0f} px"))
    for gene, known in hit.values.items():
        lines.append((gene, _value(known)))
    if hit.unlike is not None:
        lines.append(("unlike", f"farther from the training tiles than {hit.unlike:.0f} % of them"))
    if hit.store:
        lines.append(("store", hit.store))
    if hit.trained_on:
        lines.append(("known", f"the head was {hit.trained_on}"))
    told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(words)}</dd>" for name, words in lines)
    shown = f'<div class="pictures">{pictures.crop(hit)}{pictures.where(hit)}</div>'
    return f'<li class="{kind}"><h2>{html.escape(title)}</h2>{shown}<dl>{told}</dl></li>\n'


def _value(known: Mapping[str, float | None]) -> str:
    def short(name: str) -> str:
        value = known.get(name)
        return "–" if value is None else f"{value:.3g}"

    words = short("value")
    if known.get("low") is not None and known.get("high") is not None:
        words += f" ({short('low')} to {short('high')})"
    return words + (f"; measured {short('measured')}" if known.get("measured") is not None else "")
