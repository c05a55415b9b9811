from __future__ import annotations

from pathlib import Path

import numpy as np
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


def test_all_genes_are_those_that_every_slide_has_most_expressed_first() -> None:
    one = slide(counts=[[1, 7, 3]], genes=["a", "b", "c"])
    two = slide(counts=[[1, 0, 0]], genes=["c", "b", "x"])
    assert choose_panel([one, two], TargetRecipe(genes="all")) == ["b", "c"]


def test_dispersion_is_variance_over_mean_of_scaled_counts() -> None:
    rng = np.random.default_rng(0)
    n = 200
    steady = rng.poisson(40, n)
    patchy = np.where(np.arange(n) < 60, 30, 0) + rng.poisson(1, n)
    depth = np.where(np.arange(n) % 2, 1, 3)  # deep and shallow spots: no gene's own doing
    once = np.zeros(n)
    once[3] = 500  # one spot of two hundred
    counts = np.column_stack((steady * depth, patchy * depth, rng.poisson(3, n) * depth, once))
    halves = [slide(counts=half, genes=["steady", "patchy", "few", "once"]) for half in (counts[:90], counts[90:])]
    recipe = TargetRecipe(genes=4, panel="dispersion")
    assert choose_panel(halves, recipe)[0] == "patchy"
    assert "once" not in choose_panel(halves, recipe)
    sums = counts.sum(1, keepdims=True)
    scaled = counts * np.median(sums) / sums
    order = [["steady", "patchy", "few"][i] for i in np.argsort(-(scaled.var(0) / scaled.mean(0))[:3])]
    assert choose_panel(halves, recipe) == order
    # A gene of the same share in every spot varies with the depth alone: much in raw counts, and not at all in these.
    share, deep = rng.permutation(np.tile([0.05, 0.15], n // 2)), np.where(np.arange(n) % 4 == 0, 2000, 20)
    counts = np.column_stack((np.full(n, 0.6) * deep, share * deep, (0.4 - share) * deep))
    one = slide(counts=counts, genes=["even", "uneven", "rest"])
    assert choose_panel([one], recipe) == ["uneven", "rest", "even"]
    assert choose_panel(halves, TargetRecipe(genes=1)) == ["steady"]


def test_a_given_panel_is_kept_in_order_and_checked() -> None:
    assert choose_panel([slide()], TargetRecipe(genes=("c", "a"))) == ["c", "a"]
    with pytest.raises(TrainError, match="1 genes of the panel are in no slide: nope"):
        choose_panel([slide()], TargetRecipe(genes=("a", "nope")))
    assert choose_panel([slide()], TargetRecipe(genes=("x", "a")), [slide(genes=["x", "y", "z"])]) == ["a"]
    with pytest.raises(TrainError, match="slides s have none of the panel's genes"):
        choose_panel([slide()], TargetRecipe(genes=("x",)), [slide(genes=["x", "y", "z"])])
    with pytest.raises(TrainError, match="no gene in common"):
        choose_panel([slide(), slide(genes=["x", "y", "z"])], TargetRecipe())


def test_gene_files(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("# mine\nA\n\n B \n")
    assert read_gene_file(path) == ("A", "B")
    path.write_bytes('\ufeffgene\nErbb2\n"G1"\n'.encode())  # as a spreadsheet saves it: a mark, a header, quotes
    assert read_gene_file(path) == ("Erbb2", "G1")
    for text, message in (("A\nB\nA\n", "names genes twice: A"), ("#\n", "names no genes")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_gene_file(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_gene_file(tmp_path / "gone.txt")


def test_genes_that_are_called_in_two_ways_are_said_to_be() -> None:
    """HEST-1k has slides with Ensembl's ids beside others with symbols."""
    ids = [f"ENSMUSG{i:011d}" for i in range(3)]
    slides = [slide("a", genes=["Cd3e", "Gapdh", "Actb"]), slide("b", genes=ids), slide("c", genes=ids)]
    with pytest.raises(TrainError) as error:
        choose_panel(slides, TargetRecipe(genes=2))
    assert str(error.value) == (
        "slides a, b, c have no gene in common: a has symbols, as Cd3e, Gapdh, Actb and b has Ensembl's ids, as "
        f"{ids[0]}, {ids[1]}, {ids[2]}; write the same kind of name into var_names of each .h5ad"
    )
    with pytest.raises(TrainError, match=r"a has Cd3e, Gapdh, Actb and b has X, Y, Z; are they of one species\?"):
        choose_panel([slides[0], slide("b", genes=["X", "Y", "Z"])], TargetRecipe(genes=2))
