"""The command line as a person meets it: exit status, messages, and the data that comes out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import anndata
import pytest

from nh2st_pipe.cli import app as cli
from tests.conftest import Study

QUICK = ["--set", "head.network.width=16", "--set", "head.network.epochs=3"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def call(*arguments: object) -> Done:
    """Run the command line in this process: the same main(), without a new interpreter each time."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["nh2st-pipe", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
    ):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Done(status, out.getvalue(), err.getvalue())


def refused(status: int, message: str, *arguments: object) -> None:
    """The call ends with `status` and one short message on stderr, no traceback."""
    done = call(*arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6


@pytest.fixture
def embedded(study: Study) -> Study:
    study.stored(views=8)
    return study


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, nh2st_pipe.cli.app; "
        "heavy = {'torch', 'zarr', 'anndata', 'polars', 'faiss', 'timm', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nh2st_pipe.cli", "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 1.0  # half a second is the goal; the margin is for a machine under load


def test_every_option_is_explained() -> None:
    from typer.main import get_command

    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert call(name, "--help").returncode == 0
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_two_commands_from_slides_to_predictions(study: Study) -> None:
    store, run, out = study.folder / "store.zarr", study.folder / "run", study.folder / "pred"
    options = ["--slides", study.manifest, "--encoder", "fake", "--tile-px", 48, "--views", 8, "--store", store]
    first = call("embed", *options)
    assert first.returncode == 0, first.stderr
    assert "75 tiles encoded, 3 slides finished, 0 were complete already, 0 failed" in first.stdout
    assert "% encoder" in first.stdout
    second = call("embed", *options, "--json")
    assert json.loads(second.stdout)["encoded_tiles"] == 0
    trained = call("train", "--embeddings", store, "--genes", 10, "--out", run, *QUICK)
    assert trained.returncode == 0, trained.stderr
    for head in ("nh2st-context", "mean", "knn", "mlp", "ridge", "ridge-context"):
        assert f"\n{head} " in trained.stdout
    assert "each test fold touched once" in trained.stdout
    predicted = call("predict", "--model", run, "--embeddings", store, "--out", out)
    assert predicted.returncode == 0, predicted.stderr
    assert anndata.read_h5ad(out / "s1.h5ad").shape == (25, 10)
    judged = call("evaluate", "--predictions", out, "--embeddings", store, "--json")
    assert set(json.loads(judged.stdout)["slides"]) == {"s0", "s1", "s2"}
    looked = call("inspect", store)
    assert "s0: 25 tiles of 48 level-0 px" in looked.stdout


def test_a_broken_slide_shows_in_summary_and_status(study: Study) -> None:
    (study.folder / "s1.png").write_text("broken")
    done = call(
        "embed", "--slides", study.manifest, "--encoder", "fake", "--tile-px", 48, "--store", study.folder / "s.zarr"
    )
    assert done.returncode == 1
    assert "2 slides finished, 0 were complete already, 1 failed" in done.stdout
    assert "failed: s1: " in done.stderr


def test_bad_manifests(study: Study) -> None:
    path = study.folder / "bad.csv"
    store = ("--encoder", "fake", "--store", study.folder / "s.zarr")
    refused(1, "there is no manifest at", "embed", "--slides", path, *store)
    for text, message in (
        ("", "is empty"),
        ("slide_id,image\na,b\n", "lacks the column 'slide'"),
        ("slide_id,slide\na,s0.png\na,s1.png\n", "row 3, column slide_id: 'a' is already in row 2"),
        ("slide_id,slide\na,gone.png\n", "row 2, column slide: there is no file at"),
    ):
        path.write_text(text)
        refused(1, message, "embed", "--slides", path, *store)
    assert not (study.folder / "s.zarr").exists()


def test_bad_encoders_and_stores(embedded: Study, tmp_path: Path) -> None:
    options = ("embed", "--slides", embedded.manifest, "--store", embedded.folder / "store.zarr")
    refused(2, "no encoder is called 'unii'; did you mean 'uni'?", *options, "--encoder", "unii")
    refused(1, "was made with encoder fake, not mine", *options, "--encoder", mine(tmp_path))
    refused(1, "was made with tiles of 48 px, not 64 px", *options, "--tile-px", 64)
    refused(2, "--views takes 1 or 8, not 3", *options, "--views", 3)
    refused(2, "No such option", *options, "--veiws", 3)
    refused(1, "there is no store at", "inspect", tmp_path / "none.zarr")
    (tmp_path / "w.safetensors").write_bytes(b"cut short")
    weights = (
        "--encoder",
        "efficientnet-lite0",
        "--weights",
        tmp_path / "w.safetensors",
        "--store",
        tmp_path / "n.zarr",
    )
    refused(1, "cannot be read as weights", "embed", "--slides", embedded.manifest, *weights)


def mine(folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text("{name: mine, kind: fake, dim: 96}")
    return path


def test_folds_are_named_by_what_they_leave_out(embedded: Study) -> None:
    store, out = embedded.folder / "store.zarr", embedded.folder / "run"
    done = call("train", "--embeddings", store, "--recipe", "mean", "--folds", 2, "--out", out)
    assert done.stdout.startswith("2 folds by patient, protocol nested")
    headline = r"mean: PCC 0\.000 \(95 % interval 0\.000 to 0\.000, over 3 patients\) over \d+ genes"
    assert re.search(headline, done.stdout)
    assert "its null: top 50 of maps without any tie" in done.stdout


def test_a_failure_is_told_once_with_its_cause(study: Study) -> None:
    (study.folder / "s1.png").write_text("no image")
    options = ("--encoder", "fake", "--tile-px", 48, "--store", study.folder / "s.zarr")
    done = call("embed", "--slides", study.manifest, *options)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("is not an image") == 1
    assert "failed: s1: " in done.stderr


def test_bad_training(embedded: Study, make_study: Callable[..., Study], tmp_path: Path) -> None:
    store = embedded.folder / "store.zarr"
    (tmp_path / "there").mkdir()
    refused(1, "exists already; give another --out", "train", "--embeddings", store, "--out", tmp_path / "there")
    refused(
        2,
        "no training recipe is called 'nhst'; did you mean 'nh2st'?",
        "train",
        "--embeddings",
        store,
        "--recipe",
        "nhst",
    )
    refused(2, "--genes takes a number from 1 on", "train", "--embeddings", store, "--genes", 0)
    refused(
        2, "did you mean 'fit.patience'", "train", "--embeddings", store, "--recipe", "nh2st", "--set", "fit.patiense=3"
    )
    refused(
        2,
        "nh2st-context.yaml: fit has no effect on a head of kind nh2st-context",
        "train",
        "--embeddings",
        store,
        "--set",
        "fit.epochs=3",
    )
    refused(2, "--folds takes patient, slide, block, none", "train", "--embeddings", store, "--folds", "donor")
    one = make_study(1, name="one")
    one.stored()
    place = one.folder / "store.zarr"
    refused(1, "folds by patient need at least two patients", "train", "--embeddings", place, "--folds", "patient")
    refused(1, "is not a finished run", "report", tmp_path / "there")
    refused(1, "there is no run at", "predict", "--model", tmp_path / "gone", "--embeddings", store)


def test_the_importer_names_what_is_missing(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "m.csv")
    refused(1, "there is no ST-cnts", "manifest", "her2st", tmp_path, *out)
    refused(2, "there is no folder at", "manifest", "her2st", tmp_path / "gone", *out)
    refused(2, "no importer is called 'herst'; did you mean 'her2st'?", "manifest", "herst", tmp_path, *out)


def test_sigterm_keeps_what_is_done_and_says_so(study: Study) -> None:
    slow = (
        "import sys, time; from nh2st_pipe.cli import app; from nh2st_pipe.encoders.encoder import Encoder\n"
        "plain = Encoder.start\n"
        "def slow(self, tiles, views=1):\n    time.sleep(0.3)\n    return plain(self, tiles, views)\n"
        "Encoder.start = slow; sys.argv[0] = 'nh2st-pipe'; app.main()"
    )
    store = study.folder / "s.zarr"
    options = [
        "embed",
        "--slides",
        study.manifest,
        "--encoder",
        "fake",
        "--tile-px",
        "48",
        "--batch-size",
        "2",
        "--store",
        store,
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, options)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (store / "slides/s0/zarr.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; what was encoded until then is kept in {store}; the same command goes on with it" in errors
    assert "Traceback" not in errors
    from nh2st_pipe.store.read import open_store

    record = open_store(store).record("s0")
    assert record is not None
    assert record.state.rows + record.state.partial > 0


BEFORE = """
import builtins, sys, time
from nh2st_pipe.cli import entry
plain = builtins.__import__
def slow(name, *more, **named):
    if name == "nh2st_pipe.cli.app":
        print("at it", flush=True)
        time.sleep(60)
    return plain(name, *more, **named)
builtins.__import__ = slow
entry.main()
"""
DURING = """
import sys, time
from nh2st_pipe.cli import app, entry
import nh2st_pipe.recipes.files as files
def names(kind):
    print("at it", flush=True)
    time.sleep(60)
files.names = names
sys.argv = ["nh2st-pipe", "encoders"]
entry.main()
"""
AFTER = """
import atexit, sys, time
from nh2st_pipe.cli import entry
def slow():
    print("at it", flush=True)
    time.sleep(60)
atexit.register(slow)
sys.argv = ["nh2st-pipe", "encoders", "fake"]
entry.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [BEFORE, DURING, AFTER], ids=["before", "during", "after"])
def test_an_interruption_is_one_line_whenever_it_comes(when: str, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", when], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "at it\n":
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "nh2st-pipe: interrupted\n")


def test_an_error_of_the_disk_names_its_file_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from nh2st_pipe.recipes import files

    for error, said in (
        (PermissionError(13, "Permission denied", "/data/x"), "nh2st-pipe: /data/x: Permission denied\n"),
        (OSError(5, "Input/output error"), "nh2st-pipe: Input/output error\n"),
        (OSError("odd"), "nh2st-pipe: odd\n"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(files, "names", mock.Mock(side_effect=error))
            done = call("encoders")
        assert (done.returncode, done.stderr) == (1, said)


def test_code_of_a_hub_runs_nowhere_unless_that_is_said() -> None:
    """The default of every verb that could run it, in Python and of every command."""
    import inspect

    from typer.main import get_command

    import nh2st_pipe
    from nh2st_pipe.benching.hest import benchmark_hest
    from nh2st_pipe.embedding.options import EmbedOptions
    from nh2st_pipe.embedding.repair import repair
    from nh2st_pipe.encoders.check import check_encoder
    from nh2st_pipe.encoders.load import load_encoder
    from nh2st_pipe.encoders.weights import find_weights

    verbs = [EmbedOptions, nh2st_pipe.predict, nh2st_pipe.bench, benchmark_hest, repair, check_encoder]
    commands = [command.callback for command in get_command(cli.app).commands.values()]  # type: ignore[attr-defined]
    seen = 0
    for verb in (*verbs, load_encoder, find_weights, *commands):
        parameter = inspect.signature(verb).parameters.get("trust_remote_code")
        assert parameter is not None or verb in commands, verb
        if parameter is not None:
            seen += 1
            assert parameter.default is False, verb
    assert seen >= 12


def test_what_check_would_put_right_is_said_of_slides_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    from nh2st_pipe.checking.examine import Correction, Examined
    from nh2st_pipe.checking.run import Checked
    from nh2st_pipe.cli.embedding import _say_checked

    turned = Correction(way="turned round")
    _say_checked(
        Checked(
            [
                Examined("s0", on_tissue={"as they are": 0.2, "turned round": 0.9}, correction=turned),
                Examined("s1", on_tissue={"as they are": 1.0}),
                Examined("s2", on_tissue={"as they are": 1.0}, correction=Correction(mpp=0.5)),
            ]
        ),
        "embed",
    )
    said = capsys.readouterr().out
    assert said.count("would be") == 1
    assert "s0: good; \n  spots on tissue would be 90% turned round\n" in said


def test_a_figure_that_is_not_there_is_a_dash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nh2st_pipe.datasets.reproduce import Reproduced

    row = {"head": "ridge", "judged": "all", "mse": 0.25, "mae": None, "pcc": 0.5}
    done = Reproduced(tmp_path, [row])
    monkeypatch.setattr("nh2st_pipe.datasets.reproduce.reproduce", lambda *_, **__: done)
    said = call("reproduce", "her2st", "--data", tmp_path).stdout
    assert "0.2500    –  0.5000" in re.sub(" +–", "    –", said)


def test_the_list_of_encoders_says_which_may_be_used_for_what() -> None:
    lines = {line.split()[0]: line for line in call("encoders").stdout.splitlines() if line}
    assert "not commercial" in lines["conch-v1.5"]
    assert "commercial" not in lines["keep"]
    assert "look up its terms" not in lines["keep"]
    assert any("look up its terms" in line for line in lines.values())
