"""Regions: the spots that lie in what a person outlined, and their means."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import RunError, SlideError, UsageError
from nh2st_pipe.reporting.page import report
from tests.exporting.made import genes_of, prediction
from tests.reporting.test_sets import data_of


def feature(
    x0: float, y0: float, x1: float, y1: float, *, name: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    properties: dict[str, Any] = {"objectType": "annotation"}
    properties |= {} if name is None else {"name": name}
    properties |= {} if kind is None else {"classification": {"name": kind, "color": [1, 2, 3]}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def write(path: Path, *features: dict[str, Any]) -> Path:
    data = json.dumps({"type": "FeatureCollection", "features": list(features)}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# Spots lie 50 px apart from (100, 100) on, four by four; QuPath counts from (60, 30).
LEFT = feature(20, 50, 70, 260, kind="Tumor")  # the first column and a bit: x 80 to 130
RIGHT = feature(170, 50, 200, 100, kind="Tumor")  # the last of the first row: x 230 to 260, y 80 to 130
NAMED = feature(70, 50, 120, 100, name="Field 1")  # the second of the first row


@pytest.mark.parametrize("ending", ["geojson", "geojson.gz", "json"])
def test_means_are_of_the_spots_within_counted_from_where_qupath_counts(tmp_path: Path, ending: str) -> None:
    (tmp_path / "p").mkdir()
    values = prediction(tmp_path / "p/s1.h5ad", origin=(60, 30), genes=genes_of(3), nan=((0, 1),))
    regions = write(tmp_path / f"r/s1.{ending}", LEFT, RIGHT, NAMED)
    for given in (regions, regions.parent):
        (slide,) = (data := data_of(report(tmp_path / "p", regions=given)))["slides"]
        assert [(region["name"], region["n"]) for region in slide["regions"]] == [("Tumor", 5), ("Field 1", 1)]
        names = [data["genes"]["names"][gene] for gene in slide["genes"]]
        tumor = values[[0, 4, 8, 12, 3]]
        of, first = slide["region_means"], slide["region_means"]["predicted"][0]
        for place, name in enumerate(names):
            column = int(name[1:])
            assert first["mean"][place] == pytest.approx(np.nanmean(tumor[:, column]), rel=1e-4)
            assert first["low"][place] == pytest.approx(np.nanpercentile(tumor[:, column], 25), rel=1e-4)
            assert first["high"][place] == pytest.approx(np.nanpercentile(tumor[:, column], 75), rel=1e-4)
            assert of["target"][0]["mean"][place] == pytest.approx(np.nanmean(tumor[:, column]) + 1, rel=1e-4)
            assert of["predicted"][1]["mean"][place] == pytest.approx(values[1, column], rel=1e-4)
        # Its corners, in px of the page, lie around its spots.
        ring = np.array(slide["regions"][1]["rings"][0])
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        inside = [i for i in range(16) if x0 < slide["x"][i] < x1 and y0 < slide["y"][i] < y1]
        assert inside == [1]


def test_what_is_wrong_with_regions_is_said(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad")
    prediction(tmp_path / "p/s2.h5ad", slide_id="s2")
    wrong: list[tuple[Path, type[Exception], str]] = [
        (write(tmp_path / "one.geojson", LEFT), UsageError, "is one file, and there are 2 slides"),
        (tmp_path / "nothing", UsageError, "there are no regions at"),
        (write(tmp_path / "a/s3.geojson", LEFT).parent, UsageError, "regions of no slide here: s3.geojson"),
        (write(tmp_path / "b/readme.txt", LEFT).parent, UsageError, "holds no file SLIDE.geojson"),
        (
            write(tmp_path / "c/s2.geojson", feature(5000, 5000, 5100, 5100)).parent,
            RunError,
            "are they of another slide?",
        ),
        (write(tmp_path / "d/s2.geojson").parent, SlideError, "the regions .* holds no Polygon"),
    ]
    (tmp_path / "e").mkdir()
    (tmp_path / "e/s2.geojson").write_text("{nonsense")
    wrong.append((tmp_path / "e", SlideError, "the regions .* is not GeoJSON"))
    for given, kind, words in wrong:
        with pytest.raises(kind, match=words):
            report(tmp_path / "p", regions=given)


def test_a_slide_without_regions_has_none(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in ("s1", "s2"):
        prediction(tmp_path / f"p/{name}.h5ad", slide_id=name, origin=(60, 30))
    regions = write(tmp_path / "r/s2.geojson", LEFT).parent
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p"), "--regions", str(regions)])
    assert done.exit_code == 0, done.output
    first, second = data_of(tmp_path / "p/report.html")["slides"]
    assert (first["regions"], first["region_means"]) == ([], {})
    assert re.match("Tumor", second["regions"][0]["name"])
