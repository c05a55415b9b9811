"""What this machine can do, line by line, and what to do about what it cannot: asked before the first slide.

Nothing is changed but a folder that is made for the self-test, and deleted. Each part is asked for itself: where one
cannot be told, the others are told all the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import nh2st_pipe
from nh2st_pipe.core.errors import NH2STError, StoreError, listed

__all__ = ["WIDE", "Finding", "examine", "said_of", "worst"]

_PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "huggingface_hub": "huggingface_hub",
    "zarr": "zarr",
    "anndata": "anndata",
    "faiss": "faiss-gpu",
    "polars": "polars",
    "openslide": "openslide-python",
    "tifffile": "tifffile",
}
"""What is imported → what it is installed as."""
_OPTIONAL = {
    "ray": "--engine ray",
    "transformers": "some encoders",
    "spatialdata": "SpatialData",
    "pylibCZIrw": "CZI slides",
}
_LEAST_DISK, _LITTLE_DISK = 1e9, 20e9  # bytes
_LEAST_SHARED = 1e9
_LITTLE_MEMORY = 8e9
_ASKED_AT_ONCE = 8
_DRIVER_SECONDS = 20.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "note", "fault"]
    """`note`: it works, with less; `fault`: something will fail."""
    said: str
    todo: str = ""
    """What to do about it; empty where there is nothing to do."""

    def to_json(self) -> dict[str, str]:
        """Return it as JSON values."""
        return asdict(self)


def examine(folder: str | Path = ".", *, hub: bool = True, self_test: bool = True) -> Iterator[Finding]:
    """Look at the machine, and yield what is found, one thing after another.

    `folder` is where stores and runs are to lie: its disk and locks are looked at, and the self-test is done there.
    `hub` asks the Hugging Face hub which gated encoders its token opens, `self_test` embeds and trains on generated
    slides.
    """
    place = Path(folder).absolute()
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": _packages,
        "GPU": _gpu,
        "slides": _slides,
        "machine": _machine,
        "disk": lambda: _disk(place),
        "locks": lambda: _locks(place),
    }
    if hub:
        parts["hub"] = _hub
    if self_test:
        parts["self-test"] = lambda: _self_test(place)
    for what, look in parts.items():
        try:
            yield from look()
        except Exception as error:  # whatever it is, the other parts are told
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Finding(
                what, "fault", f"could not be told: {reason}", "nh2st-pipe --debug doctor shows where it arose"
            )


def _packages() -> Iterator[Finding]:
    said, lacking, broken = list[str](), list[str](), list[str]()
    for name, package in _PACKAGES.items():
        try:
            importlib.import_module(name)
            said.append(f"{name} {_version(package, name)}")
        except ModuleNotFoundError as error:
            (lacking if error.name == name else broken).append(f"{name}: no module {error.name}")
        except Exception as error:  # a library that does not load
            broken.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    own = f"nh2st-pipe {nh2st_pipe.__version__}, Python {platform.python_version()}"
    if lacking or broken:
        todo = "install it again into an environment of its own: pip install -c constraints.txt ."
        yield Finding("packages", "fault", f"{own}; cannot be imported: {listed([*lacking, *broken], 9)}", todo)
    else:
        yield Finding("packages", "ok", f"{own}, {', '.join(said)}")
    without = [f"{name} ({use})" for name, use in _OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if without:
        yield Finding("optional packages", "ok", f"not installed: {', '.join(without)}")


def _version(package: str, module: str) -> str:
    for name in (package, package.replace("-gpu", "-cpu"), module):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _gpu() -> Iterator[Finding]:
    import torch

    there = _gpus_of_the_driver()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            said = f"{of.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, torch for CUDA {torch.version.cuda}"
            built = torch.cuda.get_arch_list()
            if built and not _runs_on(f"sm_{of.major}{of.minor}", built):
                todo = "install a torch that is built for it: pytorch.org/get-started tells which"
                yield Finding(f"GPU {number}", "fault", f"{said}: not built for its sm_{of.major}{of.minor}", todo)
            elif free < 0.2 * total:
                todo = "nvidia-smi says who has it; --device cuda:1 takes another"
                yield Finding(f"GPU {number}", "note", f"{said}: others have most of it", todo)
            else:
                yield Finding(f"GPU {number}", "ok", said)
    elif there and torch.version.cuda is None:
        todo = "install the build for CUDA: pytorch.org/get-started tells the command"
        yield Finding(
            "GPU", "fault", f"{there}, which torch {torch.__version__} cannot see: it is built for CPUs", todo
        )
    elif there:
        todo = "update the driver, or install a torch for the CUDA that it has (nvidia-smi); see CUDA_VISIBLE_DEVICES"
        said = f"{there}, which torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use"
        yield Finding("GPU", "fault", said, todo)
    elif torch.mps.is_available():
        yield Finding("GPU", "ok", "Apple's, for encoding")
    else:
        todo = "encode small encoders here, and large ones where a GPU is; heads train on CPUs in seconds to minutes"
        yield Finding("GPU", "note", "none that torch can use: encoding runs on the CPU", todo)


def _gpus_of_the_driver() -> str:
    """Return what NVIDIA's driver says is there; empty where it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return f"{lines[0].replace(', ', ' (driver ')})" if lines else ""


def _runs_on(own: str, built: list[str]) -> bool:
    """Whether code for these runs on one: of the same major number, or made anew by the driver from `compute_`."""
    major = own[3:-1]
    return any(each.startswith("compute_") or each[3:-1] == major for each in built)


def _slides() -> Iterator[Finding]:
    import openslide

    yield Finding("slides", "ok", f"OpenSlide {openslide.__library_version__}: SVS, NDPI, MRXS, DICOM and others")


def _machine() -> Iterator[Finding]:
    from nh2st_pipe.core.machine import cores, memory

    said = f"{cores()} processors, {memory() / 1e9:.0f} GB of memory free"
    if memory() < _LITTLE_MEMORY:
        yield Finding("machine", "note", said, "train --max-memory keeps embeddings and counts on the disk")
    else:
        yield Finding("machine", "ok", said)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < _LEAST_SHARED
        todo = (
            "processes share tiles there: a container takes --shm-size=8g; else --readers 0 and --jobs 1"
            if small
            else ""
        )
        yield Finding("/dev/shm", "note" if small else "ok", f"{free / 1e9:.1f} GB free", todo)


def _disk(folder: Path) -> Iterator[Finding]:
    for what, place in (("disk", folder), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(_there(place)).free
        said = f"{place}: {free / 1e9:.1f} GB free"
        if free < _LEAST_DISK:
            instead = "TMPDIR takes another place" if place != folder else "take another disk: nh2st-pipe doctor FOLDER"
            yield Finding(what, "fault", said, f"nothing can be kept there; {instead}")
        elif free < _LITTLE_DISK and place == folder:
            yield Finding(
                what, "note", said, "a slide of 10,000 tiles with 8 views takes about 0.25 GB at 1,536 values"
            )
        else:
            yield Finding(what, "ok", said)


def _there(place: Path) -> Path:
    return next(each for each in (place, *place.parents) if each.exists())


def _locks(folder: Path) -> Iterator[Finding]:
    from nh2st_pipe.core.locks import check_locks

    place = _there(folder)
    try:
        check_locks(place, place, StoreError, "an object store (s3://…)")
    except StoreError as error:
        said, _, todo = str(error).partition(", without which ")
        yield Finding("locks", "fault", said, todo.partition("; ")[2] or "give a folder that can be written to")
    else:
        yield Finding("locks", "ok", f"the file system of {place} keeps them: several processes may share a store")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    from nh2st_pipe.core.hub import opens, reachable
    from nh2st_pipe.recipes.encoder import encoder_names, load_encoder_recipe

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: encoders come from the local cache, or --weights FILE")
        return
    if not reachable():
        todo = (
            "fetch weights where there is internet, and copy them: --weights FILE, or the cache with HF_HUB_OFFLINE=1"
        )
        yield Finding("hub", "note", f"{constants.ENDPOINT} cannot be reached", todo)
        return
    token = get_token()
    yield (
        Finding("hub", "ok", f"{constants.ENDPOINT} answers, with a token")
        if token
        else Finding("hub", "note", f"{constants.ENDPOINT} answers; no token", "hf auth login, or set HF_TOKEN")
    )
    gated = {
        name: recipe.repo for name in encoder_names() if (recipe := load_encoder_recipe(name)).gated and recipe.repo
    }
    repos = sorted({repo for repo in gated.values() if repo})
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        open_to_us = dict(zip(repos, pool.map(opens, repos), strict=True))
    opened = [name for name, repo in gated.items() if repo and open_to_us[repo]]
    shut = [name for name, repo in gated.items() if repo and not open_to_us[repo]]
    said = f"opened: {', '.join(opened) or 'none'}; not: {', '.join(shut) or 'none'}"
    todo = "agree to an encoder's terms on its page with the token's account (nh2st-pipe encoders NAME --check)"
    yield Finding("gated encoders", "ok" if opened or not gated else "note", said, todo if shut else "")


def _self_test(folder: Path) -> Iterator[Finding]:
    from nh2st_pipe.embedding.run import embed
    from nh2st_pipe.synthetic import generate
    from nh2st_pipe.training.run import train

    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="nh2st-doctor-", dir=_there(folder)) as place:
            manifest = generate(Path(place) / "slides", n_slides=2, grid=5)
            embedded = embed(
                manifest, encoder="fake", store=Path(place) / "store.zarr", device="cpu", stain_shift="off"
            )
            if embedded.failed:
                raise StoreError("; ".join(f"{name}: {why}" for name, why in embedded.failed.items()))
            run = train(
                Path(place) / "store.zarr",
                recipe="ridge",
                genes=20,
                out=Path(place) / "run",
                settings=["choose={}", "baselines=[]"],
                device="cpu",
            )
            pcc = run.metrics["summary"]["pcc"]
    except (NH2STError, OSError) as error:
        todo = "the line says what is wrong; nh2st-pipe --debug doctor shows where it arose"
        yield Finding("self-test", "fault", str(error).splitlines()[0], todo)
        return
    seconds = time.perf_counter() - began
    said = f"two generated slides embedded, a head trained and judged in {seconds:.0f} s (PCC {pcc:.2f})"
    yield Finding("self-test", "ok", said)


def worst(findings: list[Finding]) -> int:
    """Return the exit status that goes with what was found: 1 where something will fail."""
    return int(any(each.state == "fault" for each in findings))


def said_of(finding: Finding, wide: int) -> str:
    """Return a finding as text, what to do on a line of its own."""
    mark = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}[finding.state]
    line = f"{mark}  {finding.what:<{wide}}  {finding.said}"
    return f"{line}\n{'':7}{'':{wide}}  → {finding.todo}" if finding.todo else line


WIDE = len("optional packages")
"""How wide the names are."""
