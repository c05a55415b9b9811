"""Predict spatial gene expression from H&E slides in two stages: embed once, train in seconds.

The verbs of the command line are here in Python. Importing this module reads no file and imports neither
torch nor zarr; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nh2st_pipe.benching.run import bench
    from nh2st_pipe.checking.run import check
    from nh2st_pipe.embedding.run import embed
    from nh2st_pipe.evaluation.compare import compare
    from nh2st_pipe.evaluation.judge import evaluate
    from nh2st_pipe.exporting.run import export
    from nh2st_pipe.heads.nh2st import NH2ST
    from nh2st_pipe.importing.run import import_features
    from nh2st_pipe.prediction import predict
    from nh2st_pipe.reporting.page import report
    from nh2st_pipe.runs.model import load_model
    from nh2st_pipe.runs.push import push
    from nh2st_pipe.searching.search import Query, search
    from nh2st_pipe.store.arrays import SlideArrays, write_store
    from nh2st_pipe.store.read import open_store
    from nh2st_pipe.training.repeat import repeat
    from nh2st_pipe.training.run import train
    from nh2st_pipe.training.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "NH2ST",
    "Query",
    "SlideArrays",
    "__version__",
    "bench",
    "check",
    "compare",
    "embed",
    "evaluate",
    "export",
    "import_features",
    "load_model",
    "open_store",
    "predict",
    "push",
    "repeat",
    "report",
    "search",
    "sweep",
    "train",
    "write_store",
]

_HOME = {
    "NH2ST": "nh2st_pipe.heads.nh2st",
    "Query": "nh2st_pipe.searching.search",
    "SlideArrays": "nh2st_pipe.store.arrays",
    "bench": "nh2st_pipe.benching.run",
    "check": "nh2st_pipe.checking.run",
    "compare": "nh2st_pipe.evaluation.compare",
    "embed": "nh2st_pipe.embedding.run",
    "evaluate": "nh2st_pipe.evaluation.judge",
    "export": "nh2st_pipe.exporting.run",
    "import_features": "nh2st_pipe.importing.run",
    "load_model": "nh2st_pipe.runs.model",
    "open_store": "nh2st_pipe.store.read",
    "predict": "nh2st_pipe.prediction",
    "push": "nh2st_pipe.runs.push",
    "repeat": "nh2st_pipe.training.repeat",
    "report": "nh2st_pipe.reporting.page",
    "search": "nh2st_pipe.searching.search",
    "sweep": "nh2st_pipe.training.sweep",
    "train": "nh2st_pipe.training.run",
    "write_store": "nh2st_pipe.store.arrays",
}


def __getattr__(name: str) -> Any:
    if name == "pl":
        return importlib.import_module("nh2st_pipe.pl")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "pl"])
