"""Every case in CASES.md has a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [line.split(" | ") for line in (HERE / "CASES.md").read_text("utf-8").splitlines() if line.startswith("| ")][1:]


def test_each_case_names_where_it_was_reported_and_a_test_that_is_there() -> None:
    assert len(ROWS) >= 30
    for case, reported, right, test in ROWS:
        assert re.search(r"[\w.-]+/[\w.-]+#\d+|GSE\d+", reported), case
        assert right
        named = re.fullmatch(r"`(?P<file>[\w./]+\.py)::(?P<name>test_\w+)` \|", test)
        assert named, case
        tree = ast.parse((HERE / named["file"]).resolve().read_text("utf-8"))
        assert named["name"] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, case
