"""One page about all slides that were looked at: a table, then each with its picture and what speaks against it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import nh2st_pipe
from nh2st_pipe.checking.examine import AS_THEY_ARE, Examined
from nh2st_pipe.core.whole import written_whole

__all__ = ["write_page"]

_SHOWN = 0.005  # share of the spots; less is 0 %


def write_page(slides: Sequence[Examined], header: str, lines: Mapping[str, str], manifest: Path, target: Path) -> Path:
    """Write the page to `target`; it needs nothing beside it. `lines` are corrected lines of the manifest by slide."""
    template = Path(__file__).with_name("check_template.html").read_text(encoding="utf-8")
    refused = sum(bool(each.faults) for each in slides)
    doubted = sum(bool(each.doubts) and not each.faults for each in slides)
    parts = {
        "TITLE": escape(f"Check of {manifest.name}"),
        "SUMMARY": escape(
            f"{_many(len(slides), 'slide')}: {len(slides) - refused - doubted} without a fault, {doubted} to be looked "
            f"at, {refused} that embed would pass over. nh2st-pipe {nh2st_pipe.__version__}."
        ),
        "ROWS": "\n".join(_row(each) for each in slides),
        "SLIDES": "\n".join(_slide(each, header, lines.get(each.slide_id)) for each in slides),
    }
    for name, words in parts.items():
        template = template.replace(f"@@{name}@@", words)
    with written_whole(target) as part:
        part.write_text(template, encoding="utf-8")
    return target


def _state(found: Examined) -> tuple[str, str]:
    return ("fault", "passed over") if found.faults else ("doubt", "look") if found.doubts else ("good", "good")


def _row(found: Examined) -> str:
    kind, word = _state(found)
    own = found.on_tissue.get(AS_THEY_ARE)
    cells = [
        f'<th scope="row"><a href="#{escape(found.slide_id)}">{escape(found.slide_id)}</a></th>',
        f'<td><span class="{kind}">{word}</span></td>',
        f"<td>{_size(found)}</td>",
        f"<td>{_number(found.mpp, '.4g')}</td>",
        f"<td>{_number(found.tile_px, '.4g')}</td>",
        f"<td>{_number(found.tiles, ',')}</td>",
        f"<td>{_number(found.pitch_um, '.4g')}</td>",
        f"<td>{_number(own, '.0%')}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _slide(found: Examined, header: str, line: str | None) -> str:
    said = [
        f'<p class="{kind} said">{escape(words)}</p>'
        for kind, every in (("fault", found.faults), ("doubt", found.doubts), ("note", found.notes))
        for words in every
    ]
    if line is not None:
        made = found.correction
        why = f" after its spots were laid {made.way}" if made is not None and made.way else ""
        said.append(f"<p>Proposed line of the manifest{escape(why)}:</p><pre>{escape(header)}\n{escape(line)}</pre>")
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(words)}</dd>" for label, words in _facts(found))
    picture = f'<figure>{_picture(found)}<figcaption class="soft">{escape(_caption(found))}</figcaption></figure>'
    return (
        f'<section id="{escape(found.slide_id)}"><h2>{escape(found.slide_id)}</h2>{"".join(said)}'
        f'<div class="slide">{picture}<dl>{facts}</dl></div></section>'
    )


def _picture(found: Examined) -> str:
    if found.picture is None:
        return '<p class="soft">There is no picture: the slide could not be read.</p>'
    width, height = found.picture_px
    text = base64.b64encode(found.picture).decode()
    alt = escape(f"{found.slide_id} with its tissue and tiles")
    return f'<img width="{width}" height="{height}" alt="{alt}" src="data:image/jpeg;base64,{text}">'


def _caption(found: Examined) -> str:
    if found.picture is None:
        return ""
    more = " Orange: taken off the tissue, and may be some." if found.shows_doubts else ""
    return f"Green: edge of the tissue. Blue: tiles; red where the centre of one is not on tissue.{more}"


def _facts(found: Examined) -> list[tuple[str, str]]:
    """Return what is known of a slide, as label and words; what is not known is left out."""
    facts = [
        ("Image", f"{_size(found)} px" if found.width else ""),
        ("Levels", ", ".join(f"{d:g}" for d in found.levels)),
    ]
    facts.append(("Resolution", f"{found.mpp:.4g} µm per px (by the {found.mpp_source})" if found.mpp else "not known"))
    if found.tile_px is not None:
        um = f" ({found.tile_um:.4g} µm)" if found.tile_um is not None else ""
        facts.append(("Tile", f"{found.tile_px:.4g} px{um}"))
    if found.tiles is not None:
        facts.append(("Tiles", f"{found.tiles:,}"))
    if found.pitch_px is not None:
        um = f" ({found.pitch_um:.4g} µm)" if found.pitch_um is not None else ""
        facts.append(("Pitch of the spots", f"{found.pitch_px:.4g} px{um}"))
    if found.tissue is not None:
        facts.append(("Tissue", f"{found.tissue:.0%} of the image"))
    if found.on_tissue:
        ways = sorted(found.on_tissue.items(), key=lambda each: (each[0] != AS_THEY_ARE, -each[1]))
        said = [f"{share:.0%} {way}" for way, share in ways if share >= _SHOWN or way == AS_THEY_ARE]
        facts.append(("Spots on tissue", "; ".join(said)))
    if found.counts:
        counts = found.counts
        empty = f", {counts['spots without any']} spots without any" if counts["spots without any"] else ""
        whole = "whole numbers" if counts["whole numbers"] else "not whole numbers"
        facts.append(("Counts", f"{counts['genes']:,} genes, {counts['median per spot']:,.0f} a spot, {whole}{empty}"))
    facts.append(("Looked at in", f"{found.seconds:.1f} s"))
    return [(label, words) for label, words in facts if words]


def _size(found: Examined) -> str:
    return f"{found.width:,} × {found.height:,}" if found.width and found.height else "–"


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
