from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

from nh2st_pipe import demo, synthetic
from nh2st_pipe.cli.app import app
from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.datasets import LAYOUTS
from nh2st_pipe.datasets.generated import SECTIONS
from nh2st_pipe.demo import run_demo, run_layout_demo, standing
from nh2st_pipe.embedding.run import embed
from nh2st_pipe.encoders.load import load_encoder
from nh2st_pipe.recipes.encoder import load_encoder_recipe
from nh2st_pipe.runs.about import About
from nh2st_pipe.runs.model import load_model
from nh2st_pipe.training.run import train
from tests.cli.test_commands import call


def test_the_demo_says_where_its_head_stands() -> None:
    own = {"head": "ours", "local": 0.7, "neigh": 0.8, "noise": 0.1}
    ridge = {"head": "ridge", "local": 0.75, "neigh": 0.5, "noise": 0.1}
    mlp = {"head": "mlp", "local": 0.78, "neigh": 0.6, "noise": 0.1}
    behind, ahead = standing([own, ridge, mlp])
    assert behind == "on genes that follow the spot, ours (0.700) is behind ridge, mlp (mlp 0.780)"
    assert ahead == "on genes that follow its neighbours, ours is ahead of every baseline (0.800; mlp 0.600)"


def test_the_demo_goes_from_drawn_slides_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own way, on smaller slides, with an encoder without weights and few epochs."""

    def smaller(folder: Path, grid: int) -> Any:
        return synthetic.generate(folder, grid=5)

    def quicker(manifest: Path, **options: Any) -> Any:
        return embed(manifest, **{**options, "encoder": "fake", "weights": None, "views": 1})

    monkeypatch.setattr(demo, "generate", smaller)
    monkeypatch.setattr(demo, "embed", quicker)
    monkeypatch.setattr(demo, "demo_weights", lambda folder: None)
    monkeypatch.setattr(
        demo, "_SETTINGS", (*demo._SETTINGS, "head.network.epochs=2", "carry.grid=null", "baselines=[ridge]")
    )
    made = run_demo(tmp_path)
    assert made.report.is_file()
    assert len(list(made.predictions.glob("*.h5ad"))) == 4
    assert [group["head"] for group in made.groups] == ["nh2st-context", "ridge"]
    assert {key for group in made.groups for key in group} == {"head", "local", "neigh", "noise"}
    for _, command in demo.next_steps(tmp_path):
        ended = call(*shlex.split(command)[1:])
        assert ended.returncode == 0, command + ended.stderr
    assert (tmp_path / "like.html").is_file()
    assert any((tmp_path / "qupath").iterdir())
    again = run_demo(tmp_path)  # slides and embeddings are kept, the run is new
    assert again.run.path == made.run.path


def test_every_layout_that_can_be_imported_has_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quicker(manifest: Path, **options: Any) -> Any:
        return embed(manifest, **{**options, "encoder": "fake", "weights": None})

    assert set(LAYOUTS) == set(SECTIONS)
    monkeypatch.setattr(demo, "embed", quicker)
    monkeypatch.setattr(demo, "demo_weights", lambda folder: Path("w.safetensors"))
    known = typer.main.get_command(app)
    assert isinstance(known, typer.core.TyperGroup)
    for layout in ("xenium", "hest-bench"):
        out = tmp_path / layout
        made = run_layout_demo(layout, out)
        assert made.run.metrics["summary"]["pcc"] > 0.1
        assert made.commands[0] == f"nh2st-pipe manifest {layout} {out / layout} --out {out / 'manifest.csv'}"
        for command in made.commands:  # each is one that the command line takes
            _, name, *arguments = shlex.split(command)
            known.commands[name].make_context(name, arguments).close()
    mine = tmp_path / "hest" / "st"  # a dataset of the user's own
    mine.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"hest is there already; give another --out"):
        run_layout_demo("hest", tmp_path)
    assert mine.is_dir()
    with pytest.raises(UsageError, match=r"no layout is called 'heste'; did you mean 'hest'\?"):
        run_layout_demo("heste", tmp_path)


def test_the_demos_weights_are_those_of_its_encoder(tmp_path: Path) -> None:
    weights = demo.demo_weights(tmp_path)
    encoder = load_encoder(load_encoder_recipe("efficientnet-lite0"), weights)
    assert sum(values.numel() for values in encoder.parameters()) > 3e6
    assert demo.demo_weights(tmp_path) == weights


def test_genes_that_follow_nothing_are_a_negative_control(tmp_path: Path) -> None:
    """Of the demo's 20 noise genes at most one is trusted, and their PCC is 0: scaled over the sixty genes alone they
    follow the image, as what the others leave.
    """
    manifest = synthetic.generate(tmp_path / "slides", grid=8)
    store = tmp_path / "store.zarr"
    embed(manifest, encoder="fake", store=store, views=1)
    pcc = {}
    for over in ("all", "panel"):
        settings = ["targets.smooth=none", "baselines=[]", f"targets.scale_over={over}"]
        options = {"recipe": "ridge-context", "genes": synthetic.GENES, "settings": settings}
        run = train(store, out=tmp_path / over, **options)  # type: ignore[arg-type]
        trusted = About.of(load_model(run.path).about, run.path).trusted
        assert set(trusted) == set(synthetic.GENES)
        assert sum(trusted[gene] for gene in synthetic.GENES[40:]) <= 1
        assert sum(trusted[gene] for gene in synthetic.GENES[:20]) >= 12
        genes = pl.read_csv(run.path / "per_gene.csv").filter(pl.col("gene").str.starts_with("NOISE"))
        pcc[over] = float(genes["pcc"].mean())  # type: ignore[arg-type]
    assert abs(pcc["all"]) < 0.05
    assert abs(pcc["panel"]) > 2 * abs(pcc["all"])
