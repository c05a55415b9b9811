"""Exporting: which predictions, to which targets, each file or folder whole or not there at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pandas as pd

from nh2st_pipe.core.errors import RunError, SlideError, UsageError, listed, nearest, written_to
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.panels import genes_named
from nh2st_pipe.exporting.view import PredictionView, read_view
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.folder import find_run

__all__ = [
    "TARGETS",
    "ExportOptions",
    "ExportSummary",
    "Target",
    "export",
    "file_name",
    "predictions_in",
    "targets_named",
]


@dataclass(frozen=True)
class ExportOptions:
    """What may be asked of an export."""

    genes: tuple[str, ...] | None = None
    """Names; None: those that are trusted, or with `everything` all, as many as a target takes."""
    everything: bool = False
    """Genes that are not trusted and tiles that are unlike the training tiles too, marked."""
    slides: Mapping[str, Path] = field(default_factory=dict)
    """Where slides are, by a manifest, for targets that show the slide itself."""
    ngff: str = "0.5"
    """Of ome-zarr: 0.5, or 0.4 for older viewers."""
    base_url: str = "http://localhost:8080"
    """Of vitessce: where the folder will be served."""


@dataclass(frozen=True)
class Target:
    """A program or format that predictions go to."""

    name: str
    about: str
    module: str
    """Whose `write(view, path, options)` writes one slide, and returns notices."""
    suffix: str
    """Behind the slide's name."""
    most_genes: int | None = None
    package: str | None = None
    """What has to be installed for it."""
    beside: tuple[str, ...] = ()
    """Suffixes of further files that it may write."""

    def paths(self, out: Path, slide_id: str) -> tuple[Path, ...]:
        """Return where a slide's file goes, and all that may lie beside it."""
        return tuple(out / f"{file_name(slide_id)}{suffix}" for suffix in (self.suffix, *self.beside))

    def writer(self) -> Callable[[PredictionView, Path, ExportOptions], list[str]]:
        """Return what writes one slide. Raises UsageError where a package for it is missing."""
        try:
            write: Callable[[PredictionView, Path, ExportOptions], list[str]] = import_module(
                f"nh2st_pipe.exporting.{self.module}"
            ).write
        except ImportError as error:
            if self.package is None:
                raise
            raise UsageError(
                f"--to {self.name} needs {self.package} ({error}): pip install 'nh2st-pipe[{self.package}]'"
            ) from error
        return write


TARGETS = {
    target.name: target
    for target in (
        Target(
            "qupath",
            "tiles with measurements, for File → Import objects",
            "qupath",
            ".geojson.gz",
            200,
            beside=(".tsv.gz", ".groovy"),
        ),
        Target(
            "spatialdata",
            "squares, a table and the thumbnail; opens in napari-spatialdata and LazySlide",
            "spatial_data",
            ".sdata.zarr",
            package="spatialdata",
        ),
        Target("ome-tiff", "heat maps, a channel a gene", "ome_tiff", ".ome.tif", beside=(".ome.json",)),
        Target("ome-zarr", "heat maps, a channel a gene", "ome_zarr", ".ome.zarr"),
        Target("vitessce", "a page's configuration, and what it shows", "vitessce", ".vitessce"),
        Target(
            "tissuumaps",
            "a project with the values on the slide",
            "tissuumaps",
            ".tmap",
            beside=(".tissuumaps.h5ad", ".tissuumaps.png"),
        ),
        Target("csv", "tables: a row a tile, and a row a value", "tables", ".csv", beside=(".long.csv",)),
        Target("anndata", "the chosen genes and tiles as .h5ad", "h5ad", ".h5ad"),
    )
}


@dataclass
class ExportSummary:
    """What was exported."""

    out: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    """By slide."""
    failed: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    """What has to be known, and of which slides."""

    @property
    def notices(self) -> list[str]:
        """What has to be known, in lines."""
        return [f"{listed(slides)}: {words}" for words, slides in self.said.items()]


def targets_named(names: str | Iterable[str]) -> list[Target]:
    """Return targets by name, several with commas between them. Raises UsageError for one that there is not."""
    asked = names.split(",") if isinstance(names, str) else list(names)
    found = list[Target]()
    for name in dict.fromkeys(each.strip() for each in asked if each.strip()):
        if name not in TARGETS:
            raise UsageError(f"there is no target {name}{nearest(name, TARGETS)}; there are {', '.join(TARGETS)}")
        found.append(TARGETS[name])
    if not found:
        raise UsageError(f"--to names no target; there are {', '.join(TARGETS)}")
    return found


