"""The skeleton of HDF5 files, walked before HDF5 follows it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from nh2st_pipe.core.errors import ExpressionError
from nh2st_pipe.core.h5ad import require_h5
from nh2st_pipe.core.hdf5 import check_skeleton


def made(path: Path, **options: object) -> bytes:
    with h5py.File(path, "w", **options) as file:
        for i in range(40):
            group = file.create_group(f"g{i}/a")
            for j in range(12):
                group.attrs[f"at{j}"] = "x" * 40 * (j % 4)
            group["d"] = np.arange(10)
        file["soft"], file["hard"] = h5py.SoftLink("/nowhere"), file["g2"]
        file["g2/up"] = file["g1"]
        file["g1/a/loop"] = file["/"]
        del file["g7"]
        file["g8"].attrs["later"] = "y" * 2000
    return path.read_bytes()


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"track_order": True}, {"userblock_size": 512}])
def test_good_files_are_let_through(tmp_path: Path, options: dict[str, object]) -> None:
    made(tmp_path / "a.h5", **options)
    check_skeleton(tmp_path / "a.h5")
    (tmp_path / "empty.h5").write_bytes(b"")
    check_skeleton(tmp_path / "empty.h5")
    (tmp_path / "other.h5").write_bytes(b"what is no HDF5" * 20)
    check_skeleton(tmp_path / "other.h5")


def _put(data: bytearray, at: int, *values: int) -> None:
    data[at : at + 8 * len(values)] = struct.pack(f"<{len(values)}Q", *values)


def _round_header(data: bytearray) -> None:
    """Have a header that goes on elsewhere go on in itself."""
    for at in range(0, len(data) - 24, 8):
        kind, size = struct.unpack_from("<HH", data, at)
        if kind == 0x10 and size == 16:
            start, length = struct.unpack_from("<QQ", data, at + 8)
            if start + length <= len(data) and 0 < length < 4096:
                inside = struct.pack("<HHB3xQQ", 0x10, 16, 0, start, length)
                data[start : start + len(inside)] = inside


def _round_tree(data: bytearray) -> None:
    at = data.index(b"TREE")
    _put(data, at + 24 + 8, at)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_round_header, "an object's header goes on in itself"),
        (_round_tree, "a group's tree leads in a circle"),
        (lambda data: _put(data, data.index(b"TREE") + 32, 1 << 40), "a group's tree leads beyond the end of the file"),
        (lambda data: data.__setitem__(slice(data.index(b"SNOD"), data.index(b"SNOD") + 4), b"SNOX"), "not where it"),
        (lambda data: _put(data, data.index(b"SNOD") + 8 + 8, 7), "leads to what is no object"),
        (lambda data: _put(data, data.index(b"SNOD") + 8 + 8, 1 << 50), "a group leads beyond the end"),
        (
            lambda data: data.__setitem__(slice(0x60, 0x70), b"\1\0\1\0\1\0\0\0\xff\xff\xff\x7f\0\0\0\0"),
            "beyond the end",
        ),
    ],
)
def test_what_leads_nowhere_or_in_a_circle_is_named(
    tmp_path: Path, damage: Callable[[bytearray], None], words: str
) -> None:
    data = bytearray(made(tmp_path / "a.h5"))
    damage(data)
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        check_skeleton(tmp_path / "a.h5")
    with pytest.raises(ExpressionError, match=r"a\.h5 cannot be read: .*; is it damaged\?"):
        require_h5(tmp_path / "a.h5")


def test_bytes_that_slipped_in_are_a_fault_and_take_no_time(tmp_path: Path) -> None:
    data = made(tmp_path / "a.h5")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        at, count = int(rng.integers(100, len(data))), int(rng.integers(1, 200))
        (tmp_path / "b.h5").write_bytes(data[:at] + bytes(count) + data[at:])
        try:
            check_skeleton(tmp_path / "b.h5")
        except ValueError:
            refused += 1
    assert refused > 40
