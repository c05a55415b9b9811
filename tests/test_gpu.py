"""What a GPU changes, on one; everything here is skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.samples import Samples
from nh2st_pipe.data.targets import targets
from nh2st_pipe.encoders.batches import batch_that_fits
from nh2st_pipe.encoders.encoder import Encoder
from nh2st_pipe.encoders.load import build_backbone
from nh2st_pipe.encoders.transfer import transfer_of
from nh2st_pipe.evaluation.metrics import gene_metrics
from nh2st_pipe.heads import registry, repeated
from nh2st_pipe.prediction import predict
from nh2st_pipe.recipes.encoder import Precision, load_encoder_recipe
from nh2st_pipe.store.read import open_store
from nh2st_pipe.training.run import resolve, train
from tests.conftest import Study

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
HEADS = ["mean", "knn", "mlp", "ridge", "ridge-context", "nh2st", "nh2st-context"]

FEW = {"nh2st": ["fit.epochs=3"], "nh2st-context": ["head.network.epochs=3"], "mlp": ["head.network.epochs=3"]}


@pytest.fixture
def little_memory() -> Iterator[Callable[[float], None]]:
    """Let this process have so many GB of the GPU's memory, for as long as the test takes."""

    def allow(gigabytes: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.mem_get_info()[1])

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


def encoder_of(device: str, precision: Precision = "float32", name: str = "lunit-vits16") -> Encoder:
    recipe = load_encoder_recipe(name)
    torch.manual_seed(0)
    return Encoder(recipe, build_backbone(recipe), torch.device(device), precision)


def tiles(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (n, 224, 224, 3), np.uint8)


def apart(ours: NDArray[np.float16], theirs: NDArray[np.float16]) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("precision", "most"), [("float32", 2e-3), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_embeddings_are_those_of_the_cpu(precision: Precision, most: float) -> None:
    there, here = encoder_of("cuda", precision), encoder_of("cpu")
    assert apart(there.encode(tiles(3), 8), here.encode(tiles(3), 8)) < most


def test_batches_that_overlap_keep_their_own_embeddings() -> None:
    encoder = encoder_of("cuda", "bfloat16")
    batches = [tiles(97, seed) for seed in range(12)]
    alone = [encoder.encode(batch) for batch in batches]
    own = encoder.blank(batches[0].shape)
    for _ in range(3):
        underway = []
        for batch in batches:
            own = encoder.blank(batch.shape)  # let go of while it goes up, as embed does
            own[:] = batch
            underway.append(encoder.start(own))
        for one, whole in zip(underway, alone, strict=True):
            assert np.array_equal(one.result(), whole)


def test_a_gpu_that_runs_out_of_memory_halves_the_batch(little_memory: Callable[[float], None]) -> None:
    encoder = encoder_of("cuda")
    batch = tiles(256)
    whole = encoder.encode(batch, 8)
    assert encoder.tiles_at_once > 256
    little_memory(0.5)
    assert apart(encoder.encode(batch, 8), whole) < 1e-3
    assert encoder.tiles_at_once < 256


def test_a_batch_is_found_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("cuda")
    assert batch_that_fits(encoder, 1) == 256  # more fill no GPU better
    encoder.batch = None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (300_000_000, 80_000_000_000))
    found = batch_that_fits(encoder, 1)
    assert 8 <= found < 256
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encoder.encode(tiles(found))
    assert torch.cuda.max_memory_allocated() - before < 300_000_000


def test_a_store_made_on_a_gpu_is_that_of_the_cpu(study: Study) -> None:
    for device in ("cuda", "cpu"):
        study.embed(store=study.folder / f"{device}.zarr", device=device, views=8, precision="float32")
    there, here = (open_store(study.folder / f"{device}.zarr") for device in ("cuda", "cpu"))
    for name in here.slides():
        assert apart(there.read(name).views, here.read(name).views) < 2e-3


def test_tiles_that_processes_read_go_to_the_gpu_from_their_memory(study: Study) -> None:
    study.embed(
        device="cuda", readers="threads", precision="float32", batch_size=4, store=study.folder / "threads.zarr"
    )
    summary = study.embed(device="cuda", precision="float32", workers=2, batch_size=4)
    assert summary.settings["readers"] == "processes"
    for name in ("s0", "s1", "s2"):
        one, two = (open_store(study.folder / store).read(name) for store in ("threads.zarr", "store.zarr"))
        assert np.array_equal(one.views, two.views)