def export(
    predictions: str | Path,
    to: str | Iterable[str],
    out: str | Path,
    *,
    genes: str | Path | Sequence[str] | None = None,
    everything: bool = False,
    force: bool = False,
    slides: str | Path | None = None,
    ngff: str = "0.5",
    base_url: str = "http://localhost:8080",
    only: Sequence[Path] | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write predictions as other programs read them: a file or folder for each slide and target, in the folder `out`.

    `predictions` are a file, a folder of them (with `only`, some of its files), or a run, whose verdicts on genes they
    get. `genes` are names or a file with one a line; left out, those that are trusted. Genes that are not trusted and
    tiles that are unlike the training tiles go along with `everything` alone, and are marked then.

    Raises UsageError, before anything is written, where a target, a package or a gene is not there, RunError where
    there are no predictions, or what would be written is there already, without `force`. Faults of single slides are
    in the summary.
    """
    targets, out = targets_named(to), Path(out)
    writers = {target.name: target.writer() for target in targets}
    if ngff not in ("0.4", "0.5"):
        raise UsageError(f"--ngff takes 0.4 or 0.5, not {ngff}")
    where = dict[str, Path]()
    if slides is not None:
        from nh2st_pipe.tiles.manifest import slide_files

        where = slide_files(slides)
    options = ExportOptions(None if genes is None else genes_named(genes), everything, where, ngff, base_url)
    files, verdicts = predictions_in(Path(predictions))
    files = list(only) if only is not None else files
    summary, views = ExportSummary(out), dict[str, PredictionView]()
    for file in files:
        try:
            view = read_view(file, verdicts)
        except RunError as error:
            summary.failed[file.stem] = str(error)
            continue
        if view.slide_id in views:
            raise RunError(f"{views[view.slide_id].file} and {file} are both of slide {view.slide_id}; leave one out")
        views[view.slide_id] = view
    _check_free(targets, out, views, force)
    chosen = dict[str, list[PredictionView]]()
    for slide_id, view in views.items():
        try:
            chosen[slide_id] = [
                view.chosen(options.genes, most=target.most_genes, everything=everything) for target in targets
            ]
        except RunError as error:
            summary.failed[slide_id] = str(error)
    progress = progress or Progress()
    progress.start("exporting", len(chosen), "slides")
    for number, (slide_id, views_of) in enumerate(chosen.items()):
        progress.advance(number, len(chosen), slide_id)
        try:
            for target, view in zip(targets, views_of, strict=True):
                paths = target.paths(out, slide_id)
                said = _write(view, writers[target.name], paths, options)
                summary.files.setdefault(slide_id, []).extend(path for path in paths if path.exists())
                for words in (*view.left_out, *said):
                    if slide_id not in (of := summary.said.setdefault(words, [])):
                        of.append(slide_id)
        except (SlideError, RunError, ValueError) as error:
            summary.failed[slide_id] = str(error)
    return summary


def _write(
    view: PredictionView,
    write: Callable[[PredictionView, Path, ExportOptions], list[str]],
    paths: Sequence[Path],
    options: ExportOptions,
) -> list[str]:
    with written_to(paths[0].parent):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        before = {path: path.stat().st_ino for path in paths if path.exists()}
        said = write(view, paths[0], options)
        for path, number in before.items():  # of an earlier export, as the table of one that had more tiles
            if path.exists() and path.stat().st_ino == number:
                remove(path)
        return said


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_name(slide_id: str) -> str:
    """Return a slide's name as part of a file's, on any system."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", slide_id) or "_"


def _check_free(targets: Sequence[Target], out: Path, views: dict[str, PredictionView], force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out takes a folder")
    taken, read = dict[str, str](), {view.file.resolve(): view.file for view in views.values()}
    for slide_id in views:
        for target in targets:
            paths = target.paths(out, slide_id)
            other = taken.setdefault(str(paths[0]).casefold(), slide_id)  # some disks tell no a from an A
            if other != slide_id:
                raise RunError(f"slides {other} and {slide_id} would both be written to {paths[0]}")
            for path in paths:
                if path.resolve() in read:
                    raise RunError(f"{path} is a prediction that is to be exported: give another folder as --out")
                if path.exists() and not force:
                    raise RunError(f"{path} is there already; --force writes it anew")


def predictions_in(of: Path) -> tuple[list[Path], pd.DataFrame | None]:
    """Return the files that `of` is, or holds, and the verdicts of its run. Raises RunError where there are none."""
    if of.is_file():
        return [of], None
    run = find_run(of)
    folder = of if run is None else run.path / "predictions"
    files = sorted(folder.glob("*.h5ad")) if folder.is_dir() else []
    if not files:
        near = nearest(of.name, [path.name for path in of.parent.glob("*")] if of.parent.is_dir() else [])
        raise RunError(f"{of} is neither a prediction, nor a folder of them, nor a run{near}")
    about = None if run is None else About.of_run(run.path)
    if about is None:
        return files, None
    columns = {name: getattr(about, name) for name in ("trusted", "cv_pcc", "cv_low", "half_pcc")}
    return files, pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items() if values})
