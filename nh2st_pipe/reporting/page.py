"""One self-contained page on a run, or on predictions: figures, genes, maps, training, provenance.

The page is template/page.html with its style, its scripts and the data put in, the data as JSON; the scripts build
everything else, so that no text of the data is ever read as HTML. It needs no network and opens from disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nh2st_pipe.core.errors import RunError, fault_of, listed, nearest
from nh2st_pipe.core.whole import written_whole
from nh2st_pipe.reporting.asked import Asked
from nh2st_pipe.reporting.judged import judged_run
from nh2st_pipe.reporting.maps import SlideMaps, packed
from nh2st_pipe.reporting.predicted import predicted_folder
from nh2st_pipe.reporting.sets import PREFIX, GeneSet
from nh2st_pipe.reporting.tables import GeneTable
from nh2st_pipe.runs.folder import find_run

__all__ = ["report"]

_TEMPLATE = Path(__file__).with_name("template")
_SCRIPTS = ("base.js", "genes.js", "maps.js", "charts.js", "page.js")


def report(
    of: str | Path,
    out: str | Path | None = None,
    *,
    only: Sequence[Path] | None = None,
    gene_sets: str | Path | None = None,
    regions: str | Path | None = None,
    slides: str | Path | None = None,
    domains: int | None = None,
    embeddings: str | Path | None = None,
) -> Path:
    """Write report.html for a run folder or a folder of predictions, at `out` or inside it, and return its path.

    A run that was interrupted is reported on with what there is of it, which the page says, into NAME.report.html
    beside it. Predictions are those of `nh2st-pipe predict`, with or without truth; with `only`, some of its files.
    `gene_sets` are a GMT file, each set of which gets maps of its own; `regions` outlines as QuPath exports them: a
    folder with SLIDE.geojson for each slide that has some, or a file for the only slide; `slides` a manifest, of whose
    images the page shows crops; `domains` how many domains each slide is parted into, by what was measured, predicted,
    and by the `embeddings` of a store.

    Raises UsageError where the gene sets or regions cannot be read, RunError where `of` is neither, a file in it is not
    as it was written, or `out` is a folder.
    """
    of, asked = Path(of), Asked.of(gene_sets, regions, slides, domains, embeddings)
    run = find_run(of)
    if run is None and not any(of.glob("*.h5ad")):
        near = nearest(of.name, [path.name for path in of.parent.glob("*")] if of.parent.is_dir() else [])
        raise RunError(
            f"{of} is not a finished run (there is no metrics.json in it), nor a folder of predictions{near}"
        )
    folder, default = (of, of / "report.html") if run is None else (run.path, run.report)
    target = Path(out) if out is not None else default
    if target.is_dir():
        raise RunError(f"{target} is a folder; give the report a file name, for example {target / 'report.html'}")
    changed = "(was a file in it changed, or written by another version?)"
    with fault_of(RunError, f"{folder} cannot be reported on {changed}"):
        if run is None:
            genes, shown, data = predicted_folder(folder, only or sorted(folder.glob("*.h5ad")), asked)
        else:
            genes, shown, data = judged_run(run, asked)
        data["warnings"] += _sets_left_out(asked.sets, shown)
        text = _json({**data, **_maps(genes, shown)})
    with written_whole(target) as part:
        part.write_text(_page(text), encoding="utf-8")
    return target


def _maps(genes: GeneTable, slides: list[SlideMaps]) -> dict[str, Any]:
    """Return the slides for the page and the gene table, which gets the genes that only the slides know of."""
    for slide in slides:
        genes.add(slide.names)
    sets = {genes.place[name]: words for slide in slides for name, words in slide.sets.items()}
    return {"slides": packed(slides, genes.place), "genes": genes.record(), "sets": sets}


def _sets_left_out(sets: Sequence[GeneSet], slides: Sequence[SlideMaps]) -> list[str]:
    """Name the gene sets of which there is no map."""
    left = [each.name for each in sets if not any(f"{PREFIX}{each.name}" in slide.sets for slide in slides)]
    return [f"No map of {listed(left)}: fewer than two of its genes are predicted and not untrusted."] if left else []


def _json(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # "<" is what could end the script element (</script>) or change how it is read (<!--).
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _page(data: str) -> str:
    page = (_TEMPLATE / "page.html").read_text(encoding="utf-8")
    scripts = "\n".join((_TEMPLATE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (_TEMPLATE / "page.css").read_text(encoding="utf-8")
    head, _, rest = page.partition("@@STYLE@@")
    body, _, rest = rest.partition("@@DATA@@")
    middle, _, tail = rest.partition("@@SCRIPT@@")
    return "".join((head, style, body, data, middle, scripts, tail))
