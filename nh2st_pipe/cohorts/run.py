"""A cohort as files: a table, means by patient, and a page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import polars as pl

from nh2st_pipe.cohorts.table import Cohort, cohort_of
from nh2st_pipe.core.errors import RunError
from nh2st_pipe.core.h5ad import write_h5ad
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.evaluation.statistics import many
from nh2st_pipe.reporting.sets import read_gmt

__all__ = ["write_cohort"]

_FILES = ("cohort.csv", "patients.h5ad", "cohort.html")
_OF_REGIONS = ("regions.csv", "regions.h5ad")
_MANY = 0.1  # of a slide's tiles that are unlike, from which on it is marked
_FAR = 2.0  # deviations apart, from which on it is
_WORDS = {
    "slide_id": "Slide",
    "patient": "Patient",
    "tiles": "Tiles",
    "unlike_share": "Unlike",
    "train_percentile": "Median percentile",
    "apart": "Apart",
    "region": "Region",
    "in_sample": "Known to the head",
}

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1300px; padding: 20px 16px; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 28px 0 0; }
p { margin: 4px 0; max-width: 100ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid #8886; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left; }
.far { font-weight: 700; color: #b45309; }
"""


def write_cohort(
    predictions: str | Path,
    out: str | Path,
    gene_sets: str | Path | None = None,
    regions: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Cohort, list[Path]]:
    """Put predictions together, and write cohort.csv, patients.h5ad and cohort.html into the folder `out`; with
    `regions` (a folder of SLIDE.geojson) regions.csv and regions.h5ad too.

    Raises UsageError where the gene sets cannot be read, or regions are of no slide; RunError as `cohort_of`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out takes a folder")
    sets = () if gene_sets is None else read_gmt(gene_sets)
    cohort = cohort_of(predictions, sets, regions, progress=progress)
    paths = [out / name for name in _FILES]
    with written_whole(paths[0]) as part:
        cohort.frame().write_csv(part)
    write_h5ad(cohort.by_patient(), paths[1])
    with written_whole(paths[2]) as part:
        part.write_text(_page(cohort), encoding="utf-8")
    if cohort.regions:
        more = [out / name for name in _OF_REGIONS]
        with written_whole(more[0]) as part:
            cohort.regions_frame().write_csv(part)
        write_h5ad(cohort.by_region(), more[1])
        paths += more
    return cohort, paths


def _page(cohort: Cohort) -> str:
    tiles = sum(slide.tiles for slide in cohort.slides)
    patients = len({slide.patient for slide in cohort.slides})
    said = [
        f"{many(len(cohort.slides), 'slide')} of {many(patients, 'patient')}, {tiles:,} tiles; "
        f"{len(cohort.trusted):,} of {len(cohort.genes):,} genes are trusted. "
        f"Values: {cohort.unit or 'without a unit'}.",
        "Unlike: the share of a slide's tiles that are unlike the training tiles; they are left out of all that "
        "follows. Apart: the median over trusted genes of how many deviations (MAD) the slide's mean lies from the "
        "cohort's median. Sets: the mean deviation of their genes. Slides that are most unlike stand first; marked are "
        f"those with {_MANY:.0%} of unlike tiles and more, or {_FAR:g} deviations apart.",
        *cohort.notices,
        *(f"{slide} could not be read: {cause}" for slide, cause in cohort.failed.items()),
    ]
    regions = f"<h2>Regions</h2>\n{_table(cohort.regions_frame())}" if cohort.regions else ""
    words = "".join(f"<p>{html.escape(line)}</p>\n" for line in said)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>Cohort</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Cohort</h1>\n{words}"
        f"{_table(cohort.frame())}{regions}</body>\n</html>\n"
    )


def _table(frame: pl.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(_WORDS.get(name, name))}</th>" for name in frame.columns)
    rows = "".join(
        f"<tr>{''.join(_cell(name, row[name]) for name in frame.columns)}</tr>\n" for row in frame.to_dicts()
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "<td>–</td>"
    if not isinstance(value, float):
        return f"<td>{html.escape(f'{value:,}' if isinstance(value, int) else str(value))}</td>"
    far = (name == "unlike_share" and value >= _MANY) or (name == "apart" and value >= _FAR)
    words = (
        f"{value:.1%}" if name == "unlike_share" else f"{value:.1f}" if name == "train_percentile" else f"{value:.2f}"
    )
    return f'<td class="far">{words}</td>' if far else f"<td>{words.replace('-', '−')}</td>"
