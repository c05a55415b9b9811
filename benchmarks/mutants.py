"""Lines of the package broken at random, and whether the tests of their room see it.

    python benchmarks/mutants.py --lines 60 --seed 1

cosmic-ray breaks them (`and` to `or`, a number by one, a comparison the other way, a decorator gone), one at a time, in
a copy of the tree; the tests of the room the line lies in are run on it. What survives is printed with its change: a
line that no test holds, or one whose change makes no difference, which is for a person to say. Takes a minute a line.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 900.0  # of a room's tests; what takes longer hangs, and is seen
_NO_CHANGE = ("core/ExceptionReplacer", "core/RemoveDecorator", "core/ZeroIterationForLoop")
_GUARDS = (("strict=True", "strict=False"), ("frozen=True", "frozen=False"))  # what they forbid is never done
_DOES = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.Break, ast.Continue, ast.For)
_ALSO = {  # rooms whose lines the tests of another hold
    "cli": ["tests/cli", "tests/test_docs.py", "tests/checking", "tests/datasets/test_reproduce.py"],
    "core": ["tests/core", "tests/store"],
    "datasets": ["tests/datasets", "tests/benching/test_hest.py"],
    "recipes": ["tests/recipes", "tests/heads"],
    "slides": ["tests/slides", "tests/tiles/test_manifest.py"],
    "store": ["tests/store", "tests/embedding/test_run.py"],
}


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    file: str
    line: int
    operator: str
    before: str
    after: str
    code: str
    """The whole module, changed."""


def lines_of_code(path: Path) -> list[int]:
    """Return the numbers of a module's lines that do something: no docstrings, imports, comments, declarations."""
    tree, found = ast.parse(path.read_text()), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr_context | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        of_number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if of_number or isinstance(node, _DOES):
            found.add(int(node.lineno))  # type: ignore[attr-defined]
    return sorted(found)


def mutants_of(path: Path, line: int) -> Iterator[Mutant]:
    """Yield what cosmic-ray makes of one line."""
    whole = path.read_text()
    tree, before = get_ast(whole), whole.splitlines()
    for name in operator_names():
        if name in _NO_CHANGE or "Variable" in name or "BitOr" in name:  # of one's own names; unions of types
            continue
        operator = get_operator(name)()
        starts = [start for node in _nodes(tree) for (start, _), _ in operator.mutation_positions(node)]
        for occurrence, at in enumerate(starts):
            if at != line:
                continue
            code = mutate_code(whole, operator, occurrence)
            now = code.splitlines()
            if now[line - 1] not in (before[line - 1], *(before[line - 1].replace(*guard) for guard in _GUARDS)):
                yield Mutant(str(path.relative_to(ROOT)), line, name, before[line - 1], now[line - 1], code)


def _nodes(node: Any) -> Iterator[Any]:
    """Yield a tree's nodes in the order in which cosmic-ray counts them."""
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def chosen(number: int, seed: int, only: str) -> Iterator[Mutant]:
    """Yield mutants of lines chosen at random, every line of the package alike."""
    rng = random.Random(seed)
    modules = [path for path in sorted((ROOT / "nh2st_pipe").rglob("*.py")) if only in str(path)]
    every = [(path, line) for path in modules for line in lines_of_code(path)]
    rng.shuffle(every)
    for path, line in every:
        found = list(mutants_of(path, line))
        if found:
            yield rng.choice(found)
            number -= 1
        if number == 0:
            return


def tests_of(file: str) -> list[str]:
    """Return the tests of the room in which a module lies."""
    room, _, rest = file.removeprefix("nh2st_pipe/").partition("/")
    if not rest:
        own = f"tests/test_{room.removesuffix('.py')}.py"
        return [own] if (ROOT / own).exists() else ["tests/runs", "tests/cli"]
    found = _ALSO.get(room, [f"tests/{room}"])
    return [each for each in found if (ROOT / each).exists()] or ["tests"]


def killed(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests of its room fail on a copy of the tree that has it."""
    place = tree / mutant.file
    whole = place.read_text()
    place.write_text(mutant.code)
    try:
        run: Any = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests_of(mutant.file)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        place.write_text(whole)
    return bool(run.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="modules whose paths hold this")
    given = parser.parse_args()
    survivors = list[Mutant]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as held:
        tree = Path(held) / "project"
        hidden = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=hidden)
        if (ROOT.parent / "shared").is_dir():
            (Path(held) / "shared").symlink_to(ROOT.parent / "shared")
        number = 0
        for number, mutant in enumerate(chosen(given.lines, given.seed, given.only), start=1):
            seen = killed(mutant, tree)
            print(f"{number:3} {'killed  ' if seen else 'SURVIVED'} {mutant.file}:{mutant.line} {mutant.operator}")
            if not seen:
                survivors.append(mutant)
                print("".join(f"    {line}\n" for line in difflib.ndiff([mutant.before], [mutant.after])), end="")
            sys.stdout.flush()
    print(json.dumps({"lines": number, "killed": number - len(survivors), "seed": given.seed}))


if __name__ == "__main__":
    main()
