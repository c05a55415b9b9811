"""Peak memory of reading a tissue mask of a billion px, against Pillow and NumPy reading it whole.

On Linux. `python benchmarks/mask_memory.py`
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SIDES = 25_000, 40_000
WAYS = {
    "whole": "import numpy as np; from PIL import Image; Image.MAX_IMAGE_PIXELS = None; "
    "np.asarray(Image.open(sys.argv[1]).convert('L')) > 0",
    "ours": "from nh2st_pipe.tiles.masks import mask_from_image; mask_from_image(pathlib.Path(sys.argv[1]))",
}


def peak_mb(way: str, path: Path) -> tuple[float, float]:
    code = f"import pathlib, sys; {WAYS[way]}; print(pathlib.Path('/proc/self/status').read_text())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    high = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert high is not None
    return int(high[1]) / 1000, time.perf_counter() - began


def main() -> None:
    coarse = np.random.default_rng(0).random((25, 40)) < 0.4
    mask = np.kron(coarse, np.ones((1000, 1000), bool))
    with tempfile.TemporaryDirectory() as folder:
        one, eight, tiff = (Path(folder) / name for name in ("bits.png", "bytes.png", "tiles.tif"))
        Image.fromarray(mask).save(one)
        Image.fromarray(mask.view(np.uint8) * 255).save(eight, compress_level=1)
        tifffile.imwrite(tiff, mask.view(np.uint8) * 255, compression="zlib", tile=(512, 512))
        del mask
        for path in (one, eight, tiff):
            (theirs, their_seconds), (ours, seconds) = peak_mb("whole", path), peak_mb("ours", path)
            print(
                f"{path.name}: {ours:,.0f} MB and {seconds:.1f} s; read whole {theirs:,.0f} MB and "
                f"{their_seconds:.1f} s: {theirs / ours:.1f} times the memory"
            )


if __name__ == "__main__":
    main()
