"""A trained head on new slides: one `.h5ad` of predicted expression per slide."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import nh2st_pipe
from nh2st_pipe.core.cluster import Pool, reached, resources_in_words, seen_everywhere
from nh2st_pipe.core.devices import pick_head_device
from nh2st_pipe.core.errors import (
    OF_ONE_SLIDE,
    RunError,
    StoreError,
    UsageError,
    listed,
)
from nh2st_pipe.core.h5ad import read_h5ad
from nh2st_pipe.core.location import Location
from nh2st_pipe.core.progress import Progress
from nh2st_pipe.data.panels import genes_named
from nh2st_pipe.data.pitch import overlap_for
from nh2st_pipe.evaluation.intervals import LEVELS, Intervals, Level
from nh2st_pipe.evaluation.reference import REFERENCE
from nh2st_pipe.evaluation.statistics import many
from nh2st_pipe.heads.base import HeadModel
from nh2st_pipe.heads.carry import CARRY
from nh2st_pipe.predicting.slide import Job, Predictor, Said, predictor_there
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.checksums import sha256
from nh2st_pipe.runs.model import HUB, load_model, load_reference, model_files
from nh2st_pipe.runs.shown import predictions_html
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.read import Store, open_store

if TYPE_CHECKING:
    import anndata
    from matplotlib.figure import Figure

    from nh2st_pipe.tiles.manifest import SlideRow

__all__ = ["PredictSummary", "predict"]

# The files of a model that decide what it predicts, and what is said of it; the weights first.
_DECIDING = ("model.safetensors", "config.json", CARRY, REFERENCE)


@dataclass
class PredictSummary:
    """What one call of `predict` wrote."""

    out: Path
    files: dict[str, Path] = field(default_factory=dict)
    """slide_id → .h5ad."""
    failed: dict[str, str] = field(default_factory=dict)
    """Slides passed over, each with its cause."""
    notices: list[str] = field(default_factory=list)
    """What should be known of single predictions: trained on, or unlike what was trained on."""

    def __getitem__(self, slide_id: str) -> anndata.AnnData:
        """Return a slide's prediction. Raises KeyError where there is none."""
        return read_h5ad(self.files[slide_id], RunError)

    def maps(self, gene: str, *, of: str = "predicted", columns: int = 4) -> Figure:
        """Return a matplotlib figure of a gene over every slide that was predicted, on one scale; see `pl.map`."""
        from nh2st_pipe.pl import maps

        return maps([(name, self.files[name]) for name in self.files], gene, of=of, columns=columns)

    def _repr_html_(self) -> str:
        """Show in a notebook what was written, and what should be known of it."""
        return predictions_html(self.files, self.failed, self.notices)

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "out": str(self.out),
            "files": {slide_id: str(path) for slide_id, path in self.files.items()},
            "failed": self.failed,
            "notices": self.notices,
        }


