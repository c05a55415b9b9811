"""What docs/exports.md tells people to run runs, where what it needs is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.exporting.run import TARGETS, export
from tests.exporting.made import genes_of, prediction

PAGE = (Path(__file__).parents[2] / "docs/exports.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_on_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    block = BLOCKS[number]
    for module in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    monkeypatch.chdir(tmp_path)
    prediction(tmp_path / "s1.h5ad", side=6, genes=genes_of(4))
    export(tmp_path / "s1.h5ad", "anndata,spatialdata", tmp_path / "exported")
    with quiet_warnings():
        exec(compile(block, f"docs/exports.md, block {number + 1}", "exec"), {})


def test_every_target_is_told_of() -> None:
    assert len(BLOCKS) == 4
    for name, target in TARGETS.items():
        assert f"| `{name}` |" in PAGE
        assert all(f"SLIDE{suffix}" in PAGE for suffix in (target.suffix,))
