"""QuPath: tiles with measurements, as GeoJSON; for very many of them a table and a script that makes them of it.

Coordinates are level-0 px counted from where QuPath's image begins. The rules of the format are QuPath's own
(`QuPathTypeAdapters.java`, `GsonTools.java`): a classification has a name and a colour, an id is a UUID, a value that
is no number is the text "NaN". It reads a whole file into memory, at about ten times its size.
"""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.exporting.run import ExportOptions
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["CLASSES", "MOST_TILES", "measurements", "write"]

MOST_TILES = 100_000
"""From which on there is a table and a script."""

CLASSES = {"Predicted": (98, 130, 190), "Unlike training tiles": (200, 120, 40)}
"""Names and colours: without a colour the import fails."""

_SCANNED_PART = (".mrxs", ".scn", ".bif", ".dcm")
"""Of images of which QuPath may show the part that was scanned, and count from its corner."""

_UNLIKE = "unlike %"
# of our ids, which are the same whenever a slide is exported
_SPACE = uuid.UUID("7d6f1f0e-6d0c-4c5f-9a63-2f0e5b7a9c11")
_LEVEL = 1  # of gzip: numbers shrink little more for three times as long


def write(view: PredictionView, path: Path, options: ExportOptions) -> list[str]:
    """Write one slide to `path`, or beside it where it has very many tiles. Returns notices."""
    said = list[str]()
    if view.image.origin is None and Path(view.image.name).suffix.lower() in _SCANNED_PART:
        said.append(
            "its store does not say where QuPath counts from, so coordinates count from the image's corner, which may "
            "be another place: embed the slide anew, predict and export again"
        )
    if len(view) >= MOST_TILES:
        table, script = (path.with_name(path.name.replace(".geojson.gz", end)) for end in (".tsv.gz", ".groovy"))
        _write_table(view, table)
        with written_whole(script) as part:
            part.write_text(_SCRIPT.replace("@@TABLE@@", json.dumps(table.name)), encoding="utf-8")
        said.append(f"{len(view):,} tiles are a table, and {script.name} makes them of it in QuPath's script editor")
        return said
    with written_whole(path) as part, gzip.open(part, "wt", _LEVEL, encoding="utf-8", newline="") as file:
        file.write('{"type":"FeatureCollection","features":[\n')
        for number, feature in enumerate(_features(view)):
            file.write(f"{',' * (number > 0)}{feature}\n")
        file.write("]}\n")
    return said


def measurements(view: PredictionView) -> list[str]:
    """Return the names of a tile's measurements: each gene, its interval's ends, and how unlike the tile is."""
    names = [
        name
        for gene in view.marked_genes
        for name in (gene, *(f"{gene} {end}" for end in ("low", "high") if end in view.layers))
    ]
    return [*names, _UNLIKE] if view.percentile is not None else names


def _features(view: PredictionView) -> Iterator[str]:
    """Yield the tiles as GeoJSON, a line each."""
    names = [json.dumps(name) for name in measurements(view)]
    plain, careful = (",".join(f"{name.replace('%', '%%')}:{kind}" for name in names) for kind in ("%.5g", "%s"))
    classes = [json.dumps({"name": name, "color": colour}, separators=(",", ":")) for name, colour in CLASSES.items()]
    about = {key: str(view.about[key]) for key in ("recipe", "encoder", "in_sample") if key in view.about}
    metadata = json.dumps({"unit": view.unit, **about})
    corners = _corners(view)
    for part, values in _values(view):
        rows = values.tolist()
        bad = np.logical_not(np.isfinite(values).all(axis=1)).tolist()
        tiles = zip(view.barcodes[part], corners[part].tolist(), view.unlike[part].tolist(), bad, rows, strict=True)
        for barcode, (x0, y0, x1, y1), unlike, numberless, row in tiles:
            said = careful % tuple(map(_number, row)) if numberless else plain % tuple(row)
            ring = f"[[{x0},{y0}],[{x1},{y0}],[{x1},{y1}],[{x0},{y1}],[{x0},{y0}]]"
            known_as = uuid.uuid5(_SPACE, f"{view.image.fingerprint}/{view.slide_id}/{barcode}")
            yield (
                f'{{"type":"Feature","id":"{known_as}","geometry":{{"type":"Polygon","coordinates":[{ring}]}},'
                f'"properties":{{"objectType":"tile","name":{json.dumps(barcode)},"classification":{classes[unlike]},'
                f'"isLocked":true,"measurements":{{{said}}},"metadata":{metadata}}}}}'
            )