def test_two_processes_on_a_gpu_make_the_store_of_one(study: Study) -> None:
    study.embed(device="cuda:0", precision="float32", batch_size=4, store=study.folder / "one.zarr")
    summary = study.embed(device="cuda:0,cuda:0", precision="float32", batch_size=4)
    assert len(summary.busy["encoders"]) == 2
    for name in ("s0", "s1", "s2"):
        one, two = (open_store(study.folder / store).read(name) for store in ("one.zarr", "store.zarr"))
        assert np.array_equal(one.views, two.views)


def test_memory_of_others_is_page_locked_while_it_is_lent() -> None:
    values = np.zeros((4, 8, 8, 3), np.uint8)
    transfer = transfer_of(GPU)
    with transfer.pinned(values):
        assert torch.from_numpy(values).is_pinned()
        assert torch.from_numpy(values[1:3]).is_pinned()
    assert not torch.from_numpy(values).is_pinned()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_on_a_gpu_what_it_learns_on_a_cpu(
    make_study: Callable[..., Study], tmp_path: Path, head: str
) -> None:
    study = make_study(3, 9)
    store = study.folder / "store.zarr"
    study.embed(views=8)
    settings = ["baselines=[]", *FEW.get(head, [])]
    said = {}
    for device in ("cuda", "cpu"):
        run = tmp_path / device
        train(store, recipe=head, genes=5, folds="slide", out=run, device=device, settings=settings)
        predict(run, embeddings=store, out=tmp_path / f"of {device}", device="cpu")
        said[device] = np.concatenate([np.asarray(out.X) for out in predicted(tmp_path / f"of {device}")])
    assert (
        gene_metrics(said["cuda"], said["cpu"])["mse"].mean() < 0.05 * said["cpu"].var()
    )  # dropout draws other numbers there


@pytest.mark.parametrize("head", ["mlp", "nh2st-context", "nh2st"])
def test_recorded_steps_are_those_that_python_launches(
    make_study: Callable[..., Study], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(3, 12)
    study.embed(views=8)
    store = open_store(study.folder / "store.zarr")
    slides = [store.read(name) for name in store.slides()]
    recipe = resolve(head, ["baselines=[]", *FEW.get(head, [])], 5, None, None)
    panel = choose_panel(slides, recipe.targets)
    made = [targets(each, panel, recipe.targets) for each in slides]
    samples = Samples.of(slides, made, neighbours=9, device=GPU, smoothed=True)
    replays = 0
    plain = torch.cuda.CUDAGraph.replay

    def replay(self: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        plain(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    recorded = registry.fit(recipe, samples, panel, {}, epochs=3)
    assert replays > 10
    monkeypatch.setattr(repeated, "_PLAIN_FIRST", 10**9)
    launched = registry.fit(recipe, samples, panel, {}, epochs=3)
    for one, other in zip(recorded.history, launched.history, strict=True):
        assert one["loss_total"] == pytest.approx(other["loss_total"], rel=1e-3)
    ours, theirs = (np.asarray(each.model.predict(samples)) for each in (recorded, launched))
    assert np.square(ours - theirs).mean() < 1e-3 * theirs.var()


def predicted(folder: Path) -> list[anndata.AnnData]:
    return [anndata.read_h5ad(path) for path in sorted(folder.glob("*.h5ad"))]


def test_pieces_decoded_on_the_gpu_are_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    from nh2st_pipe.slides import open_slide
    from nh2st_pipe.slides.base import DecodesMany, fetch_tiles, read_tile
    from nh2st_pipe.slides.nvidia import NvDecoder
    from nh2st_pipe.slides.tiff import MOST_APART
    from tests.conftest import picture
    from tests.slides.test_nvidia import KINDS, write

    centres = np.array([[x, y] for y in (96.0, 200.5) for x in (100.0, 300.0)])
    for number, options in enumerate(KINDS.values()):
        path = tmp_path / f"{number}.tif"
        write(path, picture(512, 384, seed=3), **options)
        slide, plain = open_slide(path), open_slide(path)
        assert isinstance(slide, DecodesMany)
        slide.decode_with(NvDecoder())
        fetch_tiles(slide, centres, 128.0, 64, "bicubic")
        for x, y in centres:
            tiles = [read_tile(each, (x, y), 128.0, 64, "bicubic") for each in (slide, plain)]
            assert np.abs(tiles[0].astype(int) - tiles[1]).max() <= 2 * MOST_APART
