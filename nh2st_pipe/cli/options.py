"""Options that several commands share, and how a result is shown."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Device",
    "Json",
    "MinTissue",
    "Overlap",
    "Precision",
    "TilePx",
    "TrustRemoteCode",
    "Weights",
    "Workers",
    "exit_for",
    "say_failed",
    "show",
]


class Precision(StrEnum):
    """Arithmetic of the encoder."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")]

Weights = Annotated[
    Path | None, typer.Option(help="Weight file of the encoder, in place of the one on the Hugging Face hub.")
]


Workers = Annotated[
    int | None,
    typer.Option(help="Threads that read tiles; default: 2 beside a CPU's encoder, else all cores but one.", min=1),
]

TilePx = Annotated[
    float | None,
    typer.Option(help="Side of a tile, px of the slide's full resolution, in place of --tile-um.", min=0),
]

Overlap = Annotated[
    float | None,
    typer.Option(
        help="Share of a tile's side that the next shows too, on slides without spots; default: a store's own, else 0."
    ),
]

MinTissue = Annotated[
    float | None,
    typer.Option(
        help="Share of a tile that has to be tissue, on slides without spots; default: a store's own, else 0.5."
    ),
]


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let an encoder's repository run the code it brings along; read it first."
    ),
]


def show(values: dict[str, Any], as_json: bool, say: Any) -> None:
    """Print `values` as JSON, or let `say` print them in words."""
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))
    else:
        say()


def say_failed(failed: dict[str, str]) -> None:
    """Print each slide that failed, with its cause, on stderr."""
    for slide_id, cause in failed.items():
        typer.echo(f"failed: {slide_id}: {cause}", err=True)


def exit_for(failed: dict[str, str]) -> None:
    """Exit with status 1 where something failed."""
    if failed:
        raise typer.Exit(1)
