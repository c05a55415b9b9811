from __future__ import annotations

import hashlib
import os
from pathlib import Path
from unittest import mock

import pytest

from nh2st_pipe.core import hashes
from nh2st_pipe.core.hashes import cache_of, remembered_sha256


def test_a_large_files_hash_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LARGE", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "w.bin"
    kept = cache_of(path)
    assert kept.is_relative_to(tmp_path / "cache")
    path.write_bytes(b"a" * 100)
    os.utime(path, ns=(1, 1))
    first = remembered_sha256(path, kept)
    assert first == hashlib.sha256(b"a" * 100).hexdigest()
    hashed = mock.Mock(side_effect=hashlib.file_digest)
    monkeypatch.setattr("hashlib.file_digest", hashed)
    assert remembered_sha256(path, kept) == first
    assert not hashed.called
    another = tmp_path / "another"
    another.write_bytes(b"b" * 100)
    os.utime(another, ns=(1, 1))
    another.replace(path)  # as large, as old, and another file
    assert remembered_sha256(path, kept) == hashlib.sha256(b"b" * 100).hexdigest()
    path.write_bytes(b"c" * 100)  # so young that it may change once more within its time of change
    assert remembered_sha256(path, kept) == hashlib.sha256(b"c" * 100).hexdigest()
    assert remembered_sha256(path, kept) == hashlib.sha256(b"c" * 100).hexdigest()
    kept.write_text("{}")
    assert remembered_sha256(path, kept) == hashlib.sha256(b"c" * 100).hexdigest()
    assert hashed.call_count == 4
    (tmp_path / "small.bin").write_bytes(b"c")
    remembered_sha256(tmp_path / "small.bin", tmp_path / "small.json")
    assert not (tmp_path / "small.json").exists()
