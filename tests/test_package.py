"""The package as it is installed: its public names, its recipes from a wheel, the README's promises."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nh2st_pipe
from nh2st_pipe.recipes import files
from nh2st_pipe.recipes.train import load_train_recipe

ROOT = Path(__file__).resolve().parents[1]


def test_public_names_are_there_and_no_others() -> None:
    assert sorted(nh2st_pipe.__all__) == sorted(
        [
            "NH2ST",
            "Query",
            "SlideArrays",
            "__version__",
            "bench",
            "check",
            "compare",
            "embed",
            "evaluate",
            "export",
            "import_features",
            "load_model",
            "open_store",
            "predict",
            "push",
            "repeat",
            "report",
            "search",
            "sweep",
            "train",
            "write_store",
        ]
    )
    for name in nh2st_pipe.__all__:
        assert getattr(nh2st_pipe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nh2st_pipe.nothing


def test_importing_does_nothing() -> None:
    code = (
        "import sys, warnings; before = list(warnings.filters); import nh2st_pipe; "
        "assert warnings.filters == before; assert not {'torch', 'zarr', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_stage_two_imports_no_slide_reader() -> None:
    code = (
        "import sys, nh2st_pipe.training.run, nh2st_pipe.prediction, nh2st_pipe.evaluation.judge, "
        "nh2st_pipe.reporting.page, nh2st_pipe.exporting.run, nh2st_pipe.cohorts.run, nh2st_pipe.searching.search\n"
        "readers = ('nh2st_pipe.slides', 'openslide', 'tifffile', 'skimage', 'shapely')\n"
        "found = [name for name in sys.modules if name.startswith(readers)]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_model_and_encoder_modules_need_little() -> None:
    """They run where only torch, timm, numpy, YAML and the hub's client are installed."""
    code = (
        "import sys\n"
        "absent = ('zarr', 'anndata', 'polars', 'faiss', 'openslide', 'pydantic', 'pandas')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import nh2st_pipe.encoders.load, nh2st_pipe.heads.nh2st, nh2st_pipe.heads.linear, nh2st_pipe.heads.fitting"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_recipes_are_found_by_name_in_a_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from nh2st_pipe.recipes import files; import nh2st_pipe; "
        "print(nh2st_pipe.__file__); "
        "print(*[name for kind in ('stages/embed', 'stages/train', 'manifests') for name in files.names(kind)]); "
        "print(files.find('stages/embed', 'uni'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path / "site"
    ).stdout.splitlines()
    assert all(str(tmp_path) in line for line in (run[0], run[2]))
    here = [name for kind in ("stages/embed", "stages/train", "manifests") for name in files.names(kind)]
    assert run[1].split() == here
    assert (tmp_path / "site/nh2st_pipe/py.typed").is_file()
    template = "nh2st_pipe/reporting/template"
    of_page = [
        {file.name for file in (root / template).iterdir()} for root in (Path(__file__).parents[1], tmp_path / "site")
    ]
    assert of_page[0] == of_page[1]


def test_every_training_recipe_is_valid_and_its_baselines_exist() -> None:
    for name in files.names("stages/train"):
        recipe = load_train_recipe(name)
        assert recipe.name == name
        for baseline in recipe.baselines:
            load_train_recipe(baseline)


def test_the_readmes_options_exist() -> None:
    from typer.main import get_command

    from nh2st_pipe.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^\$? ?nh2st-pipe (\w+)(.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) >= 4
    for command, rest in lines:
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, (command, rest)


def test_no_host_is_named_where_packages_come_from() -> None:
    assert "://" not in (ROOT / "constraints.txt").read_text()
    assert "index-url" not in (ROOT / "Makefile").read_text()


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "stages").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
