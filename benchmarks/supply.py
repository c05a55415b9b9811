"""What feeds the encoder: CPU time per 1,000 tiles, how fast tiles come, and what of it one interpreter does.

    python benchmarks/supply.py PICTURE [--before REPOSITORY]

PICTURE is repeated to a slide of 26,880 px a side in JPEG tiles, all of it in the tissue's mask. The encoder costs
nothing. Three cases: tiles of 224 px as they lie on the level, 448 → 224 and 512 → 256. CPU is that of all processes,
from reading the manifest to the last completion mark. Then eight such slides with decoding asleep (0.4 ms a tile) in 15
processes: how many tiles a second the rest of the line takes, however many cores there were, starting the processes
included. --before runs the cases with threads on another checkout, as the ratio's other side.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL import Image

_SIDE = 26_880
_ASLEEP = 0.4e-3  # s a tile
CASES = {"base": (224, 224), "448 → 224": (448, 224), "512 → 256": (512, 256)}


class Free:
    """An encoder that costs nothing: what it returns is there already."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._values = np.random.default_rng(0).normal(size=(512, 1, encoder.recipe.dim)).astype(np.float16)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def start(self, tiles: NDArray[np.uint8], *_: Any) -> Free:
        """Begin with nothing."""
        self._n = len(tiles)
        return self

    def result(self) -> NDArray[np.float16]:
        """Return so many embeddings."""
        return self._values[: self._n]


def read_asleep(
    self: object,
    ask: object,
    size: float,
    xy: NDArray[np.float64],
    tiles: NDArray[np.uint8],
    at: NDArray[np.int64],
) -> None:
    """Read nothing, in the time that a core would take."""
    time.sleep(_ASLEEP * len(xy))
    tiles[at] = 200


def serve_asleep(*given: Any) -> None:
    from nh2st_pipe.embedding import opener, processes

    setattr(opener.OpenSlides, "read", read_asleep)  # noqa: B010
    processes.serve(*given)


def write(picture: Path, to: Path) -> None:
    """Repeat a picture to a slide in tiles."""
    with openslide.open_slide(str(picture)) as slide:
        part = np.asarray(slide.read_region((0, 0), 0, (1792, 1792)).convert("RGB"))
    times = _SIDE // 1792
    rows = (np.tile(part, (1, times, 1)) for _ in range(times))
    whole = np.concatenate(list(rows))
    with tifffile.TiffWriter(to) as tif:
        for down in (1, 4, 16):
            tif.write(
                whole[::down, ::down],
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 80},
                subfiletype=int(down > 1),
            )


def one(manifest: Path, case: str, kind: str, workers: int) -> None:
    """Print tiles, wall seconds, CPU seconds of all processes, and those of this one."""
    from nh2st_pipe.embedding.run import embed
    from nh2st_pipe.embedding.work import Work
    from nh2st_pipe.recipes.encoder import load_encoder_recipe

    side, out = CASES[case]
    load = Work.load
    setattr(Work, "load", lambda self, *given: Free(load(self, *given)))  # noqa: B010
    if kind == "asleep":
        import supply

        from nh2st_pipe.embedding import processes

        setattr(processes, "serve", supply.serve_asleep)  # noqa: B010
    recipe = load_encoder_recipe("fake").model_copy(update={"input_px": out, "dim": 1024})
    more: dict[str, Any] = {} if kind == "before" else {"readers": "threads" if kind == "threads" else "processes"}
    worked = list[float]()
    if more and kind != "threads":
        from nh2st_pipe.embedding.processes import ProcessReaders

        end = ProcessReaders.__exit__

        def ended(self: Any, *given: object) -> None:
            worked.extend(seat.worked for seat in self._seats)
            end(self, *given)

        setattr(ProcessReaders, "__exit__", ended)  # noqa: B010
    cpu, began = time.process_time(), time.perf_counter()
    summary = embed(
        manifest,
        encoder=recipe,
        store=manifest.with_name("store.zarr"),
        tile_px=side,
        batch_size=256,
        workers=workers,
        stain_shift="off",
        **more,
    )
    wall = time.perf_counter() - began
    assert not summary.failed, summary.failed
    own = time.process_time() - cpu
    readers = sum(worked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(summary.encoded_tiles, wall, own + readers, own, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        case, kind, workers = given.one
        one(given.picture, case, kind, int(workers))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(given.picture, folder / "slide.tif")
        Image.new("L", (_SIDE // 64, _SIDE // 64), 255).save(folder / "mask.png")
        rows = [f"s{number},slide.tif,0.5,mask.png\n" for number in range(8)]
        (folder / "manifest.csv").write_text("slide_id,slide,mpp,tissue\n" + rows[0])
        (folder / "eight.csv").write_text("slide_id,slide,mpp,tissue\n" + "".join(rows))

        def measure(case: str, kind: str, workers: int, manifest: str = "manifest.csv") -> list[float]:
            where = {"PYTHONPATH": str(given.before if kind == "before" else Path(__file__).resolve().parents[1])}
            call = [sys.executable, __file__, str(folder / manifest), "--one", case, kind, str(workers)]
            done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **where})
            subprocess.run(["rm", "-rf", str(folder / "store.zarr")], check=True)
            if done.returncode:
                sys.exit(done.stderr)
            return [float(value) for value in done.stdout.split()[-5:]]

        kinds = [*(["before"] if given.before else []), "threads", "processes"]
        print(f"{'case':<12}{'readers':<12}{'tiles':>7}{'CPU s per 1,000':>17}{'main, ms a tile':>17}{'tiles/s':>9}")
        for case in CASES:
            for kind in kinds:
                tiles, wall, cpu, own, _ = measure(case, kind, 2)
                said = f"{case:<12}{kind:<12}{tiles:>7,.0f}{1e3 * cpu / tiles:>17.2f}{1e3 * own / tiles:>17.3f}"
                print(f"{said}{tiles / wall:>9,.0f}", flush=True)
        tiles, wall, _, own, _ = measure("base", "asleep", 15, "eight.csv")
        print(f"decoding asleep in 15 processes: {tiles / wall:,.0f} tiles/s, main {1e3 * own / tiles:.3f} ms a tile")


if __name__ == "__main__":
    main()
