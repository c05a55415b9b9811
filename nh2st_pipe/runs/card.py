"""The model card: what a trained head is, what it reached and on what, as the hub and people read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from nh2st_pipe.evaluation.reference import REFERENCE
from nh2st_pipe.evaluation.statistics import headline, many
from nh2st_pipe.runs.about import About
from nh2st_pipe.store.format import Contract, tile_words

__all__ = ["model_card"]

_TAGS = ["pathology", "histology", "spatial-transcriptomics", "gene-expression"]
_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "BSD-3-Clause": "bsd-3-clause",
    "GPL-3.0": "gpl-3.0",
    "CC-BY-NC-ND-4.0": "cc-by-nc-nd-4.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CC-BY-4.0": "cc-by-4.0",
}
"""What the hub calls licences."""


def _front(about: About, dataset: str | None) -> str:
    """Return what the hub reads of a card: the encoder's licence binds whatever is made of its embeddings."""
    encoder = about.store.encoder
    said: dict[str, Any] = {"library_name": "nh2st-pipe", "pipeline_tag": "image-feature-extraction", "tags": _TAGS}
    licence, repo = str(encoder.get("licence") or "unknown"), encoder.get("repo")
    if licence in _LICENCES:
        said["license"] = _LICENCES[licence]
    else:
        said |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", licence.lower())}
        said |= {"license_link": f"https://huggingface.co/{repo}"} if repo else {}
    if repo:
        said |= {"base_model": str(repo), "base_model_relation": "adapter"}
    if dataset is not None:
        said["datasets"] = [dataset]
    return f"---\n{yaml.safe_dump(said, sort_keys=False)}---\n"


def model_card(metrics: Mapping[str, Any], about: About, dataset: str | None = None) -> str:
    """Return the card of the head of a run, as Markdown, from its metrics.json and what the model says of itself.

    `dataset` is the data it was trained on, where the hub knows it.
    """
    store, model = about.store, metrics["model"]
    n = len({slide.patient for slide in about.trained_on})
    patients = f"{n} patient{'s' * (n != 1)}"
    lines = [
        _front(about, dataset),
        f"# {about.recipe}: spatial gene expression from H&E",
        f"Predicts {model['genes']:,} genes a spot, as {about.unit}.",
        "",
        f"- Embeddings: {store.identity['name']} ({store.dim} values, {_weights(store)}), "
        f"tiles of {tile_words(store.tile)}, {metrics['views']} of its views. Others are refused.",
        f"- Trained on {len(about.trained_on)} slides of {patients}, {metrics['n_spots']:,} spots.",
        f"- Licence of the encoder: {about.store.encoder.get('licence') or 'unknown'}. It may bind what is made of "
        "its embeddings, as this head is.",
        f"- Made by nh2st-pipe {about.version}.",
        "",
        *_figures(metrics, about),
        *(f"- Note: {note}" for note in metrics["notes"]),
        "",
        "`nh2st-pipe predict --model hf-hub:OWNER/NAME --slides manifest.csv`; in Python "
        '`nh2st_pipe.load_model("hf-hub:OWNER/NAME")`. A prediction says how well each gene was predicted out of fold '
        '(`var["cv_pcc"]` with its interval, `var["half_pcc"]`, `var["trusted"]`), how far values were off on what was '
        'held out (`layers["low"]`, `layers["high"]`), and how far its tiles are from those trained on '
        f'(`obs["train_percentile"]`). For the last, `{REFERENCE}` holds embeddings of some training tiles; without it '
        "the head predicts all the same.",
    ]
    return "\n".join(lines) + "\n"


def _coverage(about: About) -> list[str]:
    """Say what intervals reached on what was held out."""
    known = {level: each for level, each in about.intervals.levels.items() if each.coverage is not None}
    if not known:
        return []
    said = (
        f"{float(level):.0%} cover {each.coverage:.0%}{'' if each.promised else ' (not promised)'}"
        for level, each in known.items()
    )
    return [
        f"Intervals, by leaving out one of {many(about.intervals.groups, about.intervals.by)}: {', '.join(said)}.",
        "",
    ]


def _weights(store: Contract) -> str:
    if store.imported is not None:
        return f"{store.made_by()}, weights unknown"
    return f"weights SHA-256 `{store.weights.sha256[:12]}…`"


def _figures(metrics: Mapping[str, Any], about: About) -> list[str]:
    if metrics["summary"] is None:
        return ["Nothing was judged: it was trained without folds, and how good it is on a new slide is not known.", ""]
    heads = {metrics["head"]: metrics, **metrics["baselines"]}
    columns = {"pcc": 3, "pcc_top50_train": 3, "pcc_top50": 3, "pcc_top50_null": 3, "mse": 4}
    rows = [
        f"| {name} | {' | '.join(_cell(head['summary'], key, digits) for key, digits in columns.items())} |"
        for name, head in heads.items()
    ]
    summary = metrics["summary"]
    by, held = metrics["folds_by"].partition(":")[0], many(summary["n_units"], summary["unit"])
    said = [
        f"On {held} held out ({len(metrics['folds'])} folds by {by}; {metrics['protocol']}: "
        f"{metrics['protocol_in_words']}), {headline(summary)}:",
        "",
        "| head | PCC | best 50 | top 50 | its null | MSE |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "PCC: by slide, slides of a patient first. Best 50: genes picked on training slides. Top 50: picked by these "
        "very PCCs, as in papers; its null: what that reads on maps without any tie.",
        "",
    ]
    if about.trusted:
        trusted = sum(about.trusted.values())
        said += [f"{trusted:,} of {many(len(about.trusted), 'gene')} are trusted: {about.trusted_in_words}.", ""]
    return [*said, *_coverage(about)]


def _cell(summary: dict[str, Any], key: str, digits: int) -> str:
    value = summary.get(key)
    return "–" if value is None else f"{value:.{digits}f}"
