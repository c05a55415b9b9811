"""Execute the tutorials, each in an empty folder, and keep their outputs: `make tutorials`."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for a notebook, on two cores
_COLOURS, _BAR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), "━"


def clean(notebook: Any, name: str, folder: str) -> None:
    """Leave what a reader is to see: no folders of this machine, times, bars, or warnings of libraries."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{number}"
        cell.metadata.pop("execution", None)
        if "outputs" not in cell:
            continue
        kept: list[Any] = []
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                continue
            if output["output_type"] == "stream" and kept and kept[-1]["output_type"] == "stream":
                kept[-1]["text"] += output["text"]
            else:
                kept.append(output)
        for output in kept:
            if output["output_type"] == "stream":
                lines = _COLOURS.sub("", output["text"].replace(f"{folder}/", "")).split("\n")
                output["text"] = "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines if _BAR not in line)
        cell["outputs"] = kept


def main(names: list[str]) -> int:
    """Run those that are named, or all; return the exit status."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    failed = 0
    for file in sorted(HERE.glob("*.ipynb")):
        if names and file.stem not in names:
            continue
        notebook = nbformat.read(file, as_version=4)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
            try:
                client.execute()
            except CellExecutionError as error:
                print(f"{file.name}: {error}", file=sys.stderr)
                failed = 1
                continue
            clean(notebook, file.stem, folder)
        nbformat.write(notebook, file)
        seconds = time.perf_counter() - began
        print(f"{file.name}: {seconds:.0f} s")
        if seconds > SECONDS:
            print(f"{file.name} took longer than {SECONDS} s", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
