"""Images that a person names for sections which do not have them beside them: a folder, a pattern, or a table.

--images /scans                     the file in it that is named after the section
--images '/scans/*/HE_{}.ndpi'      the section's name in place of {}
--images '/scans/**/*.svs'          the file among them that is named after the section
--images images.csv                 two columns: section (or slide_id, sample, id) and image (or slide, path)
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nh2st_pipe.core.errors import ExpressionError, UsageError, listed, nearest
from nh2st_pipe.core.tables import read_table
from nh2st_pipe.slides.kinds import IMAGES, is_image, refused_kind

__all__ = ["images_from"]

_SECTION = ("section", "slide_id", "sample", "sample_id", "id", "name")
_IMAGE = ("image", "slide", "path", "file", "filename")
_TABLES = (".csv", ".tsv", ".txt")


def images_from(where: str) -> Callable[[str], Path | None]:
    """Return what finds a section's image by the section's name; that raises ExpressionError where there is not one.

    Raises UsageError where `where` is no folder, no table, and a pattern that no image has.
    """
    place = Path(where).expanduser()
    if place.is_file() and place.suffix.lower() in _TABLES:
        return _by_table(place)
    if "{}" in where:
        return lambda name: _only(
            [Path(each) for each in _matches(where.replace("{}", glob.escape(name)))], name, where
        )
    if place.is_dir():
        images = [path for path in sorted(place.rglob("*")) if _may_be(path, place)]
    else:
        images = [Path(each) for each in _matches(where) if is_image(Path(each))]
    if not images:
        of = f"among {', '.join(IMAGES)}"
        raise UsageError(
            f"--images {where}: there is no image there ({of}); a folder, a pattern in quotation marks, or a CSV of "
            "section,image is expected"
        )
    return lambda name: _only(_named(images, name), name, where)


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 -- of any folder


def _may_be(path: Path, place: Path) -> bool:
    inside = path.relative_to(place).parts
    return is_image(path) and not any(part.startswith(".") or part.lower().endswith(".zarr") for part in inside[:-1])


def _words(name: str) -> str:
    """Return a name without what people change about it: case, blanks, hyphens, underscores."""
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def _named(images: Sequence[Path], name: str) -> list[Path]:
    """Return the images that are named after a section: exactly, else with more behind or before its name, else by
    their folder; each time whole words alone, so that S1 does not stand for S10.
    """
    wanted = _words(name)
    stems = [(path, _words(path.name.split(".")[0]), _words(path.parent.name)) for path in images]
    exact = [path for path, stem, _ in stems if stem == wanted]
    within = [path for path, stem, _ in stems if f" {wanted} " in f" {stem} "]
    return exact or within or [path for path, _, folder in stems if folder == wanted]


def _only(found: Sequence[Path], name: str, where: str) -> Path:
    if len(found) == 1:
        other = refused_kind(found[0])
        if other is not None:
            raise ExpressionError(other)
        return found[0]
    if found:
        shown = listed((path.name for path in found), 3)
        raise ExpressionError(
            f"--images {where}: {len(found)} images are named after section {name} ({shown}); one is expected"
        )
    raise ExpressionError(f"--images {where}: no image is named after section {name}")


def _by_table(path: Path) -> Callable[[str], Path | None]:
    table = read_table(path, UsageError, "\t" if path.suffix.lower() == ".tsv" else ",")
    columns = {column.lower(): column for column in table.columns}
    section, image = (next((columns[name] for name in names if name in columns), None) for names in (_SECTION, _IMAGE))
    if section is None or image is None:
        raise UsageError(f"{path} lacks the columns section and image (it has {', '.join(table.columns)})")
    found = dict[str, Path]()
    for number, cells in table.rows:
        place = Path(cells[image]).expanduser()
        place = place if place.is_absolute() else path.parent / place
        if cells[section] in found:
            raise UsageError(f"{path}, row {number}: section {cells[section]} stands there twice")
        if not cells[image] or not place.exists():
            raise UsageError(f"{path}, row {number}: there is no image at {place}")
        found[cells[section]] = place

    def of(name: str) -> Path:
        if name not in found:
            raise ExpressionError(f"{path} has no row for section {name}{nearest(name, found)}")
        return found[name]

    return of
