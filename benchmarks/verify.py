"""What `verify` takes beyond reading the store's files, for a store of about one GB made for it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from random_store import make_store

from nh2st_pipe.store.verify import verify

SPOTS, DIM = 42_000, 1536


def read_all(store: Path) -> int:
    """Read every file, and return the bytes."""
    return sum(len(file.read_bytes()) for file in store.rglob("*") if file.is_file())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        make_store(store, [SPOTS], DIM, 8, 250)
        read_all(store)  # so that both find the files in memory
        for _ in range(3):
            began = time.perf_counter()
            size = read_all(store)
            reading = time.perf_counter() - began
            began = time.perf_counter()
            found = verify(store)
            whole = time.perf_counter() - began
            assert not found.damaged
            beyond = (whole - reading) / size * 1e9
            print(
                f"{size / 1e9:.2f} GB: read {reading:.2f} s, verified {whole:.2f} s; beyond the read {beyond:.2f} s/GB"
            )


if __name__ == "__main__":
    main()
