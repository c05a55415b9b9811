"""Tissue as a person drew it: a mask image, or outlines in a GeoJSON file as QuPath exports them; and back.

A mask image may have a px for each of the slide's. It is read some rows at a time and made smaller, so that its memory
does not grow with its size.
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from shapely import Polygon, STRtree, box, get_parts, intersection, make_valid, points, within
from shapely.geometry.base import BaseGeometry
from skimage.measure import find_contours

from nh2st_pipe.core.errors import SlideError, fault_of, listed
from nh2st_pipe.core.memory import check_image, require
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.core.tables import read_text
from nh2st_pipe.slides.base import Slide
from nh2st_pipe.slides.directories import open_tiff
from nh2st_pipe.slides.png import png_in_strips
from nh2st_pipe.slides.raster import any_size

__all__ = ["MASK_PX", "geojson_of", "mask_from_geojson", "mask_from_image", "outlines_in", "tissue_files"]

MASK_PX = 2048  # longest side of the thumbnail the mask is made on
_PER_BYTE = 40  # of memory for each byte of JSON, about: numbers of few digits, each a Python object
_KEPT_PX = 8192  # longest side of a given mask, which is made smaller above it

_PACKS_LITTLE = (1, 5, 7, 8, 32773, 32946)  # none, LZW, JPEG, deflate, PackBits: not a thousandth of what they pack
_FAX = (2, 3, 4)  # takes a bit for an empty row; Pillow's
_FAX_BY_NAME = ("tiff_ccitt", "group3", "group4")
_BYTES = 5  # a px of what is decoded whole: as it is stored, and as grey
_ROWS = 512  # read at once of what is not compressed

Strips = Iterable[tuple[int, NDArray[Any]]]


def mask_from_image(path: Path) -> NDArray[np.bool_]:
    """Return what is not black in the image at `path`, h × w; a larger one is made smaller, to 8,192 px at most.

    Raises SlideError where it is no image. What is stored counts, not how it would be shown.
    """
    with fault_of(SlideError, f"the tissue mask {path} is not a readable image"):
        for opened in (png_in_strips(path), _tiff_in_strips(path)):
            if opened is not None:
                return _made_smaller(*opened)
        with any_size(), quiet_warnings(), Image.open(path) as image:
            fax = image.info.get("compression") in _FAX_BY_NAME
            check_image(path, image.size, 2 if image.mode == "1" else _BYTES, alone=not fax)
            step = max(1, max(image.size) // _KEPT_PX)
            image.draft("L", (image.width // step, image.height // step))  # a JPEG is decoded smaller
            return _made_smaller(image.size, [(0, np.asarray(image.convert("L")))])


def _made_smaller(size: tuple[int, int], strips: Strips) -> NDArray[np.bool_]:
    width, height = size
    step = -(-max(size) // _KEPT_PX)
    columns = np.arange(0, width, step)
    counted = np.zeros((-(-height // step), len(columns)), np.uint16 if step < 200 else np.uint32)
    for top, strip in strips:
        marked = strip > 0
        across = marked if step == 1 else np.add.reduceat(marked, columns, axis=1, dtype=counted.dtype)
        first = top // step
        edges = np.maximum(np.arange(first, -(-(top + len(strip)) // step)) * step - top, 0)
        counted[first : first + len(edges)] += np.add.reduceat(across, edges, axis=0, dtype=counted.dtype)
    heights, widths = (np.diff(np.append(np.arange(0, side, step), side)) for side in (height, width))
    mask = np.empty(counted.shape, np.bool_)
    for row, (n, of) in enumerate(zip(counted, heights, strict=True)):
        mask[row] = 2 * n.astype(np.int64) >= of * widths
    return mask


def _tiff_in_strips(path: Path) -> tuple[tuple[int, int], Strips] | None:
    """Return width and height of a TIFF's largest page of one or three colours, and its strips; None for others."""
    with path.open("rb") as file:
        if file.read(2) not in (b"II", b"MM"):
            return None
    with open_tiff(path) as file:
        page = max((page.aspage() for page in file.pages), key=lambda page: page.imagewidth * page.imagelength)
        if (
            page.compression in _FAX
            or page.planarconfig == 2
            or page.photometric not in (0, 1, 2, 6)
            or page.imagedepth > 1
        ):
            return None
        size = (page.imagewidth, page.imagelength)
        check_image(path, size, alone=page.compression in _PACKS_LITTLE)
        return size, _rows_of(path, page.index)


