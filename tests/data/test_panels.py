from __future__ import annotations

from pathlib import Path

import pytest

from nh2st_pipe.core.errors import TrainError, UsageError
from nh2st_pipe.data.panels import choose_panel, read_gene_file
from nh2st_pipe.recipes.train import TargetRecipe
from tests.conftest import slide


def test_the_panel_has_the_highest_mean_counts_over_all_spots() -> None:
    one = slide(counts=[[9, 1, 0]], genes=["a", "b", "c"])
    two = slide(counts=[[5, 0, 8], [5, 0, 8], [5, 0, 8]], genes=["c", "a", "b"])  # joined by name
    assert choose_panel([one, two], TargetRecipe(genes=2)) == ["b", "c"]
    assert choose_panel([one, two], TargetRecipe(genes=99)) == ["b", "c", "a"]
    tie = slide(counts=[[1, 1, 1]], genes=["z", "y", "x"])
    assert choose_panel([tie], TargetRecipe(genes=2)) == ["z", "y"]


def test_a_given_panel_is_kept_in_order_and_checked() -> None:
    assert choose_panel([slide()], TargetRecipe(genes=("c", "a"))) == ["c", "a"]
    with pytest.raises(TrainError, match="1 genes of the panel are in no training slide: nope"):
        choose_panel([slide()], TargetRecipe(genes=("a", "nope")))
    with pytest.raises(TrainError, match="no gene in common"):
        choose_panel([slide(), slide(genes=["x", "y", "z"])], TargetRecipe())


def test_gene_files(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("# mine\nA\n\n B \n")
    assert read_gene_file(path) == ("A", "B")
    for text, message in (("A\nB\nA\n", "names genes twice: A"), ("#\n", "names no genes")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_gene_file(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_gene_file(tmp_path / "gone.txt")