def predict(
    model: str | Path,
    *,
    embeddings: str | Path | None = None,
    slides: str | Path | None = None,
    out: str | Path = "predictions",
    weights: str | Path | None = None,
    device: str = "auto",
    level: float = 0.9,
    genes: str | Path | Sequence[str] | None = None,
    query: str | Path | Sequence[str] | None = None,
    trusted_only: bool = False,
    float16: bool = False,
    any_mpp: bool = False,
    engine: str = "local",
    address: str | None = None,
    actors: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PredictSummary:
    """Predict expression with the head `model` (a run, its model/, or "hf-hub:owner/name").

    Exactly one of `embeddings` (a store) and `slides` (a manifest) is given. Slides are embedded first, with the
    model's own encoder and tile size, on a grid of which the pitch of the training spots is a multiple, into
    <out>/store.zarr (see `data.pitch`); `weights` is then the encoder's file where the hub's is
    not wanted. Each <out>/<slide_id>.h5ad holds X n × G, the mean over the store's views, layers["target"] where the
    store has expression, layers["low"] and layers["high"] (an interval at `level`, 0.5, 0.8, 0.9 or 0.95, from what was
    off on patients or slides held out; see `evaluation.intervals`), var["cv_pcc"], var["cv_low"], var["cv_high"] and
    var["half_pcc"] (each gene's PCC out of fold with its 95 % interval, and between halves of the training tissue),
    var["trusted"] and var["judged"] (the verdict on a gene, see `evaluation.trust`, and whether there is one),
    var["cut"], varm["factors"] and uns["carry"] where predictions are weighed (see `write_prediction`),
    layers["spread"] (standard deviation over the head's members, where it has several), obs["train_distance"],
    obs["train_percentile"] and obs["unlike"] (how far a tile lies from the training tiles, see `evaluation.reference`),
    obs["likeness"] where the head can tell how like a spot is to the training spots, and in uns["nh2st_pipe"] what the
    numbers are and whether the head was trained on this slide. With `genes` (a file with one a line, names with commas
    between them, or a sequence) those alone are written, with `trusted_only` of them those that are trusted; `float16`
    keeps values in half precision. `query` are genes, given in the same ways, that are predicted beside them though
    the head was not trained on them, from their vectors (nh2st-query); var["seen"] tells which were, and `unseen`
    what was reached on genes left out. Of more than 20 million values var["half_width"] tells the intervals' ends.
    A slide whose tiles would show another size of tissue fails, unless `any_mpp`. What is in `out` already, made by the
    same model from the same tiles with the same options, is kept. With the `engine` "ray" slides are tasks of the Ray
    cluster at `address` (RAY_ADDRESS, or one made here), with as many `actors`; store and `out` are where all nodes see
    them.
    `trust_remote_code` lets an encoder's repository run its code.

    Raises RunError where the model cannot be read, StoreError where the store is another encoder's, UsageError for a
    gene that the model does not know or has no vector of, or none of which is trusted.
    """
    if level not in LEVELS:
        raise UsageError(f"--level takes {', '.join(f'{each:g}' for each in LEVELS)}, not {level:g}")
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine takes local or ray, not {engine}")
    if engine == "local" and (address is not None or actors is not None):
        raise UsageError("--address and --actors are of --engine ray")
    if (embeddings is None) == (slides is None):
        raise UsageError("give either --embeddings (a store) or --slides (a manifest)")
    files = model_files(model)  # fetched once, where it is on the hub
    head = load_model(model, files)
    about = About.of(head.about, model)
    asked: tuple[str, ...] = ()
    trained = len(head.genes)
    if query is not None:
        if trusted_only:
            raise UsageError("--query asks for genes that the head never saw, none of which is trusted; leave one out")
        head, asked = _asking(head, genes_named(query), model)
    columns = _columns(genes, head.genes[:trained], model)
    if query is not None:  # those that it was trained on too, where --genes leaves them out
        wanted_too = _columns(genes_named(query), head.genes, model)
        columns = np.concatenate([columns, wanted_too[~np.isin(wanted_too, columns)]])
    if trusted_only:
        columns = _trusted(columns, head.genes, about, model)
    reference = load_reference(files)
    progress = progress or Progress()
    summary = PredictSummary(Path(out))
    summary.out.mkdir(parents=True, exist_ok=True)
    wanted: list[str] | None = None
    if slides is not None:
        from nh2st_pipe.tiles.manifest import read_manifest

        rows = read_manifest(slides)  # its faults come before any work
        wanted = [row.slide_id for row in rows]
        summary.failed.update({} if any_mpp else _refused(rows, about))
        only = [name for name in wanted if name not in summary.failed]
        if not only:
            return summary
        embeddings = _embed(
            slides, only, about.store, about.pitch, summary, weights, device, trust_remote_code, progress
        )
    assert embeddings is not None
    store = open_store(embeddings)
    differences = about.store.differences(store.contract, one_store=False)
    if differences:
        raise StoreError(f"{model} was trained on embeddings of {'; '.join(differences)}, as in {store.location}")
    if about.store.across(store.contract):
        summary.notices.append(
            f"the head was trained on {about.store.made_by()}, and these are {store.contract.made_by()}: encoder, "
            "pooling, input and tile size agree; whether the weights are the same cannot be told"
        )
    names = store.slides() if wanted is None else [name for name in wanted if name not in summary.failed]
    if wanted is None:
        _not_whole(store, summary)
    if not names and not summary.failed:
        raise StoreError(f"{store.location} holds no complete slide; run nh2st-pipe embed first")

    sums = tuple(sha256(files / name) for name in _DECIDING if (files / name).is_file())
    fixed = {
        "recipe": about.recipe,
        "trained_on": about.seen().model_dump_json(),
        "out_of_fold": False,
        "unit": about.unit or about.targets.unit(),
        "encoder": about.store.identity["name"],
        "weights_sha256": about.store.weights.sha256,
        "version": nh2st_pipe.__version__,
        **({"model": str(model)} if str(model).startswith(HUB) else {"model_sha256": sums[0]}),
    }
    if asked:
        fixed["unseen"] = words = _about_unseen(len(head.genes) - trained, head.about)
        summary.notices.append(words)
    if about.trusted_in_words:
        fixed["trusted"] = about.trusted_in_words
    reach, at_the_end = about.intervals.levels.get(f"{level:g}"), list[str]()
    if reach is not None:
        words = _about_intervals(about.intervals, level, reach)
        fixed |= {"interval_level": level, "intervals": words}
        if len(columns) and about.trusted:
            trusted = sum(about.trusted.get(head.genes[i], False) for i in columns)
            words += f"; {trusted:,} of {len(columns):,} genes are trusted: {about.trusted_in_words}"
        at_the_end.append(words)
    where = str(store.location) if engine == "local" else seen_everywhere(store.location, "--embeddings")
    job = Job(
        model=model if str(model).startswith(HUB) else Path(model).absolute(),
        store=where,
        out=summary.out.absolute(),
        fixed=fixed,
        sums=sums,
        columns=columns,
        half_width=None if reach is None else reach.half_width,
        any_mpp=any_mpp,
        half=float16,
        query=asked,
    )
    progress.start("predicting", len(names), "slides")
    done = dict[str, Said]()

    def ended(number: int, said: Said) -> None:
        done[names[number]] = said
        if said.failed:
            progress.say(f"{names[number]} passed over; the end says why")

    with reached(device, address, actors) if engine == "ray" else nullcontext() as cluster:
        if cluster is None:
            here = Predictor(job, pick_head_device(device), (head, reference, store))
            for number, name in enumerate(names):
                progress.advance(number, len(names), name)
                ended(number, here.do(name))
        else:
            make = partial(predictor_there, job, cluster.kind, cluster.share(len(names))[1]["num_cpus"])

            def tell(over: int, words: str) -> None:
                progress.advance(over, len(names), words)

            with Pool(cluster, make, len(names), "fewer --actors take less") as pool:
                progress.say(f"Ray: {pool.number} actors with {resources_in_words(pool.resources)} each")
                lost = pool.do(names, ended, tell, progress.say)
            done |= {names[number]: Said(failed=why) for number, why in lost.items()}
    kept = sum(said.kept for said in done.values())
    if kept:
        progress.say(f"{kept:,} slides were predicted before, by the same model of the same tiles, and are kept")
    for name in names:
        said = done[name]
        if said.failed:
            summary.failed[name] = said.failed
            continue
        path = summary.out / f"{name}.h5ad"
        if not path.is_file():
            raise RunError(
                f"{path} was written on another node and is not here: on Ray, --out takes a folder that all nodes share"
            )
        summary.files[name] = path
        summary.notices += [f"{name}: {words}" for words in said.notices.values()]
    strange = [name for name in summary.files if "unlike" in done[name].notices]
    summary.notices += at_the_end
    if strange and about.trusted:
        summary.notices.append(
            f"the verdicts on genes were found on slides like the training slides: they say little of {listed(strange)}"
        )
    return summary


def _not_whole(store: Store, summary: PredictSummary) -> None:
    """Name the slides of a store that are there and cannot be predicted: their files would be missed."""
    for name in store.damaged():
        summary.failed[name] = f"damaged; nh2st-pipe verify {store.location} says what to do"
    for name in store.incomplete():
        summary.failed[name] = "unfinished; nh2st-pipe embed with its manifest goes on with it"


def _columns(wanted: str | Path | Sequence[str] | None, known: list[str], model: str | Path) -> NDArray[np.int64]:
    """Return the places of the genes to be written among those of the model."""
    if wanted is None:
        return np.arange(len(known))
    names = genes_named(wanted)
    place = {gene: i for i, gene in enumerate(known)}
    strangers = [name for name in names if name not in place]
    if strangers:
        near = "; ".join(f"{name}{_nearest(name, known)}" for name in strangers[:5])
        more = f" and {len(strangers) - 5:,} more" if len(strangers) > 5 else ""
        raise UsageError(f"{model} does not predict {near}{more}")
    return np.array([place[name] for name in names], dtype=np.int64)


def _asking(head: HeadModel, genes: tuple[str, ...], model: str | Path) -> tuple[HeadModel, tuple[str, ...]]:
    """Return a head that predicts `genes` too, and which of them it was not trained on."""
    known = set(head.genes)
    try:
        found = head.asking(genes)
    except UsageError as error:
        raise UsageError(f"{model}: {error}") from error
    return found, tuple(gene for gene in genes if gene not in known)


def _about_unseen(genes: int, about: dict[str, Any]) -> str:
    """Say in words what genes are that the head was not trained on."""
    reached = (about.get("queries") or {}).get("reached") or (
        "what such predictions reach was not measured (train with --leave-genes-out 5)"
    )
    return f"{many(genes, 'gene')} predicted from vectors alone, and not trusted: {reached}"


def _trusted(columns: NDArray[np.int64], known: list[str], about: About, model: str | Path) -> NDArray[np.int64]:
    """Return those of some genes' places whose genes are trusted."""
    kept = [i for i in columns.tolist() if about.trusted.get(known[i])]
    if not kept:
        judged = sum(known[i] in about.trusted for i in columns.tolist())
        raise UsageError(
            f"{model} trusts none of {len(columns):,} genes ({judged:,} were judged): with --trusted-only there is "
            "nothing to write"
        )
    return np.array(kept, dtype=np.int64)


def _nearest(name: str, known: list[str]) -> str:
    """Return the known genes whose names are most like one that is not known, in brackets."""
    by_key = {gene.casefold(): gene for gene in known}
    near = difflib.get_close_matches(name.casefold(), list(by_key), n=3, cutoff=0.6)
    return f" (nearest: {', '.join(by_key[key] for key in near)})" if near else " (none is called nearly so)"


def _about_intervals(of: Intervals, level: float, reach: Level) -> str:
    """Say in words what intervals were made from, and what they reached."""
    reached = (
        "" if reach.coverage is None else f", and cover {reach.coverage:.0%} of a new one's values by leaving one out"
    )
    units = many(of.groups, of.by)
    words = f"intervals at {level:.0%} are from {units} held out{reached}"
    return words if reach.promised else f"{words}; {level:.0%} is not promised ({units})"


def _refused(rows: Sequence[SlideRow], about: About) -> dict[str, str]:
    """Return which slides the model cannot predict for their resolution, and why: before any of them is encoded."""
    from nh2st_pipe.slides import open_slide
    from nh2st_pipe.tiles.layout import resolution_of

    if about.refusal("", None) is None:
        return {}  # of any resolution
    refused = dict[str, str]()
    for row in rows:
        mpp = row.mpp
        if mpp is None:
            try:
                slide = open_slide(row.slide)
                try:
                    mpp = resolution_of(row, slide).mpp
                finally:
                    slide.close()
            except OF_ONE_SLIDE:
                continue  # embed names it
        words = about.refusal(row.slide_id, mpp)
        if words is not None:
            refused[row.slide_id] = words
    return refused


def _embed(
    slides: str | Path,
    only: Collection[str],
    trained_on: Contract,
    pitch: float | None,
    summary: PredictSummary,
    weights: str | Path | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Path:
    """Embed a manifest as the model needs it, and return the store."""
    from nh2st_pipe.embedding.plan import recipe_of
    from nh2st_pipe.embedding.run import embed
    from nh2st_pipe.encoders.weights import find_weights, known_weights

    path, recipe = summary.out / "store.zarr", recipe_of(trained_on)
    given = None if weights is None else Path(weights)
    there = None if Location(path).is_empty() else open_store(path).contract
    overlap = overlap_for(pitch) if there is None else None
    found = known_weights(recipe, given, there) or find_weights(recipe, given, trust_remote_code)
    if trained_on.imported is None and found.sha256 != trained_on.weights.sha256:
        raise StoreError(
            f"the model was trained on embeddings of {trained_on.weights.source} (SHA-256 "
            f"{trained_on.weights.sha256[:12]}…), and {found.source} is another file ({found.sha256[:12]}…); give that "
            "one with --weights"
        )
    done = embed(
        slides,
        encoder=recipe,
        weights=weights,
        store=path,
        views=trained_on.views,
        overlap=overlap,
        tile_um=trained_on.tile["size_um"],
        tile_px=trained_on.tile["size_level0_px"],
        precision=trained_on.precision,
        only=only,
        stain_shift="off",  # these slides are predicted, not trained on
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    summary.failed.update(done.failed)
    return path