def _rows_of(path: Path, number: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield strips of whole rows; tiles side by side are put together first."""
    with open_tiff(path) as file:
        page = file.pages[number].aspage()
        height, width = page.imagelength, page.imagewidth
        colours = 3 if page.samplesperpixel >= 3 else 1  # what comes behind is transparency
        if page.is_memmappable:
            dtype: Any = np.dtype(page.dtype).newbyteorder(file.byteorder)
            for top, stored in _read_rows(path, page.dataoffsets[0], height, width * page.samplesperpixel, dtype):
                yield top, stored.reshape(len(stored), width, -1)[..., :colours].max(axis=2)
            return
        if page.bitspersample == 1 and page.compression == 1 and len(page.dataoffsets) == 1:
            for top, bits in _read_rows(path, page.dataoffsets[0], height, -(-width // 8), np.dtype(np.uint8)):
                yield top, np.unpackbits(bits, axis=1, count=width)
            return
        down = page.tilelength if page.is_tiled else page.rowsperstrip
        require(
            3 * min(down, height) * width * max(page.samplesperpixel, 1) * np.dtype(str(page.dtype)).itemsize,
            f"{path}: a strip of {width:,} × {min(down, height):,} px",
        )
        band, top = np.zeros((min(down, height), width), page.dtype), 0
        for values, at, held in page.segments():
            if at[2] != top:
                yield top, band[: height - top]
                band, top = np.zeros_like(band), at[2]
            if values is not None:
                part = values[0, : min(held[1], len(band)), : min(held[2], width - at[3]), :colours]
                band[: part.shape[0], at[3] : at[3] + part.shape[1]] = part.max(axis=2)
        yield top, band[: height - top]


def _read_rows(
    path: Path, offset: int, rows: int, values: int, dtype: np.dtype[Any]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield what lies in a file as it is, some rows of `values` at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        for top in range(0, rows, _ROWS):
            n = min(_ROWS, rows - top)
            read = np.fromfile(file, dtype, n * values)
            if len(read) < n * values:
                raise ValueError(f"it ends after {top:,} of {rows:,} rows")
            yield top, read.reshape(n, values)


def mask_from_geojson(path: Path, slide: Slide) -> tuple[NDArray[np.bool_], list[str]]:
    """Draw the polygons of a GeoJSON file as QuPath exports it: level-0 px from its `origin`; holes stay empty.

    Return the mask, and what to say of classes. Objects of the class Ignore*, and of others that say of a place that it
    is no tissue, are taken off the rest. Outlines that cross themselves are put right; what lies outside the slide is
    cut off. Raises SlideError where there is none.
    """
    with fault_of(SlideError, f"the tissue outline {path} is not GeoJSON"):
        outlines = outlines_in(path, "tissue outline")
        wanted = [outline for name, outline in outlines if not _is_ignored(name)]
        if not wanted:
            named = listed(sorted({name for name, _ in outlines}))
            raise SlideError(f"the tissue outline {path} holds nothing but what is to be ignored (classes {named})")
        ignored = [outline for name, outline in outlines if _is_ignored(name)]
        mask = _drawn(wanted, slide)
        if ignored:
            mask &= ~_drawn(ignored, slide)
        return mask, _class_words(Counter(name for name, _ in outlines))


def outlines_in(path: Path, what: str, *, by_name: bool = False) -> list[tuple[str, BaseGeometry]]:
    """Return the polygons of a GeoJSON file, as QuPath exports them, each with the name of its class; of an object
    without a class its own with `by_name`.

    Raises SlideError, which calls the file `what` it is, where it is none or holds none.
    """
    with fault_of(SlideError, f"the {what} {path} is not GeoJSON"):
        require(_PER_BYTE * path.stat().st_size, f"{path}, as JSON,")
        text = read_text(path, SlideError) if path.suffix != ".gz" else gzip.decompress(path.read_bytes()).decode()
        outlines = list(_polygons(path, json.loads(text), what, by_name))
    if not outlines:
        raise SlideError(f"the {what} {path} holds no Polygon or MultiPolygon")
    return outlines


_NO_TISSUE = ("ignore", "exclude", "excluded", "background", "glass", "artefact", "artefacts", "artifact", "artifacts")


def _is_ignored(name: str) -> bool:
    """Whether a class says of a place that it is no tissue; QuPath marks its own with a star: Ignore*."""
    return name.strip().rstrip("*").strip().lower() in _NO_TISSUE


def _class_words(counts: Mapping[str, int]) -> list[str]:
    """Say which classes were taken for tissue and which were taken off; nothing where objects have no class."""
    if set(counts) <= {"", "Tissue"}:
        return []

    def words(ignored: bool) -> str:
        return listed(
            (f"{name or 'no class'} ({n:,})" for name, n in counts.items() if _is_ignored(name) is ignored), 8
        )

    taken = f"the outlines' classes are taken for tissue: {words(False)}"
    return [taken + (f"; taken off: {words(True)}" if words(True) else "")]


def _drawn(outlines: Sequence[BaseGeometry], slide: Slide) -> NDArray[np.bool_]:
    """Return where any of the outlines is, h × w, the whole slide."""
    (width, height), (left, upper) = slide.size, slide.origin
    scale = min(1.0, MASK_PX / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    mask = np.zeros((size[1], size[0]), np.bool_)
    whole = box(-left, -upper, width - left, height - upper)
    every = np.array(outlines, dtype=object)
    beyond = ~within(every, whole)
    every[beyond] = intersection(every[beyond], whole)  # each for itself: to unite them takes ten times as long
    for part in get_parts(get_parts(every)):  # what was put right may be a collection of several
        if not isinstance(part, Polygon) or part.is_empty:
            continue
        rings = [(np.asarray(ring.coords)[:, :2] + (left, upper)) * scale for ring in (part.exterior, *part.interiors)]
        # A canvas as large as the part: a hundred thousand cells would each take one as large as the slide.
        x0, y0 = np.maximum(np.floor(rings[0].min(axis=0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(rings[0].max(axis=0)).astype(int) + 2, size)
        canvas = Image.new("1", (int(x1 - x0), int(y1 - y0)), 0)
        draw = ImageDraw.Draw(canvas)
        for number, corners in enumerate(rings):
            draw.polygon([(float(x - x0), float(y - y0)) for x, y in corners], fill=0 if number else 1)
        mask[y0:y1, x0:x1] |= np.asarray(canvas)
    return mask


def _polygons(path: Path, node: Any, what: str, by_name: bool, name: str = "") -> Iterator[tuple[str, BaseGeometry]]:
    """Yield the polygons of a file, each with the name of its class."""
    if isinstance(node, list):  # as QuPath exports features without a collection around them
        for each in node:
            yield from _polygons(path, each, what, by_name, name)
        return
    kind = node.get("type")
    if kind == "FeatureCollection":
        yield from _polygons(path, node["features"], what, by_name)
    elif kind == "Feature":
        properties = node.get("properties")
        called = _class_of(properties) or (str((properties or {}).get("name") or "") if by_name else "")
        yield from _polygons(path, node["geometry"] or {}, what, by_name, called)
    elif kind == "GeometryCollection":
        yield from _polygons(path, node["geometries"], what, by_name, name)
    elif kind in ("Polygon", "MultiPolygon"):
        for rings in [node["coordinates"]] if kind == "Polygon" else node["coordinates"]:
            few = min(map(len, rings), default=0)
            if few < 3:
                raise SlideError(f"the {what} {path} has a polygon of {few} points")
            closed = [[*ring, ring[0]] for ring in rings]
            yield name, make_valid(Polygon(closed[0], closed[1:]))


def _class_of(properties: Any) -> str:
    """Return the class of a QuPath object, as its versions write it; "" where it has none."""
    found = properties.get("classification") if isinstance(properties, Mapping) else None
    if isinstance(found, Mapping):
        names = found.get("names")
        found = found.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    return found if isinstance(found, str) else ""


def geojson_of(mask: NDArray[np.bool_], slide: Slide) -> dict[str, Any]:
    """Return the outlines of a slide's tissue (h × w, the whole slide) as QuPath imports them: an annotation a piece.

    Corners are level-0 px from the slide's `origin`, on the edges of the mask's px.
    """
    height, width = mask.shape
    across, down = slide.size[0] / width, slide.size[1] / height
    left, upper = slide.origin
    properties = {"objectType": "annotation", "classification": {"name": "Tissue", "color": [16, 122, 62]}}
    features = []
    for rings in _rings_of(mask):
        corners = [((ring * (across, down)) - (left, upper)).round(1).tolist() for ring in rings]
        geometry = {"type": "Polygon", "coordinates": corners}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def tissue_files(mask: NDArray[np.bool_], slide: Slide) -> dict[str, bytes]:
    """Return a slide's tissue as files: a picture for whoever looks at it, and outlines for QuPath."""
    shown = Image.fromarray(mask)
    if max(mask.shape) > MASK_PX:
        scale = MASK_PX / max(mask.shape)
        shown = shown.resize(tuple(max(1, round(side * scale)) for side in shown.size), Image.Resampling.NEAREST)
    picture = io.BytesIO()
    shown.save(picture, "PNG")
    outlines = geojson_of(np.asarray(shown), slide)
    return {"tissue.png": picture.getvalue(), "tissue.geojson": json.dumps(outlines, separators=(",", ":")).encode()}


def _rings_of(mask: NDArray[np.bool_]) -> list[list[NDArray[np.float64]]]:
    """Return, for each piece of a mask, its outline and those of its holes, in px of the mask (x, y)."""
    rings = [ring[:, ::-1] - 0.5 for ring in find_contours(np.pad(mask, 1).astype(np.float32), 0.5)]
    areas = np.array([Polygon(ring).area for ring in rings])
    if not rings:
        return []
    inside = STRtree([Polygon(ring) for ring in rings])
    around: list[list[int]] = [[] for _ in rings]
    for ring, other in zip(*inside.query(points([ring[0] for ring in rings]), predicate="within"), strict=True):
        around[ring].append(other)
    # An even number of rings around a ring makes it an outline, an odd one a hole in the smallest of them.
    pieces = {number: [ring] for number, ring in enumerate(rings) if len(around[number]) % 2 == 0}
    for number, ring in enumerate(rings):
        if number not in pieces:
            pieces[min(around[number], key=lambda each: areas[each])].append(ring)
    return list(pieces.values())