def _number(value: float) -> str:
    return f"{value:.5g}" if np.isfinite(value) else '"NaN"'


def _corners(view: PredictionView) -> NDArray[np.int64]:
    """Return left, top, right and bottom of the tiles, n × 4, as QuPath counts."""
    centre = view.xy - np.array(view.image.origin or (0, 0))
    half = view.image.tile_px / 2
    corners: NDArray[np.int64] = np.rint(np.column_stack((centre - half, centre + half))).astype(np.int64)
    return corners


def _values(view: PredictionView) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield the measurements of a part of the tiles, in the order of `measurements`."""
    ends = [end for end in ("low", "high") if end in view.layers]
    for part in view.parts():
        layers = [view.values(layer, tiles=part) for layer in ("", *ends)]
        values = np.stack(layers, axis=2).reshape(len(layers[0]), -1).astype(np.float64)
        percentile = view.percentile
        yield part, values if percentile is None else np.column_stack((values, percentile[part]))


def _write_table(view: PredictionView, path: Path) -> None:
    names = [_one_field(name) for name in ("name", "class", "x", "y", "width", "height", *measurements(view))]
    row_of = "\t".join(("%s\t%s\t%d\t%d\t%d\t%d", *["%.5g"] * (len(names) - 6)))
    corners, classes = _corners(view), list(CLASSES)
    with written_whole(path) as part_of, gzip.open(part_of, "wt", _LEVEL, encoding="utf-8", newline="") as file:
        file.write(f"# {_one_field(view.label)}\n" + "\t".join(names) + "\n")
        for part, values in _values(view):
            tiles = zip(
                view.barcodes[part], view.unlike[part].tolist(), corners[part].tolist(), values.tolist(), strict=True
            )
            for barcode, unlike, (x0, y0, x1, y1), row in tiles:
                place = (_one_field(barcode), classes[unlike], x0, y0, x1 - x0, y1 - y0)
                file.write(row_of % (*place, *row) + "\n")


def _one_field(text: str) -> str:
    return " ".join(text.split())


_SCRIPT = """\
// Makes tiles with measurements of a table that nh2st-pipe wrote, in a tenth of the memory that GeoJSON takes.
// Open the slide in QuPath, then run this in Automate > Script editor. If the table lies elsewhere, say where.
def table = @@TABLE@@

import java.util.zip.GZIPInputStream
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def file = new File(table)
if (!file.exists())
    file = qupath.fx.dialogs.FileChoosers.promptForFile("Where is " + table + "?")
if (file == null)
    return

def colours = [@@CLASSES@@]
def tiles = []
new GZIPInputStream(new FileInputStream(file)).withReader("UTF-8") { reader ->
    reader.readLine()  // what the values are
    def names = reader.readLine().split("\\t")
    def line
    while ((line = reader.readLine()) != null) {
        def cells = line.split("\\t")
        def roi = ROIs.createRectangleROI(cells[2] as double, cells[3] as double, cells[4] as double,
            cells[5] as double, ImagePlane.getDefaultPlane())
        def tile = PathObjects.createTileObject(roi, PathClass.fromString(cells[1], colours[cells[1]]), null)
        tile.setName(cells[0])
        tile.setLocked(true)
        for (int i = 6; i < names.length; i++)
            tile.measurementList.put(names[i], cells[i] == "nan" ? Double.NaN : cells[i] as double)
        tiles << tile
    }
}
addObjects(tiles)
fireHierarchyUpdate()
println tiles.size() + " tiles"
""".replace(
    "@@CLASSES@@",
    ", ".join(f'"{name}": getColorRGB({", ".join(map(str, colour))})' for name, colour in CLASSES.items()),
)
