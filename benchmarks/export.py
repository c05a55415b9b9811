"""Exporting a large slide: seconds and peak memory of each target.

    python benchmarks/export.py [--tiles 100489] [--genes 200] [--to qupath,csv,…]

A prediction of so many tiles and genes with intervals, then each target in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def measure(file: Path, target: str, out: Path) -> None:
    """Export a file, and print seconds, peak memory (MB, without files that are mapped) and what was written (MB)."""
    from nh2st_pipe.exporting.run import export

    held, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            anonymous = Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]
            held[0] = max(held[0], int(anonymous) / 1024)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    summary = export(file, target, out)
    assert not summary.failed, summary.failed
    seconds = time.perf_counter() - began
    over.set()
    watching.join()
    written = [path for given in summary.files["s1"] for path in (given, *given.rglob("*")) if path.is_file()]
    print(seconds, held[0], sum(path.stat().st_size for path in written) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=100_489)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--to", default="")
    parser.add_argument("--measured", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured is not None:
        measure(Path(given.measured[0]), given.measured[1], Path(given.measured[2]))
        return
    sys.path.insert(0, str(_ROOT))
    from nh2st_pipe.exporting.run import TARGETS
    from tests.exporting.made import genes_of, prediction

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "s1.h5ad"
        prediction(file, side=round(given.tiles**0.5), genes=genes_of(given.genes), measured=False)
        for target in given.to.split(",") if given.to else TARGETS:
            command = [sys.executable, __file__, "--measured", str(file), target, str(Path(name) / "out")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds, peak, size = map(float, said)
            print(f"{target:<12} {seconds:6.1f} s  {peak:6,.0f} MB of memory  {size:6,.0f} MB written", flush=True)


if __name__ == "__main__":
    main()
